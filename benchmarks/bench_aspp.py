"""The ASPP module of DeepLabv3 beside its composition in the framework: inference and training step.

    pytest benchmarks/bench_aspp.py --benchmark-enable --benchmark-json=benchmarks/results/aspp_cpu.json

The peer is torchvision's module: branches, bilinear interpolation of the pooled pixel, concatenation, projection. No dropout,
so that results can be compared. Rounds, layouts and error as in bench_conv2d.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

import atrous_kernels as ak
from atrous_kernels.arguments import describe
from benchmarks.measure import DEVICE, ceilings, interleave, percentiles

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One module at one size."""

    batch: int
    in_channels: int
    size: int
    rates: tuple[int, ...]
    train: bool
    out_channels: int = 256

    def __str__(self) -> str:
        rates = "/".join(map(str, self.rates))
        what = "training step" if self.train else "inference"
        return f"ASPP {self.batch}x{self.in_channels}->{self.out_channels} {self.size}x{self.size} rates {rates} {what}"


CASES = [
    Case(1, 2048, 33, (6, 12, 18), train=False),
    Case(1, 2048, 65, (12, 24, 36), train=False),
    Case(2, 2048, 33, (6, 12, 18), train=True),
    Case(4, 320, 33, (6, 12, 18), train=True),
]


class Framework(nn.Module):
    """torchvision's ASPP without dropout, in the framework's layers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.out_channels

        def layer(channels: int, kernel: int = 1, rate: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(channels, width, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False)
            return [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]

        branches = [nn.Sequential(*layer(case.in_channels))]
        branches += [nn.Sequential(*layer(case.in_channels, 3, rate)) for rate in case.rates]
        branches += [nn.Sequential(nn.AdaptiveAvgPool2d(1), *layer(case.in_channels))]
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(*layer(len(branches) * width))

    def forward(self, x: Tensor) -> Tensor:
        *local, pooled = [branch(x) for branch in self.convs]
        pooled = F.interpolate(pooled, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*local, pooled], dim=1))


def _call(case: Case, module: nn.Module, x: Tensor, g: Tensor) -> Callable[[], list[Tensor]]:
    x = x.detach().requires_grad_(case.train)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [module(x)]

    def both() -> list[Tensor]:
        increment_version(list(module.parameters()))  # as an optimiser's step does: nobody may keep prepared weights
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out, (x, *module.parameters()), g)]

    return both if case.train else forward


def _error(results: list[Tensor], truth: list[Tensor]) -> float:
    """Root mean square of the output: gradients through a batch norm over two pooled pixels differ by the ReLU's side."""
    return ((results[0].double() - truth[0]).square().mean() / truth[0].square().mean()).sqrt().item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_aspp(benchmark: Any, case: Case) -> None:
    torch.manual_seed(0)
    ours = ak.nn.ASPP(case.in_channels, case.out_channels, case.rates, dropout=0.0).to(DEVICE).train(case.train)
    exact = Framework(case).to(DEVICE).train(case.train)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(case.batch, case.in_channels, case.size, case.size, device=DEVICE).relu()
    g = torch.randn(case.batch, case.out_channels, case.size, case.size, device=DEVICE)
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    torch._dynamo.reset()
    for layout, memory_format in LAYOUTS.items():
        a, b = (t.contiguous(memory_format=memory_format) for t in (x, g))
        modules = []
        for kind in (ak.nn.ASPP, Framework):
            if kind is Framework:
                module: nn.Module = Framework(case)
            else:
                module = ak.nn.ASPP(case.in_channels, case.out_channels, case.rates, dropout=0.0)
            module.load_state_dict(ours.state_dict())
            modules.append(module.to(DEVICE, memory_format=memory_format).train(case.train))
        calls[f"ours auto {layout}"] = _call(case, modules[0], a, b)
        calls[f"torch {layout}"] = _call(case, modules[1], a, b)
        calls[f"torch.compile {layout}"] = _call(case, torch.compile(modules[1], dynamic=False), a, b)
    truth = _call(case, exact.double(), x.double(), g.double())()
    errors = {name: _error(call(), truth) for name, call in calls.items()}  # also compiles
    times, rounds = interleave(benchmark, calls, "ours auto channels_last")
    flops, bandwidth = ceilings(torch.float32)
    weights = [branch[0].weight for branch in ours.convs[:-1]]
    rates = (1, *case.rates)
    problems = [
        describe(x, w, padding=r * (w.shape[2] // 2), dilation=r) for w, r in zip(weights, rates, strict=True)
    ]
    passes = 3 if case.train else 1
    benchmark.extra_info.update(
        case=str(case),
        name="ASPP",
        train=case.train,
        rounds=rounds,
        valid_gflop=passes * sum(p.valid_flops for p in problems) / 1e9,
        floor_ms=passes * sum(p.roofline_seconds(flops, bandwidth) for p in problems) * 1e3,
        candidates={name: {**percentiles(t), "error": errors[name]} for name, t in times.items()},
    )
    # fp32 sums of 18,432 products at most, then a batch norm over as few as two pooled pixels.
    assert max(errors.values()) < 1e-3, errors
