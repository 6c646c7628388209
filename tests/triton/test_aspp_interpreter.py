"""The branches of ASPP in one launch, executed by Triton's interpreter, against the framework in float64."""

from __future__ import annotations

from typing import Any

import interpreted
import pytest
import torch
import torch.nn.functional as F
from conftest import Interpret
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels.ops.aspp import ConvBN

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Channels in, (channels out, kernel, rate) of each branch, height and width.
PROBLEMS: dict[str, tuple[int, list[tuple[int, tuple[int, int], tuple[int, int]]], tuple[int, int]]] = {
    "DeepLabv3": (16, [(16, (1, 1), (1, 1)), *((16, (3, 3), (rate, rate)) for rate in (2, 4, 6))], (9, 9)),
    "ragged": (5, [(7, (3, 3), (2, 3)), (3, (1, 1), (1, 1)), (40, (3, 5), (7, 1))], (8, 11)),
    "one branch": (3, [(4, (3, 3), (5, 5))], (6, 5)),
    "eight branches": (4, [(5, (3, 1), (rate, 1)) for rate in range(1, 9)], (5, 3)),
}
# float32 runs everything; the other dtypes differ in loads and in the rounding of results only.
RUNS = [(name, torch.float32) for name in PROBLEMS] + [("ragged", dtype) for dtype in (torch.bfloat16, torch.float16)]
# A rounding of the result, where it has 16 bits (the interpreter cuts bfloat16 off); float32 sums at most 9 x 16 products.
TOLERANCE = {
    torch.float32: dict(rtol=1e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=8e-3, atol=1e-3),
    torch.float16: dict(rtol=1e-3, atol=1e-3),
}


def _tensors(name: str, dtype: torch.dtype, layout: str) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
    channels, branches, size = PROBLEMS[name]
    x = torch.randn(2, channels, *size)
    weights = [torch.randn(out, channels, *kernel) / 2 for out, kernel, _ in branches]
    x, *weights = (t.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for t in (x, *weights))
    return x, weights, [rate for *_, rate in branches]


def _truth(x: Tensor, weights: list[Tensor], rates: list[tuple[int, int]]) -> Tensor:
    maps = []
    for weight, rate in zip(weights, rates, strict=True):
        padding = [r * (k // 2) for r, k in zip(rate, weight.shape[2:], strict=True)]
        maps.append(F.conv2d(x.double(), weight.double(), padding=padding, dilation=rate))
    return torch.cat(maps, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_branches(interpret: Interpret, name: str, dtype: torch.dtype, layout: str) -> None:
    x, weights, rates = _tensors(name, dtype, layout)
    truth = _truth(x, weights, rates)
    first = interpret(interpreted.call, "aspp", "aspp_branches", x, weights, rates)
    maps, mean, moment = first
    torch.testing.assert_close(maps.double(), truth, **TOLERANCE[dtype])
    assert maps.is_contiguous(memory_format=LAYOUTS[layout])
    whole = maps.double()
    torch.testing.assert_close(mean.double(), whole.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    var = whole.var((0, 2, 3), correction=0)
    torch.testing.assert_close(moment.double() / whole[:, 0].numel(), var, rtol=1e-5, atol=1e-5)
    if name != "ragged":
        return
    for ours, again in zip(first, interpret(interpreted.call, "aspp", "aspp_branches", x, weights, rates), strict=True):
        assert torch.equal(ours, again), "the same inputs, other bits"


@pytest.mark.parametrize(("name", "affine"), [("DeepLabv3", True), ("ragged", True), ("ragged", False), ("eight branches", True)])
def test_branches_normalised(interpret: Interpret, name: str, affine: bool) -> None:
    x, weights, rates = _tensors(name, torch.float32, "nhwc")
    truth = _truth(x, weights, rates)
    gain, bias, mean = torch.randn(3, truth.shape[1]).unbind()
    norm = [gain if affine else None, bias if affine else None, mean, torch.rand(truth.shape[1]) + 0.5]
    arguments = (x, weights, rates, norm, 1e-3, 0.0, 6.0)
    maps = interpret(interpreted.call, "aspp", "aspp_branches_act", *arguments)
    wide = [None if vector is None else vector.double() for vector in norm]
    expected = F.relu6(F.batch_norm(truth, wide[2], wide[3], wide[0], wide[1], eps=1e-3))
    torch.testing.assert_close(maps.double(), expected, **TOLERANCE[torch.float32])


def test_more_branches_than_the_kernel_has_weights(interpret: Interpret) -> None:
    weights = [torch.zeros(1, 2, 1, 1)] * 9
    with pytest.raises(ValueError, match="expected 1 to 8 branches, but got 9"):
        interpret(interpreted.call, "aspp", "aspp_branches", torch.zeros(1, 2, 3, 3), weights, [(1, 1)] * 9)


MODULES = [(options, training) for options in ({}, dict(image_pooling=False), dict(affine=False)) for training in (True, False)]
MODULES.append((dict(rates=tuple(range(1, 9)), image_pooling=False), False))


@pytest.mark.parametrize(("options", "training"), MODULES, ids=str)
def test_module(interpret: Interpret, training: bool, options: dict[str, Any]) -> None:
    # The composition without Triton, in float64, with the same weights.
    ours, kernels = interpret(interpreted.aspp_module, "triton", torch.float32, training, options)
    truth, _ = interpreted.aspp_module("reference", torch.float64, training, options)
    together = len(options.get("rates", ())) < 8  # and a 1x1 branch
    assert (kernels.count("_branches") == 1) == together
    if together:
        # The 1x1 of the pooled vector, its share of the projection, and the projection.
        assert kernels.count("_correlate") == (3 if options.get("image_pooling", True) else 1)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        # Normalised twice, over 2 x 63 values or 2 of them: a few digits are lost where these lie close together.
        error = (ours[name].double() - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-6)
        assert error < 1e-3, name


def test_gradients_of_a_training_step(interpret: Interpret) -> None:
    ours, _ = interpret(interpreted.aspp_module, "triton", torch.float32, True, {}, True)
    truth, _ = interpreted.aspp_module("reference", torch.float64, True, {}, True)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        error = (ours[name].double() - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-6)
        assert error < 1e-3, name


def test_opcheck(interpret: Interpret) -> None:
    interpret(interpreted.opcheck_aspp)


def test_explain_names_the_reason() -> None:
    layer = ConvBN(torch.empty(4, 3, 3, 3), *[torch.ones(4)] * 4)
    projection = ConvBN(torch.empty(5, 4, 1, 1), *[torch.ones(5)] * 4)
    explanation = ak.explain("aspp", torch.empty(2, 3, 6, 6), [layer], projection, None)
    reasons = {choice.name: choice.reason for choice in explanation.choices}
    assert "compiles for CUDA devices, not for cpu" in reasons["triton"]
