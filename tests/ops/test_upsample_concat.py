"""upsample_concat, psp_conv and the modules over them, against interpolation, concatenation and convolution in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops.upsample_concat import upsample_concat
from tests.repeats import assert_same_bits, built_isas, repeat_capped

BACKENDS = ("auto", "cpu", "torch", "reference")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# Interpolation weights differ from the framework's by rounding of the coordinate: 2**-24 times the level's size in fp32.
# Gradients of a level sum a few hundred products, convolutions a few hundred more. 16-bit types round weights, products at bin
# resolution, each partial interpolation and the result.
TOLERANCE = {
    torch.float64: dict(rtol=1e-11, atol=1e-11),
    torch.float32: dict(rtol=1e-4, atol=1e-4),
    torch.bfloat16: dict(rtol=5e-2, atol=1e-1),
    torch.float16: dict(rtol=1e-2, atol=2e-2),
}

Size = tuple[int, int]
PROBLEMS: dict[str, tuple[int, int, Size, list[tuple[int, Size]]]] = {  # batch, channels, size, levels
    "PSPNet": (2, 20, (12, 12), [(5, (1, 1)), (5, (2, 2)), (5, (3, 3)), (5, (6, 6))]),
    "odd": (2, 7, (13, 11), [(3, (1, 1)), (18, (4, 3)), (2, (6, 5))]),
    "wide": (1, 35, (5, 37), [(33, (3, 2))]),
    "as large as the map": (1, 4, (6, 5), [(3, (6, 5))]),
    "finer than the map": (1, 4, (3, 4), [(3, (7, 5))]),
    "one pixel": (2, 4, (1, 1), [(3, (1, 1)), (2, (2, 2))]),
    "no level": (2, 4, (5, 6), []),
    "empty batch": (0, 4, (5, 6), [(3, (2, 2))]),
}


def _skip_unless_runnable(backend: str, dtype: torch.dtype = torch.float32) -> None:
    try:
        ak.explain("upsample_concat", torch.empty(1, 1, 2, 2, dtype=dtype), [], backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))


def _operands(name: str, dtype: torch.dtype, layout: str) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Input, levels, weight and bias of a 3x3 convolution over all of them."""
    batch, channels, size, levels = PROBLEMS[name]
    total = channels + sum(c for c, _ in levels)
    shapes = [(batch, channels, *size), *((batch, c, *grid) for c, grid in levels), (9, total, 3, 3), (9,)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[-2] *= (9 * total) ** -0.5
    tensors = [t.to(dtype) for t in tensors]
    tensors = [t.contiguous(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t for t in tensors]
    x, *small, weight, bias = (t.requires_grad_() for t in tensors)
    return x, small, weight, bias


def _framework(x: Tensor, levels: Sequence[Tensor], align_corners: bool) -> Tensor:
    up = [F.interpolate(v, x.shape[2:], mode="bilinear", align_corners=align_corners) for v in levels]
    return torch.cat([x, *up], 1)


def _close(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(ours, theirs, strict=True):
        scale = max(b.abs().max().item(), 1.0) if b.numel() else 1.0  # gradients sum over the map
        assert a.dtype == dtype
        torch.testing.assert_close(a.double() / scale, b / scale, **TOLERANCE[dtype])


def _check_concat(name: str, dtype: torch.dtype, layout: str, align_corners: bool, backend: str) -> None:
    x, levels, _, _ = _operands(name, dtype, layout)
    wide = [t.detach().double().requires_grad_() for t in (x, *levels)]
    ours = ak.upsample_concat(x, levels, align_corners=align_corners, backend=backend)
    theirs = _framework(wide[0], wide[1:], align_corners)
    grad = torch.randn(theirs.shape).to(dtype)
    _close([ours], [theirs], dtype)
    if x.numel():
        assert ours.is_contiguous(memory_format=LAYOUTS[layout])
        _close(torch.autograd.grad(ours, [x, *levels], grad), torch.autograd.grad(theirs, wide, grad.double()), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", PROBLEMS)
def test_concat(name: str, dtype: torch.dtype, layout: str, align_corners: bool, backend: str, poison: None) -> None:
    _skip_unless_runnable(backend, dtype)
    _check_concat(name, dtype, layout, align_corners, backend)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", PROBLEMS)
def test_psp_conv_is_the_convolution_over_the_concatenation(
    name: str, dtype: torch.dtype, layout: str, align_corners: bool
) -> None:
    x, levels, weight, bias = _operands(name, dtype, layout)
    operands = [x, weight, bias, *levels]
    wide = [t.detach().double().requires_grad_() for t in operands]
    ours = ak.psp_conv(x, levels, weight, bias, align_corners=align_corners)
    theirs = F.conv2d(_framework(wide[0], wide[3:], align_corners), wide[1], wide[2], padding=1)
    grad = torch.randn(theirs.shape).to(dtype)
    _close([ours], [theirs], dtype)
    if x.numel():
        _close(torch.autograd.grad(ours, operands, grad), torch.autograd.grad(theirs, wide, grad.double()), dtype)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    grids=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    channels=st.integers(1, 20),
    align_corners=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_random_psp_conv(
    size: Size, grids: list[Size], kernel: Size, channels: int, align_corners: bool, layout: str
) -> None:
    form = LAYOUTS[layout]
    x = torch.randn(2, channels, *size, dtype=torch.float64).contiguous(memory_format=form)
    levels = [torch.randn(2, 3, *grid, dtype=torch.float64) for grid in grids]
    weight = torch.randn(4, channels + 3 * len(grids), *kernel, dtype=torch.float64).contiguous(memory_format=form)
    full = ak.upsample_concat(x, levels, align_corners=align_corners)
    torch.testing.assert_close(full, _framework(x, levels, align_corners))
    padding = (kernel[0] // 2, kernel[1] // 2)
    ours = ak.psp_conv(x, levels, weight, align_corners=align_corners)
    torch.testing.assert_close(ours, F.conv2d(full, weight, None, 1, padding))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck(align_corners: bool, layout: str) -> None:
    form = LAYOUTS[layout]
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64).contiguous(memory_format=form).requires_grad_()
    levels = [torch.randn(2, 2, b, b, dtype=torch.float64, requires_grad=True) for b in (1, 2)]
    weight = torch.randn(2, 6, 3, 3, dtype=torch.float64).contiguous(memory_format=form).requires_grad_()

    def concat(x: Tensor, *levels: Tensor) -> Tensor:
        return ak.upsample_concat(x, levels, align_corners=align_corners)

    def conv(x: Tensor, weight: Tensor, *levels: Tensor) -> Tensor:
        return ak.psp_conv(x, levels, weight, align_corners=align_corners)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(concat, (x, *levels))
        assert check(conv, (x, weight, *levels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    _skip_unless_runnable(backend)
    for layout in LAYOUTS:
        x, levels, _, _ = _operands("odd", torch.float32, layout)
        torch.library.opcheck(upsample_concat, (x, levels, True, backend))


_BITS = """
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(2, 64, 31, 29).contiguous(memory_format=layout)
    results.append(ak.upsample_concat(x, [torch.randn(2, 40, b, b) for b in (1, 2, 3, 6)], backend="cpu"))
"""


@pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
def test_same_bits_for_any_number_of_threads_and_with_poisoned_scratch() -> None:
    assert_same_bits(_BITS)


@pytest.mark.parametrize("isa", built_isas())
def test_every_instruction_set(isa: str) -> None:
    """The concatenation again, capped and with poisoned memory."""
    done = repeat_capped(isa, "test_concat and cpu", __file__)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1, 3, 4, 4), None), TypeError, "expected a tensor and a list of tensors, not Tensor, NoneType"),
        ((torch.zeros(3, 4, 4), []), ValueError, r"input of shape \[3, 4, 4\], torch.float32: expected"),
        ((torch.zeros(1, 3, 4, 4), [torch.zeros(2, 3, 1, 1)]), ValueError, r"level of shape \[2, 3, 1, 1\]: expected \[1, c"),
        ((torch.zeros(1, 3, 4, 4), [torch.zeros(1, 3, 0, 1)]), ValueError, "with at least one pixel"),
        ((torch.zeros(1, 3, 4, 4), [torch.zeros(1, 3, 1, 1).double()]), ValueError, "level of torch.float64 on cpu: expected"),
    ],
)
def test_mistakes_name_the_value(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ak.upsample_concat(*arguments)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (None, r"weight of shape NoneType: expected \[O, 5, kh, kw\]"),
        (torch.zeros(2, 4, 3, 3), r"weight of shape \[2, 4, 3, 3\]: expected \[O, 5, kh, kw\], 5 being the channels"),
        (torch.zeros(2, 5, 2, 3), r"weight of shape \[2, 5, 2, 3\]: expected an odd kernel"),
    ],
)
def test_psp_conv_names_a_wrong_weight(weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ak.psp_conv(torch.zeros(1, 3, 4, 4), [torch.zeros(1, 2, 1, 1)], weight)


def test_explain() -> None:
    explanation = ak.explain("upsample_concat", torch.empty(2, 8, 6, 6), [torch.empty(2, 4, 1, 1)])
    assert "2x8x6x6 with 4x1x1, corners not aligned, float32 on cpu" in str(explanation)
    assert {choice.name for choice in explanation.choices} == {"cpu", "torch", "reference"}


# Modules --------------------------------------------------------------------------------------------------------------


def _plain_pooling(module: ak.nn.PyramidPooling, x: Tensor) -> Tensor:
    return _framework(x, [feature(x) for feature in module.features], module.align_corners)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_equal_their_plain_form(layout: str, align_corners: bool, training: bool) -> None:
    head = ak.nn.PSPHead(16, 8, 5, align_corners=align_corners, dropout=0.0).train(training)
    head = head.to(torch.float64, memory_format=LAYOUTS[layout])
    x = torch.randn(2, 16, 13, 14, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    torch.testing.assert_close(head.ppm(x), _plain_pooling(head.ppm, x))
    results = []
    for call in (head, lambda x: head.cls(_plain_pooling(head.ppm, x))):
        out = call(x)
        torch.manual_seed(1)
        results.append((out, *torch.autograd.grad(out, (x, *head.parameters()), torch.randn_like(out))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def _check_pooling_while_copying(shape: Sequence[int], layout: str, dtype: torch.dtype) -> None:
    module = ak.nn.PyramidPooling(shape[1], 3, (1, (2, 3), 5)).eval().to(dtype, memory_format=LAYOUTS[layout])
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        out = module(x)  # copies the map while it is pooled
    seen = module(x.clone().requires_grad_())  # pools, then copies
    assert out.stride() == seen.stride()
    assert torch.equal(out[:, : shape[1]], x)
    # Where gradients are wanted, the normalisation is folded into the weights of the levels: other roundings.
    torch.testing.assert_close(out, seen, **TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pooling_while_copying(dtype: torch.dtype, layout: str) -> None:
    for shape in [(2, 7, 13, 11), (1, 64, 6, 5), (3, 1, 1, 1), (0, 4, 5, 6)]:
        _check_pooling_while_copying(shape, layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_larger_than_the_caches(layout: str) -> None:
    """More than 16 MB go past the caches; lines are cut at odd places."""
    _check_pooling_while_copying((2, 67, 181, 179), layout, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_larger_than_the_caches(layout: str) -> None:
    x = torch.randn(2, 67, 181, 179).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    for bin_size in (1, 6):
        grad = torch.randn(2, 67, bin_size, bin_size)
        (ours,) = torch.autograd.grad(ak.pyramid_pool(x, (bin_size,))[0], x, grad)
        (theirs,) = torch.autograd.grad(F.adaptive_avg_pool2d(x, bin_size), x, grad)
        torch.testing.assert_close(ours, theirs)  # a product each, rounded once or twice: the default for float32


def test_keys_are_those_of_the_authors() -> None:
    keys = set(ak.nn.PSPHead(8, 4, 3, bins=(1, 2)).state_dict())
    assert {"ppm.features.0.1.weight", "ppm.features.1.2.running_mean", "cls.0.weight", "cls.1.bias", "cls.4.bias"} <= keys


def test_one_image_in_training_says_what_to_do() -> None:
    module = ak.nn.PyramidPooling(8, 2)
    with pytest.raises(ValueError, match="training with a batch of 1: BatchNorm of the 1x1 level"):
        module(torch.randn(1, 8, 6, 6))
    assert module.eval()(torch.randn(1, 8, 6, 6)).shape == (1, 16, 6, 6)
    assert ak.nn.PyramidPooling(8, 2, (2, 3))(torch.randn(1, 8, 6, 6)).shape == (1, 12, 6, 6)


def test_compiles_and_exports() -> None:
    torch._dynamo.reset()
    head = ak.nn.PSPHead(8, 4, 3).eval()
    x = torch.randn(2, 8, 9, 10)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), head(x))
    compiled(x).sum().backward()
    pooling = torch.compile(head.ppm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(pooling(x), head.ppm(x))
    torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), head(x))


def test_autocast() -> None:
    head = ak.nn.PSPHead(8, 4, 3, dropout=0.0)
    x = torch.randn(2, 8, 9, 10)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(x)
        pooled = head.ppm(x)
    assert low.dtype is torch.bfloat16
    # Activations of order 1, rounded to bf16 (2**-9) a handful of times and normalised by small batches in between.
    torch.testing.assert_close(low.float(), head(x), rtol=0.1, atol=0.1)
    torch.testing.assert_close(pooled.float(), head.ppm(x), rtol=0.1, atol=0.1)
