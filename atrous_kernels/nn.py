"""Modules over :mod:`atrous_kernels.functional`, with the state_dict keys of their :mod:`torch.nn` twins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels.functional import conv2d, upsample_cross_entropy


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` on our kernels: same arguments, defaults, initialisation, padding modes and state_dict.

    Args:
        backend: as in :func:`atrous_kernels.conv2d`; every other argument as in :class:`torch.nn.Conv2d`.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, backend=self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")


class UpsampleCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of logits ``[N, C, h, w]``, upsampled bilinearly, against labels ``[N, H, W]``.

    Args: those of :func:`atrous_kernels.upsample_cross_entropy`. Like :class:`torch.nn.CrossEntropyLoss`, which it replaces
    together with the upsampling before it, it keeps ``weight`` as a buffer.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        hard_fraction: float = 1.0,
        align_corners: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.hard_fraction, self.align_corners, self.backend = hard_fraction, align_corners, backend

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            hard_fraction=self.hard_fraction,
            align_corners=self.align_corners,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, "
            f"hard_fraction={self.hard_fraction}, align_corners={self.align_corners}"
        )
