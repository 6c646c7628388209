"""conv_bn_act: the sums of a convolution, finished in its kernel by constant statistics, a residual and an activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import atrous_kernels as ak

SHAPES = {
    "dense": dict(c=24, o=32, kernel=3, padding=2, dilation=2, groups=1),
    "pointwise": dict(c=40, o=48, kernel=1, padding=0, dilation=1, groups=1),
    "odd width": dict(c=7, o=21, kernel=3, padding=1, dilation=1, groups=1),
    "many chunks": dict(c=300, o=80, kernel=3, padding=1, dilation=1, groups=1),
    "grouped": dict(c=24, o=32, kernel=3, padding=1, dilation=1, groups=4),
    "depthwise": dict(c=37, o=37, kernel=5, padding=4, dilation=2, groups=37),
    "short phases": dict(c=32, o=48, kernel=3, padding=7, dilation=7, groups=1),
}
# Sums of up to 2,700 products in another order, divided by their deviation; Winograd's rounding is some twenty times as large.
# bf16: inputs are exact, the result is rounded once (2**-9), the truth not at all.
FINISHED = {torch.float32: 2e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", FINISHED, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "winograd", "torch", "reference"])
@pytest.mark.parametrize("name", SHAPES)
def test_inference_finishes_its_sums(name, backend, dtype, layout, activation, residual, poison) -> None:
    shape = SHAPES[name]
    cannot = shape["kernel"] != 3 or shape["groups"] == shape["c"] or dtype is not torch.float32
    if backend == "winograd" and cannot:
        pytest.skip("Winograd's algorithm is for dense float32 3x3")
    x = torch.randn(2, shape["c"], 13, 11).to(dtype).contiguous(memory_format=layout)
    w = (torch.randn(shape["o"], shape["c"] // shape["groups"], *[shape["kernel"]] * 2) / 8).to(dtype)
    w = w.contiguous(memory_format=layout)
    norm = (torch.rand(shape["o"]) + 0.5, torch.randn(shape["o"]), torch.randn(shape["o"]), torch.rand(shape["o"]) + 0.5)
    norm = tuple(t.to(torch.promote_types(dtype, torch.float32)) for t in norm)
    geometry = dict(padding=shape["padding"], dilation=shape["dilation"], groups=shape["groups"])
    bn_weight, bn_bias, mean, var = (t.double() for t in norm)
    truth = F.batch_norm(F.conv2d(x.double(), w.double(), **geometry), mean, var, bn_weight, bn_bias)
    add = torch.randn(truth.shape).to(dtype).contiguous(memory_format=layout) if residual else None
    truth = truth if add is None else truth + add.double()
    truth = {"relu": F.relu, "relu6": F.relu6, "none": lambda t: t}[activation](truth)
    for _ in range(3):  # the third call has prepared weights
        pairs = [(value, value) for value in (shape["padding"], shape["dilation"])]
        out = torch.ops.atrous.conv_bn_act(x, w, *norm, add, 1e-5, activation, (1, 1), *pairs, shape["groups"], backend)
        assert out.dtype is dtype
        assert out.is_contiguous(memory_format=layout)
        torch.testing.assert_close(out.double(), truth, rtol=FINISHED[dtype], atol=FINISHED[dtype])
    auto = ak.conv_bn_relu(x, w, *norm, **geometry, activation=activation, residual=add)
    torch.testing.assert_close(auto.double(), truth, rtol=FINISHED[dtype], atol=FINISHED[dtype])


def test_a_stride_along_one_index_says_nothing() -> None:
    """Python and C++ take the same layout for the output, and a residual that differs in such a stride alone is like it."""
    one, zero = torch.ones(48), torch.zeros(48)
    x, w = torch.randn(30).as_strided((1, 10, 1, 3), (1, 1, 10, 10)), torch.randn(48, 10, 2, 4)
    for strides in ((1, 1, 48, 336), (336, 1, 48, 48), (336, 7, 1, 1)):
        residual = torch.randn(336).as_strided((1, 48, 7, 1), strides)
        for input in (x, x.contiguous(memory_format=torch.channels_last)):
            geometry = dict(padding=(4, 8), dilation=(2, 6))
            out = ak.conv_bn_relu(input, w, one, zero, zero, one, **geometry, residual=residual, backend="cpu")
            truth = F.relu(F.batch_norm(F.conv2d(x, w, None, 1, (4, 8), (2, 6)), zero, one) + residual)
            torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-4)


def test_a_residual_may_be_a_view_with_gaps() -> None:
    """The shortcut of a block whose stride is in its last unit (DeepLabv3): every second pixel of the input."""
    x = torch.randn(1, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    shortcut = torch.randn(1, 16, 12, 12).contiguous(memory_format=torch.channels_last)[:, :, ::2, ::2]
    one, zero = torch.ones(16), torch.zeros(16)
    out = ak.conv_bn_relu(x, w, one, zero, zero, one, residual=shortcut)
    torch.testing.assert_close(out, F.relu(F.batch_norm(F.conv2d(x, w), zero, one) + shortcut), rtol=1e-4, atol=1e-4)


def test_residual_mistakes_are_named() -> None:
    x, w, one = torch.zeros(1, 4, 6, 6), torch.zeros(8, 4, 3, 3), torch.ones(8)
    with pytest.raises(ValueError, match=r"residual: expected the sizes of the output \[1, 8, 6, 6\]"):
        ak.conv_bn_relu(x, w, one, one, one, one, padding=1, residual=torch.zeros(1, 8, 6, 5))
    native = torch.ops.atrous_native.conv_bn_act
    arguments = ([1, 1], [1, 1], [1, 1], 1, 0.0, 1.0, 0)
    with pytest.raises(RuntimeError, match="residual: expected float32 or float64 sizes"):
        native(x, w, None, None, None, one, one, 1e-5, torch.zeros(1, 8, 6, 6), *arguments)  # contiguous
    with pytest.raises(RuntimeError, match="mean: expected 8 contiguous float32 values"):
        native(x, w, None, None, None, one[:4], one, 1e-5, None, *arguments)


def test_inference_op_is_registered_in_full() -> None:
    norm = [torch.rand(5) + 0.5 for _ in range(4)]
    arguments = (torch.randn(2, 3, 7, 6), torch.randn(5, 3, 3, 3), *norm, torch.randn(2, 5, 7, 6), 1e-5, "relu")
    torch.library.opcheck(torch.ops.atrous.conv_bn_act.default, (*arguments, (1, 1), (1, 1), (1, 1), 1, "auto"))
