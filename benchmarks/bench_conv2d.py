"""conv2d beside what a user would pick instead, on the shapes of segmentation networks.

    pytest benchmarks/bench_conv2d.py --benchmark-enable --benchmark-json=benchmarks/results/conv2d_cpu.json

Every candidate of a case runs once per round, in a random order, in one process with the same threads: our automatic
choice, our CPU kernels by name, the framework's convolution and torch.compile of it, each in both memory layouts. The time of a
candidate is the median over rounds. Error is the largest difference from float64, relative to the root mean square of the
float64 result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

import atrous_kernels as ak
from atrous_kernels.ops.conv2d import problem_of
from atrous_kernels.ops.winograd import can_run
from benchmarks.measure import DEVICE, ceilings, interleave, percentiles

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One convolution of a segmentation network, "same" padding."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    size: int
    rate: int
    backward: bool = False
    dtype: torch.dtype = torch.float32
    depthwise: bool = False
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        kind = "depthwise " if self.depthwise else ""
        width = f"{self.in_channels}" if self.depthwise else f"{self.in_channels}->{self.out_channels}"
        what = "forward+backward" if self.backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return (
            f"{self.name}: {kind}{self.kernel}x{self.kernel} {self.batch}x{width} {self.size}x{self.size}"
            f"{stride} rate {self.rate} {dtype} {what}"
        )


def _cases() -> list[Case]:
    cases = []
    for size, rates in ((33, (6, 12, 18)), (65, (12, 24, 36))):
        cases += [Case("ASPP", 1, 2048, 256, size, rate) for rate in rates]
        # About the same work at both sizes.
        cases += [Case("ASPP", 2 if size == 33 else 1, 2048, 256, size, rate, backward=True) for rate in rates]
    for name, width in (("block3", 256), ("block4", 512)):
        cases += [Case(name, 1, width, width, size, rate) for size in (33, 65) for rate in (1, 2, 4)]
    cases += [Case("block4", 2, 512, 512, 33, rate, backward=True) for rate in (2, 4)]
    cases += [Case("ASPP", 1, 2048, 256, 33, rate, dtype=torch.bfloat16) for rate in (6, 18)]
    cases += [Case("projection", 1, 1280, 256, 33, 1, kernel=1)]
    for backward in (False, True):
        cases += [Case("separable ASPP", 1, 256, 256, 65, rate, backward, depthwise=True) for rate in (12, 36)]
        cases += [Case("Xception", 1, 728, 728, 33, 2, backward, depthwise=True)]
        cases += [Case("EfficientNet-Lite0", 8, 144, 144, 80, 1, backward, depthwise=True, kernel=5)]
        cases += [Case("EfficientNet-Lite0", 8, 144, 144, 80, 1, backward, depthwise=True, kernel=5, stride=2)]
    return cases


def gpu_cases() -> list[Case]:
    """Training batches in bf16; rate 1 first: where the framework's time does not fall with the rate, it skips no taps."""
    bf16 = torch.bfloat16
    cases = [Case("ASPP", 16, 2048, 256, 33, rate, dtype=bf16) for rate in (1, 6, 12, 18)]
    cases += [Case("ASPP", 16, 2048, 256, 33, rate, True, bf16) for rate in (6, 18)]
    cases += [Case("block4", 16, 512, 512, 33, rate, dtype=bf16) for rate in (2, 4, 8, 16)]
    for backward in (False, True):
        cases += [Case("depthwise", 16, 2048, 2048, 33, rate, backward, bf16, depthwise=True) for rate in (2, 6, 12, 18)]
    return cases


CASES = _cases() if DEVICE == "cpu" else gpu_cases()
BACKENDS = ("auto", "winograd", "cpu") if DEVICE == "cpu" else ("auto", "triton", "cuda")


