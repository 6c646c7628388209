"""The Triton passes of a training step of conv-bn-relu, executed by Triton's interpreter, against the float64 reference."""

from __future__ import annotations

from typing import Any

import interpreted
import pytest
import torch
import torch.nn.functional as F
from conftest import Interpret
from test_conv_bn_act_interpreter import BOUNDS, PROBLEMS, tensors_of
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels.problem import ConvProblem
from atrous_kernels.reference import conv2d as reference_conv2d
from atrous_kernels.reference import conv_bn_relu as reference

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = {
    "ragged": (2, 5, 7, 6),
    "blocks of channels": (2, 70, 5, 9),
    "several parts": (1, 2, 47, 50),
    "one value": (1, 1, 1, 1),
    "one pixel": (5, 35, 1, 1),
    "no image": (0, 3, 4, 4),
}
# float32 runs everything; the other dtypes differ in loads and in the rounding of results only.
PASSES = [(shape, torch.float32) for shape in SHAPES]
PASSES += [("ragged", torch.bfloat16), ("ragged", torch.float16)]
CONVOLUTIONS = [(name, torch.float32) for name in PROBLEMS]
CONVOLUTIONS += [("dense", torch.bfloat16), ("dense", torch.float16), ("depthwise", torch.bfloat16)]
# A rounding of the result, where it has 16 bits (the interpreter cuts bfloat16 off). float32 differs by the order of sums of a
# few thousand terms.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _double(values: Any) -> Any:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def _call(interpret: Interpret, name: str, *arguments: Any) -> Any:
    return interpret(interpreted.call, "conv_bn_relu", name, *arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dtype"), PASSES, ids=str)
def test_passes(interpret: Interpret, shape: str, dtype: torch.dtype, layout: str) -> None:
    size = SHAPES[shape]
    x, grad = ((torch.randn(size) + 1).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    mean, scale, shift, slope, offset = torch.randn(5, size[1]).unbind()
    elementwise = dict(rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    found = _call(interpret, "batch_norm_statistics", x)
    for ours, truth in zip(found, reference.batch_norm_statistics(x.double()), strict=True):
        assert ours.dtype is torch.float32
        # Inputs are exact whatever their dtype, so only sums of float32 err.
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)
    for bounds in BOUNDS.values() if shape == "ragged" else [BOUNDS["relu6"]]:
        norm = (x, mean, scale, shift, *bounds)
        ours = _call(interpret, "batch_norm_act", *norm)
        assert ours.stride() == x.stride()
        torch.testing.assert_close(ours.double(), reference.batch_norm_act(*_double(norm)), **elementwise)
        # Where y meets a bound to the last bit, its gradient may go either way: such values are kept out of the sums.
        y = reference.batch_norm_act(*_double((x, mean, scale, shift, *BOUNDS["none"])))
        safe = grad.masked_fill(((y.abs() < 1e-5) | ((y - 6).abs() < 1e-5)), 0).contiguous(memory_format=LAYOUTS[layout])
        sums = _call(interpret, "batch_norm_act_sums", safe, *norm)
        for ours, truth in zip(sums, reference.batch_norm_act_sums(*_double((safe, *norm))), strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-3)  # terms of up to 10 cancel
        arguments = (safe, *norm[:4], slope, offset, *bounds)
        ours = _call(interpret, "batch_norm_act_input", *arguments)
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.double(), reference.batch_norm_act_input(*_double(arguments)), **elementwise)


def test_a_view_is_refused(interpret: Interpret) -> None:
    with pytest.raises(ValueError, match="expected dense NCHW or NHWC memory, but got strides"):
        _call(interpret, "batch_norm_statistics", torch.randn(2, 4, 6, 6)[:, ::2])
    x, vector = torch.randn(2, 4, 6, 6), torch.ones(4)
    other = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"grad: expected the sizes and strides of input"):
        _call(interpret, "batch_norm_act_sums", other, x, vector, vector, vector, *BOUNDS["relu"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "dtype"), CONVOLUTIONS, ids=str)
