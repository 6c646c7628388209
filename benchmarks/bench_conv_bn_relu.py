"""conv_bn_relu beside convolution, batch_norm and ReLU of the framework: training step and inference.

    pytest benchmarks/bench_conv_bn_relu.py --benchmark-enable --benchmark-json=benchmarks/results/conv_bn_relu_cpu.json

A training step is the forward pass with batch statistics and the gradients of input, weight and normalisation. Rounds,
layouts and error as in bench_conv2d.py.
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
from atrous_kernels.arguments import describe
from benchmarks.measure import DEVICE, ceilings, interleave, percentiles

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One 3x3 convolution with "same" padding, normalisation and ReLU."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    size: int
    rate: int
    train: bool = True

    def __str__(self) -> str:
        what = "training step" if self.train else "inference"
        return (
            f"{self.name}: {self.batch}x{self.in_channels}->{self.out_channels} {self.size}x{self.size} rate {self.rate} "
            f"conv-bn-relu {what}"
        )


CASES = [Case("block3", 4, 256, 256, 33, rate) for rate in (1, 2, 4)]
CASES += [Case("block1", 4, 64, 64, 65, 1), Case("block4", 2, 512, 512, 33, 4)]
CASES += [Case("block3", 1, 256, 256, 65, 2, train=False), Case("block1", 1, 64, 64, 129, 1, train=False)]


def _framework(x: Tensor, w: Tensor, g: Tensor, b: Tensor, m: Tensor, v: Tensor, case: Case) -> Tensor:
    out = F.batch_norm(F.conv2d(x, w, padding=case.rate, dilation=case.rate), m, v, g, b, case.train)
    return F.relu(out, inplace=True)


def _ours(backend: str) -> Callable[..., Tensor]:
    def call(*tensors: Any) -> Tensor:
        *tensors, case = tensors
        geometry = dict(padding=case.rate, dilation=case.rate)
        return ak.conv_bn_relu(*tensors, **geometry, training=case.train, backend=backend)

    return call


def _call(case: Case, function: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor) -> Callable[[], list[Tensor]]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(case.train) for t in tensors[:4]]
    running = [t.clone() for t in tensors[4:]]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*leaves, *running, case)]

    def both() -> list[Tensor]:
        increment_version(leaves)  # as an optimiser's step does: nobody may keep prepared weights
        out = function(*leaves, *running, case)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    return both if case.train else forward


def _error(results: list[Tensor], truth: list[Tensor]) -> float:
    """Root mean square, not the largest: a value within rounding of zero keeps or loses its whole gradient at the ReLU."""
    return max(
        ((ours.double() - exact).square().mean() / exact.square().mean()).sqrt().item()
        for ours, exact in zip(results, truth, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_bn_relu(benchmark: Any, case: Case) -> None:
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.in_channels, case.size, case.size, device=DEVICE).relu()
    w = torch.randn(case.out_channels, case.in_channels, 3, 3, device=DEVICE) * 0.02
    norm = [torch.rand(case.out_channels, device=DEVICE) + 0.5 for _ in range(4)]
    upstream = torch.randn(case.batch, case.out_channels, case.size, case.size, device=DEVICE)
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    torch._dynamo.reset()
    for layout, memory_format in LAYOUTS.items():
        tensors = [t.contiguous(memory_format=memory_format) for t in (x, w)] + norm
        g = upstream.contiguous(memory_format=memory_format)
        calls[f"ours auto {layout}"] = _call(case, _ours("auto"), tensors, g)
        calls[f"torch {layout}"] = _call(case, _framework, tensors, g)
        calls[f"torch.compile {layout}"] = _call(case, torch.compile(_framework, dynamic=False), tensors, g)
    truth = _call(case, _framework, [t.double() for t in (x, w, *norm)], upstream.double())()
    errors = {name: _error(call(), truth) for name, call in calls.items()}  # also compiles
    times, rounds = interleave(benchmark, calls, "ours auto channels_last")
    geometry = dict(padding=case.rate, dilation=case.rate)
    problem = describe(x, w, **geometry)
    flops, bandwidth = ceilings(torch.float32)
    floor = (3 if case.train else 1) * problem.roofline_seconds(flops, bandwidth)
    benchmark.extra_info.update(
        case=str(case),
        name=case.name,
        train=case.train,
        rounds=rounds,
        chosen={"any": ak.explain("conv_bn_relu", x, w, training=case.train, **geometry).chosen},
        floor_ms=floor * 1e3,
        candidates={name: {**percentiles(t), "error": errors[name]} for name, t in times.items()},
    )
    # fp32 sums of 4,608 products at most, and a ReLU's edge crossed by one value in a million.
    assert max(errors.values()) < 2e-3, errors
