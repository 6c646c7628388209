"""Rounding errors of ``conv2d`` and its two gradients against float64, per algorithm. Nothing is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from atrous_kernels import native
from atrous_kernels.ops import conv2d as ops

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))


@dataclass(frozen=True)
class Case:
    in_channels: int
    out_channels: int
    rate: int
    size: int = 33

    def __str__(self) -> str:
        return f"{self.in_channels}->{self.out_channels} {self.size}x{self.size} rate {self.rate}"

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation, groups."""
        return [1, 1], [self.rate] * 2, [self.rate] * 2, 1


CASES = [
    *(Case(64, 64, rate) for rate in (1, 2)),
    *(Case(512, 128, rate) for rate in (1, 2, 4)),
    *(Case(2048, 64, rate) for rate in (6, 12, 18)),
]
PASSES = ("forward", "input gradient", "weight gradient")

Three = Callable[[Tensor, Tensor, Tensor, Case], list[Tensor]]


def _backend(name: str) -> Three:
    def run(x: Tensor, w: Tensor, g: Tensor, case: Case) -> list[Tensor]:
        rest = (*case.geometry, name)
        return [
            ops.conv2d(x, w, None, *rest),
            ops.conv2d_input(x.shape, w, g, *rest),
            ops.conv2d_weight(x, w.shape, g, *rest),
        ]

    return run


def _winograd(tile: int) -> Three:
    def run(x: Tensor, w: Tensor, g: Tensor, case: Case) -> list[Tensor]:
        native_ops, rest = torch.ops.atrous_native, (*case.geometry, tile)
        return [
            native_ops.conv2d_winograd(x, w, None, None, *rest),
            native_ops.conv2d_input_winograd(x.shape, w, None, g, *rest),
            native_ops.conv2d_weight_winograd(x, w.shape, g, *rest),
        ]

    return run


ALGORITHMS: dict[str, tuple[torch.dtype, Three]] = {
    "direct fp32": (torch.float32, _backend("cpu")),
    "torch fp32": (torch.float32, _backend("torch")),
    **{f"Winograd, tiles of {tile}": (torch.float32, _winograd(tile)) for tile in (2, 3, 4)},
    "direct bf16": (torch.bfloat16, _backend("cpu")),
    "torch bf16": (torch.bfloat16, _backend("torch")),
}


def _relative(ours: Tensor, truth: Tensor) -> dict[str, float]:
    """Root mean square and largest error over the root mean square of the truth."""
    error, scale = ours.double() - truth, truth.square().mean().sqrt()
    return {"rms": (error.square().mean().sqrt() / scale).item(), "max": (error.abs().max() / scale).item()}


def errors(case: Case) -> dict[str, dict[str, dict[str, float]]]:
    """Per pass and algorithm."""
    torch.manual_seed(0)
    x = torch.randn(1, case.in_channels, case.size, case.size).relu()
    w = torch.randn(case.out_channels, case.in_channels, 3, 3) * (9 * case.in_channels) ** -0.5
    g = torch.randn(1, case.out_channels, case.size, case.size)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in PASSES}
    truths: dict[torch.dtype, list[Tensor]] = {}
    for algorithm, (dtype, run) in ALGORITHMS.items():
        operands = [each.to(dtype) for each in (x, w, g)]
        if dtype not in truths:  # of the operands as the type holds them: their own rounding is not the algorithm's
            truths[dtype] = _backend("torch")(*(each.double() for each in operands), case)
        for name, ours, truth in zip(PASSES, run(*operands, case), truths[dtype], strict=True):
            found[name][algorithm] = _relative(ours, truth)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors(benchmark: Any, case: Case) -> None:
    found = benchmark.pedantic(errors, args=(case,), rounds=1)
    benchmark.extra_info.update(case=str(case), errors=found)
    for per_algorithm in found.values():
        for algorithm, error in per_algorithm.items():
            # A table of wrong results is worth nothing: one product in 576 left out would be an error of 4e-2.
            assert error["rms"] < (1e-2 if "bf16" in algorithm else 1e-4), algorithm