def test_the_convolution_takes_its_statistics(interpret: Interpret, name: str, dtype: torch.dtype, layout: str) -> None:
    problem = PROBLEMS[name]
    x, weight, _ = tensors_of(problem, dtype, LAYOUTS[layout])
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    first = _call(interpret, "conv2d_statistics", x, weight, *geometry)
    output, *statistics = first
    truth = reference_conv2d.conv2d(*_double((x, weight)), None, *geometry)
    torch.testing.assert_close(output.double(), truth, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    # Of the output as it is written, which is what the backward pass reads.
    for ours, theirs in zip(statistics, reference.batch_norm_statistics(output.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    if name not in ("several tiles", "depthwise"):
        return
    for ours, again in zip(first, _call(interpret, "conv2d_statistics", x, weight, *geometry), strict=True):
        assert torch.equal(ours, again), "the same inputs, other bits"


@pytest.mark.parametrize("distance", [1e2, 1e4])
def test_a_mean_far_from_zero_keeps_its_digits(interpret: Interpret, distance: float) -> None:
    x = torch.randn(3, 6, 23, 17) + distance * torch.tensor([1.0, -1, 0, 1, -1, 0])[:, None, None]
    identity = torch.eye(6)[:, :, None, None]
    for layout in LAYOUTS.values():
        values = x.contiguous(memory_format=layout)
        truth = reference.batch_norm_statistics(values.double())
        (_, mean, moment) = _call(interpret, "conv2d_statistics", values, identity, (1, 1), (0, 0), (1, 1), 1)
        for found in ((mean, moment), _call(interpret, "batch_norm_statistics", values)):
            # A few units in the last place of the mean, 1e4 deviations: the moment about it errs by their squares alone.
            torch.testing.assert_close(found[0].double(), truth[0], rtol=5e-7, atol=1e-6)
            torch.testing.assert_close(found[1].double(), truth[1], rtol=1e-4, atol=0)


STEPS = {
    "dense": PROBLEMS["dense"],
    "strided groups": PROBLEMS["strided groups"],
    "depthwise": PROBLEMS["depthwise"],
    "one channel": ConvProblem(2, 3, 1, (6, 7), (3, 3), padding=(1, 1)),
}
RUNS = [("dense", "relu6", training, layout) for training in (True, False) for layout in LAYOUTS]
RUNS += [("dense", activation, True, "nhwc") for activation in ("relu", "none")]
RUNS += [(name, "relu6", *how) for name in STEPS if name != "dense" for how in ((True, "nhwc"), (True, "nchw"), (False, "nhwc"))]


@pytest.mark.parametrize(("name", "activation", "training", "layout"), RUNS)
def test_a_step(interpret: Interpret, name: str, activation: str, training: bool, layout: str) -> None:
    problem = STEPS[name]
    x, weight, (gain, bias, mean, var) = tensors_of(problem, torch.float32, LAYOUTS[layout])
    options = dict(padding=problem.padding, dilation=problem.dilation, stride=problem.stride, groups=problem.groups)
    step = dict(training=training, activation=activation, **options)
    grad = torch.randn(problem.batch, problem.out_channels, *problem.out_size)
    tensors = [x, weight, gain, bias, mean, var]
    out, *rest = interpret(interpreted.public, "conv_bn_relu", tensors, step, 4, [grad])
    leaves = [t.double().requires_grad_() for t in tensors[:4]]
    running = [t.double() for t in tensors[4:]]
    y = F.batch_norm(F.conv2d(*leaves[:2], **options), *running, *leaves[2:], training)
    truth = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6}[activation](y)
    grads = torch.autograd.grad(truth, leaves, grad.double())
    results = (out, *rest[:4], *rest[-2:])
    names = ("y", "x", "w", "gain", "bias", "mean", "var")
    for what, ours, theirs in zip(names, results, (truth, *grads, *running), strict=True):
        # Sums over a batch cancel in the gradients of a training step: a few digits of the root mean square remain.
        error = (ours.double() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error < 2e-5, what


def test_float32_parameters_beside_bfloat16(interpret: Interpret) -> None:
    x, weight, norm = tensors_of(PROBLEMS["dense"], torch.bfloat16, torch.channels_last)
    grad = torch.ones(2, 7, 9, 8).bfloat16()
    options = dict(training=True, padding=2, dilation=2)
    results = interpret(interpreted.public, "conv_bn_relu", [x, weight, *norm], options, 4, [grad])
    assert [t.dtype for t in results[:5]] == [torch.bfloat16] * 3 + [torch.float32] * 2
    truth = F.batch_norm(F.conv2d(x.double(), weight.double(), padding=2, dilation=2), None, None, *_double(norm[:2]), True)
    # The convolution's output is rounded to 8 bits, and so is the result.
    torch.testing.assert_close(results[0].double(), truth.relu(), rtol=2e-2, atol=3e-2)


def test_second_derivatives(interpret: Interpret) -> None:
    assert interpret(interpreted.second_derivatives, "triton") == pytest.approx(
        interpreted.second_derivatives("reference"), rel=1e-4
    )


def test_opcheck(interpret: Interpret) -> None:
    interpret(interpreted.opcheck_statistics)


def test_explain_names_the_reason() -> None:
    tensors = torch.empty(2, 4, 8, 8), torch.empty(4, 4, 3, 3)
    for options in (dict(training=True), dict()):
        reasons = {choice.name: choice.reason for choice in ak.explain("conv_bn_relu", *tensors, **options).choices}
        assert "compiles for CUDA devices, not for cpu" in reasons["triton"]
