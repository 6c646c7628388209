"""Pyramid pooling, the head of PSPNet and PSPNet-ResNet50 against the plain modules of the framework at their best settings.

    pytest benchmarks/bench_pyramid_pool.py --benchmark-enable --benchmark-json=benchmarks/results/pyramid_pool_cpu.json

The plain form is the authors': per level adaptive pooling, 1x1 convolution, BatchNorm, ReLU, bilinear upsampling; then the
concatenation and, for the head, the convolutions over it. Same weights, same input, contiguous and channels-last, eager and
compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

import atrous_kernels as ak
from benchmarks.measure import interleave, percentiles
from segmodels import create_model
from segmodels.engine.build import keep_freed_memory

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A module at one size; ``train`` is forward and backward to the input and every parameter."""

    module: str
    train: bool
    batch: int = 2
    channels: int = 2048
    size: int = 60
    width: int = 512

    def __str__(self) -> str:
        what = "training step" if self.train else "inference"
        return f"{self.module} {self.batch}x{self.channels}x{self.size}x{self.size} to {self.width}, {what}"

    def build(self) -> torch.nn.Module:
        if self.module == "PyramidPooling":
            return ak.nn.PyramidPooling(self.channels, self.channels // 4)
        if self.module == "PSPNet50":
            return Network(create_model("pspnet_resnet50"))
        return ak.nn.PSPHead(self.channels, self.width, 21, dropout=0.0)


CASES = [Case(module, train) for module in ("PyramidPooling", "PSPHead") for train in (False, True)]
CASES += [Case("PSPNet50", False, 1, 3, 473, 21)]


class Network(torch.nn.Module):
    """The logits at the size of the image alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


class PlainPooling(torch.nn.Module):
    """Level by level."""

    def __init__(self, source: ak.nn.PyramidPooling) -> None:
        super().__init__()
        self.features = source.features
        self.align_corners = source.align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        up = [F.interpolate(level(x), size, mode="bilinear", align_corners=self.align_corners) for level in self.features]
        return torch.cat([x, *up], 1)


def _plain(module: torch.nn.Module) -> torch.nn.Module:
    """The same parameters in the framework's modules."""
    module = copy.deepcopy(module)
    for child in module.modules():
        if isinstance(child, ak.nn.Conv2d):
            child.__class__ = torch.nn.Conv2d
    if isinstance(module, ak.nn.PSPHead):
        return torch.nn.Sequential(PlainPooling(module.ppm), module.cls)
    if isinstance(module, Network):
        module.model.classifier = _plain(module.model.classifier)
        return module
    assert isinstance(module, ak.nn.PyramidPooling)
    return PlainPooling(module)


def _call(module: Callable[..., Tensor], parameters: list[Tensor], x: Tensor, grad: Tensor, train: bool) -> Callable[[], Any]:
    def forward() -> list[Tensor]:
        with torch.inference_mode():
            return [module(x)]

    def both() -> list[Tensor]:
        increment_version(parameters)  # as an optimiser's step does: nobody may keep prepared weights
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *parameters], grad)]

    return both if train else forward


def candidates(case: Case) -> tuple[dict[str, Callable[[], list[Tensor]]], list[Tensor]]:
    """Per name a call; the float64 truth."""
    torch.manual_seed(0)
    source = case.build().train(case.train)
    x = torch.randn(case.batch, case.channels, case.size, case.size).relu()
    with torch.no_grad():
        grad = torch.randn_like(source(x)) / case.size
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    torch._dynamo.reset()
    for layout, memory_format in LAYOUTS.items():
        ours = copy.deepcopy(source).to(memory_format=memory_format)
        plain = _plain(source).to(memory_format=memory_format)
        a, g = (t.contiguous(memory_format=memory_format) for t in (x, grad))
        a = a.detach().requires_grad_(case.train)
        calls[f"ours auto {layout}"] = _call(ours, list(ours.parameters()), a, g, case.train)
        calls[f"torch {layout}"] = _call(plain, list(plain.parameters()), a, g, case.train)
        compiled = torch.compile(plain, dynamic=False)
        calls[f"torch.compile {layout}"] = _call(compiled, list(plain.parameters()), a, g, case.train)
    exact = _plain(source).double()
    wide = x.double().requires_grad_(case.train)
    return calls, _call(exact, list(exact.parameters()), wide, grad.double(), case.train)()


def _error(results: list[Tensor], truth: list[Tensor]) -> float:
    """The worst of output and gradients, relative to each one's root mean square."""
    return max(
        ((ours.double() - exact).abs().max() / exact.square().mean().sqrt()).item()
        for ours, exact in zip(results, truth, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pyramid(benchmark: Any, case: Case) -> None:
    keep_freed_memory()  # as the training command does, for every candidate alike
    calls, truth = candidates(case)
    errors, failures = {}, {}
    for name, call in list(calls.items()):  # also compiles
        try:
            errors[name] = _error(call(), truth)
        except torch._inductor.exc.InductorError as error:  # the framework's compiler gave up on the plain form
            failures[name] = str(error).strip().splitlines()[0]
            del calls[name]
    times, rounds = interleave(benchmark, calls, "ours auto channels_last", budget=30.0)
    benchmark.extra_info.update(
        case=str(case),
        name=case.module,
        backward=case.train,
        rounds=rounds,
        failures=failures,
        candidates={name: percentiles(t) | {"error": errors[name]} for name, t in times.items()},
    )
    # BatchNorm over two images and one bin divides by the difference of two values, so a gradient has no fixed relative
    # error; ours must be as near to the float64 truth as the framework's own.
    theirs = max(error for name, error in errors.items() if name.startswith("torch"))
    assert max(errors.values()) < max(1e-3, 4 * theirs), errors
