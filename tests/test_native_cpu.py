"""The compiled CPU library by itself: its three ops against the framework in float64, exactness, repeatability, ISA caps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from atrous_kernels import native
from tests.repeats import assert_same_bits_for_threads, built_isas, repeat_capped

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Case:
    batch: int
    c_in: int
    c_out: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def terms(self) -> int:
        """Products in the longest sum of the three ops."""
        return max(self.kernel[0] * self.kernel[1] * max(self.c_in, self.c_out), self.batch * self.size[0] * self.size[1])


CASES = {
    "aspp": Case(2, 96, 80, (17, 17), padding=(6, 6), dilation=(6, 6)),
    "rate beyond the image": Case(1, 40, 24, (9, 11), padding=(12, 12), dilation=(12, 12)),
    "no valid tap": Case(1, 5, 7, (2, 2), kernel=(2, 2), padding=(9, 9), dilation=(3, 17)),
    "pointwise": Case(3, 70, 130, (7, 9), kernel=(1, 1), padding=(0, 0)),
    "pointwise, stride 2": Case(2, 33, 20, (8, 7), kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    "stem": Case(2, 3, 32, (33, 31), stride=(2, 2)),
    "asymmetric": Case(2, 18, 17, (13, 20), kernel=(1, 5), stride=(3, 2), padding=(2, 4), dilation=(4, 3)),
    "stride 3, rate 2": Case(1, 8, 9, (19, 23), kernel=(4, 3), stride=(3, 3), padding=(5, 0), dilation=(2, 4)),
    "grouped": Case(2, 24, 36, (10, 9), padding=(2, 2), dilation=(2, 2), groups=3),
    "grouped, one output": Case(2, 12, 4, (8, 8), groups=4),
    "depthwise": Case(2, 40, 40, (15, 18), groups=40),
    "depthwise, few channels": Case(3, 5, 5, (9, 8), groups=5),
    "depthwise 5x5, stride 2": Case(2, 48, 48, (21, 17), kernel=(5, 5), stride=(2, 2), padding=(2, 2), groups=48),
    "depthwise, rate 12": Case(1, 33, 33, (20, 33), padding=(12, 12), dilation=(12, 12), groups=33),
    "depthwise, no valid tap": Case(1, 16, 16, (3, 2), kernel=(2, 2), padding=(9, 9), dilation=(5, 17), groups=16),
    "depthwise, multiplier 2": Case(2, 6, 12, (9, 9), stride=(2, 1), groups=6),
    "one pixel": Case(1, 260, 66, (1, 1), padding=(3, 3), dilation=(3, 3)),
    "long sums": Case(1, 700, 10, (5, 40)),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def tensors(case: Case, dtype: torch.dtype, layout: str, integers: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and output gradient; small integers make every product and sum exact."""
    generator = torch.Generator().manual_seed(0)

    def make(*sizes: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, sizes, generator=generator).to(dtype)
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    x = make(case.batch, case.c_in, *case.size)
    w = make(case.c_out, case.c_in // case.groups, *case.kernel)
    y = torch.nn.functional.conv2d(x.double(), w.double(), None, *case.geometry)
    to = LAYOUTS[layout]
    return (
        x.contiguous(memory_format=to), w.contiguous(memory_format=to), make(case.c_out),
        make(*y.shape).contiguous(memory_format=to),
    )  # fmt: skip


def ours(case: Case, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ops = torch.ops.atrous_native
    return (
        ops.conv2d(x, w, b, *case.geometry),
        ops.conv2d_input(x.shape, w, g, *case.geometry),
        ops.conv2d_weight(x, w.shape, g, *case.geometry),
    )


def truth(case: Case, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w, g = x.double(), w.double(), g.double()
    return (
        torch.nn.functional.conv2d(x, w, None if b is None else b.double(), *case.geometry),
        conv2d_input(x.shape, w, g, *case.geometry),
        conv2d_weight(x, w.shape, g, *case.geometry),
    )


def tolerance(dtype: torch.dtype, terms: int) -> dict[str, float]:
    # Products of unit normals: after i terms the sum is about sqrt(i) and the next addition errs by at most eps/2 of it.
    # Adding these errors in quadrature over n terms gives 0.2 * n * eps; n * eps leaves five deviations for the largest
    # of many elements, and the factor 2 covers the reference, which rounds alike in float64. The result is then rounded
    # once to its own type: half an eps relative to the value.
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return {"rtol": torch.finfo(dtype).eps, "atol": 2 * terms * torch.finfo(accumulate).eps}


@EACH_CASE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(case: Case, layout: str, dtype: torch.dtype) -> None:
    args = tensors(case, dtype, layout)
    for result, expected in zip(ours(case, *args), truth(case, *args), strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, **tolerance(dtype, case.terms))


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_integers_are_exact(case: Case, dtype: torch.dtype) -> None:
    args = tensors(case, dtype, "nchw", integers=True)
    for result, expected in zip(ours(case, *args), truth(case, *args), strict=True):
        # Sums below 2^24 are exact in float; bfloat16 results are the exact sum rounded once.
        assert torch.equal(result, expected.to(dtype))


@pytest.mark.parametrize("name", ["aspp", "stem", "grouped", "depthwise 5x5, stride 2"])
@pytest.mark.parametrize(("x_layout", "w_layout"), list(product(LAYOUTS, LAYOUTS)))
def test_mixed_layouts_and_their_results(name: str, x_layout: str, w_layout: str) -> None:
    case = CASES[name]
    x, w, b, g = tensors(case, torch.float32, "nchw", integers=True)
    x = x.contiguous(memory_format=LAYOUTS[x_layout])
    w = w.contiguous(memory_format=LAYOUTS[w_layout])
    results = ours(case, x, w, b, g)
    for result, expected in zip(results, truth(case, x, w, b, g), strict=True):
        assert torch.equal(result, expected.float())
    assert results[0].stride() == torch.nn.functional.conv2d(x, w, b, *case.geometry).stride()


def test_strides_that_are_neither_layout() -> None:
    case = CASES["aspp"]
    x, w, b, g = tensors(case, torch.float32, "nchw", integers=True)
    spread = torch.zeros(*x.shape[:3], 2 * x.shape[3])
    spread[..., ::2] = x
    turned = w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    views = spread[..., ::2], turned, b.repeat_interleave(2)[::2], g[:, :, :1, :1].expand_as(g)
    expected = truth(case, *views)
    for result, wanted in zip(ours(case, *views), expected, strict=True):
        assert torch.equal(result, wanted.float())


@EACH_CASE
def test_same_bits_for_any_number_of_threads(case: Case) -> None:
    args = tensors(case, torch.float32, "nhwc")
    assert_same_bits_for_threads(lambda: ours(case, *args))


def test_a_large_problem_gives_the_same_bits_and_the_right_ones() -> None:
    # Big enough for several slabs, chunks and threads in each of the three ops.
    case = Case(1, 80, 72, (150, 170), padding=(3, 3), dilation=(3, 3))
    args = tensors(case, torch.float32, "nchw", integers=True)
    expected = truth(case, *args)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for result, wanted in zip(ours(case, *args), expected, strict=True):
                assert torch.equal(result, wanted.float())  # sums of small integers: exact
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["aspp", "depthwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_addresses_beyond_32_bits(name: str, layout: str) -> None:
    # Two images 2^31 elements apart. Memory that nobody touches is never given to the process.
    case = CASES[name]
    x, w, b, g = tensors(case, torch.float32, layout, integers=True)
    far = torch.UntypedStorage(4 * (2**31 + x[0].numel()))
    spread = torch.empty(0).set_(far, 0, x.shape, (2**31, *x.stride()[1:]))
    spread.copy_(x)
    assert torch.equal(ours(case, spread, w, b, g)[0], ours(case, x, w, b, g)[0])
    assert torch.equal(ours(case, spread, w, b, g)[2], ours(case, x, w, b, g)[2])
    del spread
    far_grad = torch.empty(0).set_(far, 0, g.shape, (2**31, *g.stride()[1:]))
    far_grad.copy_(g)
    assert torch.equal(ours(case, x, w, b, far_grad)[1], ours(case, x, w, b, g)[1])


@pytest.mark.parametrize("groups", [1, 4])
def test_an_empty_batch(groups: int) -> None:
    case = Case(0, 4, 4, (6, 5), groups=groups)
    y, dx, dw = ours(case, torch.zeros(0, 4, 6, 5), torch.ones(4, 4 // groups, 3, 3), torch.ones(4), torch.zeros(0, 4, 6, 5))
    assert y.shape == dx.shape == (0, 4, 6, 5)
    assert torch.equal(dw, torch.zeros(4, 4 // groups, 3, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(4, 3, 3, 3)}, r"input: expected 3 channels .* got sizes \[1, 4, 6, 5\]"),
        ({"weight": torch.zeros(4, 4, 3, 3).double()}, "weight: expected the dtype of input"),
        ({"bias": torch.zeros(5)}, r"bias: expected sizes \[4\], but got \[5\]"),
        ({"stride": [0, 1]}, r"stride: expected values of at least 1, but got \[0, 1\]"),
        ({"padding": [1]}, r"padding: expected 2 values .* got \[1\]"),
        ({"dilation": [1, -1]}, r"dilation: expected values of at least 1, but got \[1, -1\]"),
        ({"dilation": [9, 1]}, "padded extent of at least 19 .* but got 8"),
        ({"groups": 3}, "groups"),
        ({"input": torch.zeros(4, 6, 5)}, r"input: expected 4 dimensions, but got sizes \[4, 6, 5\]"),
        ({"input": torch.zeros(1, 4, 6, 5, dtype=torch.int32), "weight": torch.zeros(4, 4, 3, 3, dtype=torch.int32)}, "dtype"),
    ],
)
def test_errors_name_the_value_and_what_was_expected(changes: dict, message: str) -> None:
    call = {
        "input": torch.zeros(1, 4, 6, 5), "weight": torch.zeros(4, 4, 3, 3), "bias": None, "stride": [1, 1],
        "padding": [1, 1], "dilation": [1, 1], "groups": 1,
    }  # fmt: skip
    call.update(changes)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.atrous_native.conv2d(*call.values())


def test_gradient_sizes_are_checked() -> None:
    grad, weight, ones = torch.zeros(1, 4, 6, 6), torch.zeros(4, 4, 3, 3), [1, 1]
    with pytest.raises(RuntimeError, match=r"grad_output: expected the output's sizes \[1, 4, 6, 5\]"):
        torch.ops.atrous_native.conv2d_input([1, 4, 6, 5], weight, grad, ones, ones, ones, 1)


@pytest.mark.parametrize("isa", [*built_isas(), "nonsense"])
def test_every_instruction_set(isa: str) -> None:
    """This module again, capped and with poisoned memory."""
    done = repeat_capped(isa, "float64 or integers or large", __file__)
    if isa == "nonsense":
        assert done.returncode != 0
        assert "ATROUS_CPU_ISA=nonsense is unknown: expected one of portable" in done.stdout
    else:
        assert done.returncode == 0, done.stdout


if os.environ.get("ATROUS_POISON"):
    # Scratch memory starts as NaN through ATROUS_POISON; results start as NaN through the framework's own switch.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
