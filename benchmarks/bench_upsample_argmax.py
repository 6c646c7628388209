"""upsample_argmax beside F.interpolate(...).argmax(1), on the shapes of segmentation networks.

    pytest benchmarks/bench_upsample_argmax.py --benchmark-enable --benchmark-json=benchmarks/results/upsample_argmax_cpu.json

Every candidate of a case runs once per round, in a random order, in one process with the same threads. Error is the share of
pixels whose class is not that of the float64 logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from benchmarks.measure import DEVICE, ceilings, interleave, percentiles

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = {
    "DeepLabv3 OS16": (4, 21, 33, 513),
    "DeepLabv3+ OS4": (4, 21, 129, 513),
    "DeepLabv3+ OS4, one image": (1, 21, 129, 513),
    "DeepLabv3 OS8": (1, 19, 129, 1025),
    "PSPNet ADE20K": (1, 150, 60, 473),
    "CamVid": (1, 11, 23, 360),
}


def _framework(logits: Tensor, size: int) -> Tensor:
    return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False).argmax(1)


def _call(function: Callable[..., Tensor], logits: Tensor, size: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(logits, size)

    return run


@pytest.mark.parametrize("name", CASES)
def test_upsample_argmax(benchmark: Any, name: str) -> None:
    batch, classes, size, out = CASES[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    # Neighbours alike, as a network's logits are.
    logits = F.interpolate(torch.randn(batch, classes, size // 4 + 1, size // 4 + 1) * 3, size=(size, size), mode="bicubic")
    logits = logits.to(DEVICE)
    calls = {}
    for layout, memory_format in LAYOUTS.items():
        x = logits.contiguous(memory_format=memory_format)
        calls[f"ours auto {layout}"] = _call(ak.upsample_argmax, x, out)
        calls[f"torch {layout}"] = _call(_framework, x, out)
        calls[f"torch.compile {layout}"] = _call(torch.compile(_framework, dynamic=False), x, out)
    truth = _framework(logits.double(), out)
    errors = {key: (run() != truth).double().mean().item() for key, run in calls.items()}  # also compiles
    times, rounds = interleave(benchmark, calls, "ours auto contiguous")
    best = min(torch.tensor(times[key]).median().item() for key in times if not key.startswith("ours"))
    ours = min(torch.tensor(times[key]).median().item() for key in times if key.startswith("ours"))
    bandwidth = ceilings(torch.float32)[1]
    benchmark.extra_info.update(
        case=f"{name}: {batch}x{classes} {size}x{size} to {out}x{out} float32",
        name=name,
        backward=False,
        dtype="float32",
        rounds=rounds,
        chosen=ak.explain("upsample_argmax", logits, out).chosen,
        floor_ms=(truth.nbytes + logits.nbytes) / bandwidth * 1e3,
        copy_gbytes_per_second=bandwidth / 1e9,
        ratio=best / ours,
        candidates={key: {**percentiles(t), "error": errors[key]} for key, t in times.items()},
    )
    # float32 rounds logits to 1e-6; few pixels lie so near a boundary between two classes.
    assert max(errors.values()) < 1e-4, errors
