"""The epilogues of the Triton convolutions, executed by Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import interpreted
import pytest
import torch
from conftest import Interpret
from torch import Tensor

from atrous_kernels.problem import ConvProblem
from atrous_kernels.reference import conv2d as reference_conv2d
from atrous_kernels.reference import conv_bn_relu as reference

INF = float("inf")
BOUNDS = {"none": (-INF, INF), "relu": (0.0, INF), "relu6": (0.0, 6.0)}
PROBLEMS = {
    "dense": ConvProblem(2, 5, 7, (9, 8), (3, 3), padding=(2, 2), dilation=(2, 2)),
    "whole blocks": ConvProblem(2, 16, 16, (6, 5), (3, 3), padding=(1, 1)),
    "several tiles": ConvProblem(3, 3, 70, (13, 11), (3, 3), padding=(4, 4), dilation=(4, 4)),
    "strided groups": ConvProblem(2, 6, 9, (7, 6), (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1), groups=3),
    "depthwise": ConvProblem(2, 6, 6, (9, 8), (3, 3), padding=(3, 3), dilation=(3, 3), groups=6),
    "channel multiplier": ConvProblem(1, 2, 6, (3, 4), (2, 3), padding=(1, 2), groups=2),
    "no valid tap": ConvProblem(1, 3, 4, (3, 3), (2, 2), stride=(4, 4), padding=(6, 6), dilation=(9, 9)),
    "empty batch": ConvProblem(0, 3, 4, (5, 5), (3, 3)),
}  # fmt: skip
# float32: sums of at most 9 x 16 products in another order, after a division by a deviation of 0.7 at least. 16 bits: the truth
# has their inputs, so what remains is one rounding of the result; the interpreter cuts bfloat16 off: 2**-7, and 2**-11, relative.
TOLERANCE = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.bfloat16: dict(rtol=8e-3, atol=1e-3),
    torch.float16: dict(rtol=1e-3, atol=1e-3),
}
# float32 runs everything; the other dtypes differ in loads and in the rounding of the result only.
RUNS = [(name, torch.float32) for name in PROBLEMS]
RUNS += [("dense", torch.bfloat16), ("dense", torch.float16), ("depthwise", torch.bfloat16)]


def _geometry(problem: ConvProblem) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    return problem.stride, problem.padding, problem.dilation, problem.groups


def tensors_of(problem: ConvProblem, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Input, weight and (weight, bias, mean, variance) of the normalisation."""
    x = torch.randn(problem.batch, problem.in_channels, *problem.in_size)
    weight = torch.randn(problem.out_channels, problem.in_channels // problem.groups, *problem.kernel)
    norm = [torch.randn(problem.out_channels) for _ in range(3)]
    to = dict(dtype=dtype, memory_format=layout)
    return x.to(**to), weight.to(**to), [*norm, torch.rand(problem.out_channels) + 0.5]


def _truth(x: Tensor, weight: Tensor, norm: list, residual: Tensor | None, eps: float, low: float, high: float, *geometry):
    out = reference_conv2d.conv2d(x.double(), weight.double(), None, *geometry)
    wide = [None if vector is None else vector.double() for vector in norm]
    return reference.conv_bn_act(out, wide, None if residual is None else residual.double(), eps, low, high)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_sums_are_finished(interpret: Interpret, name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    problem = PROBLEMS[name]
    x, weight, norm = tensors_of(problem, dtype, layout)
    residual = torch.randn(problem.batch, problem.out_channels, *problem.out_size).to(dtype)
    epilogues = [("none", None), ("relu", residual.contiguous(memory_format=layout)), ("relu6", residual)]
    for activation, add in epilogues if dtype is torch.float32 else epilogues[-1:]:
        arguments = (x, weight, norm, add, 1e-3, *BOUNDS[activation], *_geometry(problem))
        result = interpret(interpreted.call, "conv_bn_act", "conv_bn_act", *arguments)
        assert result.dtype is dtype
        torch.testing.assert_close(result.double(), _truth(*arguments), **TOLERANCE[dtype])
    if name in ("several tiles", "depthwise"):
        again = interpret(interpreted.call, "conv_bn_act", "conv_bn_act", *arguments)
        assert torch.equal(result, again), "the same inputs, other bits"


@pytest.mark.parametrize("name", ["dense", "depthwise"])
def test_absent_parts(interpret: Interpret, name: str) -> None:
    # No scale, no shift; a residual that is one value per image and channel, and one of another dtype.
    problem = PROBLEMS[name]
    x, weight, (_, _, mean, var) = tensors_of(problem, torch.float32, torch.channels_last)
    pooled = torch.randn(problem.batch, problem.out_channels, 1, 1).expand(-1, -1, *problem.out_size)
    for residual in (None, pooled, pooled.bfloat16()):
        arguments = (x, weight, [None, None, mean, var], residual, 1e-5, *BOUNDS["relu"], *_geometry(problem))
        result = interpret(interpreted.call, "conv_bn_act", "conv_bn_act", *arguments)
        torch.testing.assert_close(result.double(), _truth(*arguments), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["dense", "depthwise"])
def test_nan_passes_the_activation(interpret: Interpret, name: str) -> None:
    problem = PROBLEMS[name]
    x, weight, norm = tensors_of(problem, torch.float32, torch.channels_last)
    x[0, 0, 4, 4] = torch.nan
    arguments = (x, weight, norm, None, 1e-5, *BOUNDS["relu6"], *_geometry(problem))
    result = interpret(interpreted.call, "conv_bn_act", "conv_bn_act", *arguments)
    assert torch.equal(result.isnan(), _truth(*arguments).isnan())
    assert result.isnan().any()


@pytest.mark.parametrize("activation", BOUNDS)
def test_public_function_takes_one_launch(interpret: Interpret, activation: str) -> None:
    problem = PROBLEMS["dense"]
    x, weight, norm = tensors_of(problem, torch.float32, torch.channels_last)
    residual = torch.randn(problem.batch, problem.out_channels, *problem.out_size)
    options = dict(padding=problem.padding, dilation=problem.dilation, activation=activation, residual=residual)
    result, *_ = interpret(interpreted.public, "conv_bn_relu", [x, weight, *norm], options, 0, [])
    arguments = (x, weight, norm, residual, 1e-5, *BOUNDS[activation], *_geometry(problem))
    torch.testing.assert_close(result.double(), _truth(*arguments), **TOLERANCE[torch.float32])
    assert interpret(interpreted.launches_of, "conv_bn_act", "plan_conv_bn_act", *arguments) == ["_correlate"]