def call_of(case: Case, function: Callable[..., Tensor], x: Tensor, w: Tensor, g: Tensor) -> Callable[[], list[Tensor]]:
    """A call of the forward pass, or of forward and backward, that gives all results."""
    padding = case.rate * (case.kernel - 1) // 2
    groups = case.in_channels if case.depthwise else 1

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(x, w, None, case.stride, padding, case.rate, groups)]

    def both() -> list[Tensor]:
        increment_version(w)  # as an optimiser's step does: no candidate may keep prepared weights
        out = function(x, w, None, case.stride, padding, case.rate, groups)
        return [out.detach(), *torch.autograd.grad(out, (x, w), g)]

    return both if case.backward else forward


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Input, weight, output gradient, and the problem in numbers."""
    torch.manual_seed(0)
    groups = case.in_channels if case.depthwise else 1
    padding = case.rate * (case.kernel - 1) // 2
    x = torch.randn(case.batch, case.in_channels, case.size, case.size).relu()
    w = torch.randn(case.out_channels, case.in_channels // groups, case.kernel, case.kernel) * 0.02
    x, w = x.to(DEVICE, case.dtype), w.to(DEVICE, case.dtype)
    geometry = ((case.stride,) * 2, (padding,) * 2, (case.rate,) * 2, groups)
    problem = problem_of(x.shape, w.shape, geometry, x, False)
    g = torch.randn(case.batch, case.out_channels, *problem.out_size).to(DEVICE, case.dtype)
    return x, w, g, problem


def candidates(case: Case) -> tuple[dict[str, Callable[[], list[Tensor]]], list[Tensor], Any]:
    """Per name a call; the float64 truth; the problem in numbers."""
    x, w, g, problem = operands(case)
    calls = {}
    torch._dynamo.reset()
    for layout, memory_format in LAYOUTS.items():
        a, b, c = (t.contiguous(memory_format=memory_format) for t in (x, w, g))
        for t in (a, b):
            t.requires_grad_(case.backward)
        for backend in BACKENDS:
            if backend == "winograd" and can_run(problem) is not None:
                continue
            calls[f"ours {backend} {layout}"] = call_of(case, ours(backend), a, b, c)
        calls[f"torch {layout}"] = call_of(case, F.conv2d, a, b, c)
        calls[f"torch.compile {layout}"] = call_of(case, torch.compile(F.conv2d, dynamic=False), a, b, c)
    x, w, g = x.double().requires_grad_(case.backward), w.double().requires_grad_(case.backward), g.double()
    exact = call_of(case, F.conv2d, x, w, g)
    return calls, exact(), problem


def ours(backend: str) -> Callable[..., Tensor]:
    """Our convolution on one backend."""

    def call(*arguments: Any) -> Tensor:
        return ak.conv2d(*arguments, backend=backend)

    return call


def _error(results: list[Tensor], truth: list[Tensor]) -> float:
    """The worst of output and gradients."""
    return max(
        ((ours.double() - exact).abs().max() / exact.square().mean().sqrt()).item()
        for ours, exact in zip(results, truth, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d(benchmark: Any, case: Case) -> None:
    torch.backends.cudnn.benchmark = True  # the framework's best setting; nothing on the CPU
    calls, truth, problem = candidates(case)
    errors = {name: _error(call(), truth) for name, call in calls.items()}  # also compiles
    times, rounds = interleave(benchmark, calls, "ours auto channels_last", budget=4.0)
    passes = 3 if case.backward else 1
    flops, bandwidth = ceilings(case.dtype)
    floor = passes * problem.roofline_seconds(flops, bandwidth)
    benchmark.extra_info.update(
        case=str(case),
        name=case.name,
        backward=case.backward,
        dtype=str(case.dtype).removeprefix("torch."),
        rounds=rounds,
        chosen={layout: ak.explain("conv2d", *_shapes(case, memory_format)).chosen for layout, memory_format in LAYOUTS.items()},
        dense_gflop=passes * problem.dense_flops / 1e9,
        valid_gflop=passes * problem.valid_flops / 1e9,
        floor_ms=floor * 1e3,
        peak_gflops=flops / 1e9,
        copy_gbytes_per_second=bandwidth / 1e9,
        candidates={
            name: {
                **percentiles(t),
                "error": errors[name],
            }
            for name, t in times.items()
        },
    )
    # A benchmark of wrong results is worth nothing: fp32 sums of at most 18,432 products, bf16 rounds the result to 8 bits
    # and, in gradients, sums of it.
    assert max(errors.values()) < (1e-4 if case.dtype is torch.float32 else 5e-2), errors


def _shapes(case: Case, memory_format: torch.memory_format) -> tuple[Any, ...]:
    groups = case.in_channels if case.depthwise else 1
    options: Any = {"dtype": case.dtype, "device": DEVICE, "memory_format": memory_format}
    x = torch.empty(case.batch, case.in_channels, case.size, case.size, **options)
    w = torch.empty(case.out_channels, case.in_channels // groups, case.kernel, case.kernel, **options)
    return x, w, None, case.stride, case.rate * (case.kernel - 1) // 2, case.rate, groups
