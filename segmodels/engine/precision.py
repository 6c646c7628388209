"""Mixed precision by its name in the settings."""

from __future__ import annotations

import torch

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context in which a network computes; ``amp`` is a key of :data:`AMP`."""
    return torch.autocast(device.type, AMP[amp], enabled=amp != "none")
