"""The CUDA convolution kernels, really executed: the same source compiled for the host, against PyTorch in float64."""

from __future__ import annotations

import mmap

import emulated
import pytest
import torch
from emulated import out_size, poisoned
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d as framework_conv2d
from torch.nn.grad import conv2d_input as framework_conv2d_input
from torch.nn.grad import conv2d_weight as framework_conv2d_weight

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")

# Unit roundoff of each type: half the distance between 1 and the next number.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDOFF)

# (input size, weight size, stride, padding, dilation, groups)
CASES = {
    "1x1": ((2, 5, 7, 6), (9, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "3x3": ((2, 18, 9, 8), (70, 18, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "atrous": ((1, 20, 17, 15), (12, 20, 3, 3), (1, 1), (6, 6), (6, 6), 1),
    "only_centre_tap_valid": ((2, 4, 5, 6), (5, 4, 3, 3), (1, 1), (18, 18), (18, 18), 1),
    "dilation_differs": ((1, 3, 11, 13), (4, 3, 3, 3), (1, 1), (2, 5), (2, 5), 1),
    "stride_2": ((2, 3, 13, 12), (7, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "stride_2_atrous": ((1, 6, 12, 11), (5, 6, 3, 3), (2, 2), (4, 4), (4, 4), 1),
    "stride_3_2": ((1, 4, 14, 11), (6, 4, 3, 2), (3, 2), (1, 0), (2, 3), 1),
    "stride_above_kernel": ((1, 3, 10, 10), (4, 3, 1, 2), (4, 3), (0, 1), (1, 1), 1),
    "padding_above_kernel": ((1, 2, 4, 4), (3, 2, 2, 2), (1, 1), (5, 4), (1, 1), 1),
    "groups": ((1, 12, 8, 9), (18, 4, 3, 3), (1, 1), (2, 2), (2, 2), 3),
    "groups_narrow_and_wide": ((1, 4, 6, 5), (40, 2, 3, 3), (2, 1), (1, 1), (1, 1), 2),
    "depthwise": ((2, 16, 10, 9), (16, 1, 3, 3), (1, 1), (2, 2), (2, 2), 16),
    "depthwise_ragged": ((1, 11, 9, 7), (11, 1, 3, 3), (2, 2), (1, 1), (1, 1), 11),
    "depthwise_multiplier": ((1, 3, 8, 8), (6, 1, 3, 3), (1, 1), (12, 12), (12, 12), 3),
    "depthwise_5x5": ((1, 48, 7, 7), (48, 1, 5, 5), (1, 1), (4, 4), (2, 2), 48),
    "more_taps_than_a_plan_holds": ((1, 1, 21, 3), (2, 1, 19, 1), (1, 1), (9, 0), (1, 1), 1),
    "one_pixel": ((1, 2, 1, 1), (2, 2, 3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def is_depthwise(case: tuple) -> bool:
    return case[5] == case[0][1]


def paths(case: tuple) -> list[bool]:
    """The kernels that can take a problem: always the dense one, also the depthwise one."""
    return [False, True] if is_depthwise(case) else [False]


def numbers(size: tuple[int, ...] | list[int], dtype: torch.dtype, channels_last: bool, integers: bool = False) -> Tensor:
    values = torch.randint(-2, 3, list(size)) if integers else torch.randn(list(size), dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return values.to(dtype).contiguous(memory_format=layout)


def run_all(case: tuple, dtype: torch.dtype, nhwc: bool, depthwise: bool, integers: bool = False) -> dict[str, tuple]:
    """name -> (result, float64 reference, the same of absolute values, terms per element)."""
    size, weight_size, *geometry = case
    x, w = numbers(size, dtype, nhwc, integers), numbers(weight_size, dtype, nhwc, integers)
    b = numbers((1, weight_size[0], 1, 1), dtype, False, integers).flatten()
    g = numbers(out_size(size, weight_size, *geometry[:3]), dtype, nhwc, integers)
    out = emulated.conv2d(x, w, b, *geometry, depthwise=depthwise, out=poisoned(g.shape, dtype, nhwc))
    grad_x = emulated.conv2d_input(w, g, *geometry, depthwise=depthwise, out=poisoned(size, dtype, nhwc))
    grad_w = emulated.conv2d_weight(x, g, *geometry, depthwise=depthwise, out=poisoned(weight_size, dtype, nhwc))
    X, W, B, G = (tensor.double() for tensor in (x, w, b, g))

    def reference(X: Tensor, W: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            framework_conv2d(X, W, B, *geometry),
            framework_conv2d_input(list(size), W, G, *geometry),
            framework_conv2d_weight(X, list(weight_size), G, *geometry),
        )

    exact, absolute = reference(X, W, B, G), reference(X.abs(), W.abs(), B.abs(), G.abs())
    taps = weight_size[2] * weight_size[3]
    terms = (weight_size[1] * taps + 1, weight_size[0] // case[5] * taps, g.numel() // max(g.shape[1], 1))
    names = ("conv2d", "conv2d_input", "conv2d_weight")
    return dict(zip(names, zip((out, grad_x, grad_w), exact, absolute, terms, strict=True), strict=True))


def check(results: dict[str, tuple], dtype: torch.dtype) -> None:
    for name, (result, exact, absolute, terms) in results.items():
        accumulate = ROUNDOFF[torch.float64 if dtype is torch.float64 else torch.float32]
        # Any order of summing n products errs by at most about n roundoffs of the sum of absolute values (here for the
        # kernel and, in float64, the reference); then one rounding to dtype, absolute below the normal range.
        smallest = torch.finfo(dtype).tiny * ROUNDOFF[dtype]
        bound = 1.01 * (terms + 2) * (accumulate + 2.0**-53) * absolute + 1.01 * ROUNDOFF[dtype] * exact.abs() + smallest
        excess = ((result.double() - exact).abs() / bound.clamp_min(1e-300)).max().item() if result.numel() else 0.0
        assert not result.isnan().any(), f"{name}: an element was not written"
        assert excess <= 1, f"{name}: error is {excess:.3g} of what rounding explains"


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, dtype: torch.dtype, nhwc: bool) -> None:
    for depthwise in paths(CASES[name]):
        check(run_all(CASES[name], dtype, nhwc, depthwise), dtype)


@pytest.mark.parametrize("name", CASES)
def test_integers_are_exact(name: str) -> None:
    # Small integers: every product and every partial sum is exact in float32, and so is every result in float16.
    for depthwise in paths(CASES[name]):
        for op, (result, exact, absolute, _) in run_all(CASES[name], torch.float16, True, depthwise, integers=True).items():
            assert absolute.max() <= 2048, "the case is too large to be exact in float16"
            assert torch.equal(result.double(), exact), op


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_problems(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = data.draw(st.integers(1, 4))
    size = (data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 6)), *pair(1, 14))
    weight = (groups * data.draw(st.integers(1, 6)), size[1] // groups, *pair(1, 4))
    case = (size, weight, pair(1, 4), pair(0, 9), pair(1, 20), groups)
    assume(min(out_size(*case[:5])) > 0)
    dtype, nhwc = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    for depthwise in paths(case):
        check(run_all(case, dtype, nhwc, depthwise), dtype)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_any_strides_and_offsets(depthwise: bool) -> None:
    """Slices of larger tensors in every dimension, mixed layouts, data that is not 16-byte aligned."""
    groups = 8 if depthwise else 1
    geometry = ((1, 1), (2, 2), (2, 2), groups)
    x = torch.randn(3, 20, 12, 19)[1:, 3:19:2, ::2, 1::2]
    w = torch.randn(9, 12 // groups, 3, 7)[1:, : 8 // groups, :, ::3]
    g = torch.randn(2, 8, 6, 10).permute(0, 1, 3, 2)[:, :, :6].contiguous(memory_format=torch.channels_last)[..., :5]
    g = torch.nn.functional.pad(g, (0, 4))[..., :9]
    big = torch.full((2, 8, 6, 30), float("nan"))
    out = emulated.conv2d(x, w, None, *geometry, depthwise=depthwise, out=big[..., 1:19:2])
    assert torch.allclose(out, framework_conv2d(x, w, None, *geometry), atol=1e-5)  # ~72 terms of size 1 in float32
    assert big[..., 0::2].isnan().all(), "wrote between the elements of the output"
    assert big[..., 19:].isnan().all(), "wrote behind the output"
    grad_x = emulated.conv2d_input(w, g, *geometry, depthwise=depthwise, out=poisoned(x.shape, x.dtype, False))
    assert torch.allclose(grad_x, framework_conv2d_input(list(x.shape), w, g, *geometry), atol=1e-5)  # as above
    grad_w = emulated.conv2d_weight(x, g, *geometry, depthwise=depthwise, out=poisoned(w.shape, x.dtype, True))
    assert torch.allclose(grad_w, framework_conv2d_weight(x, list(w.shape), g, *geometry), atol=1e-4)  # 108 terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_depthwise_vectors_need_alignment(dtype: torch.dtype) -> None:
    """Channels-last data that starts off a 16-byte boundary takes the scalar kernel instead of a misaligned access."""
    storage = torch.randn(1 + 2 * 16 * 6 * 5).to(dtype)
    x = storage[1:].view(2, 6, 5, 16).permute(0, 3, 1, 2)
    w = torch.randn(16, 1, 3, 3).to(dtype)
    geometry = ((1, 1), (1, 1), (1, 1), 16)
    out = emulated.conv2d(x, w, None, *geometry, depthwise=True, out=poisoned(x.shape, dtype, True))
    exact = framework_conv2d(x.double(), w.double(), None, *geometry)
    assert torch.allclose(out.double(), exact, rtol=ROUNDOFF[dtype], atol=1e-5)  # one rounding, 9 terms in float32


@pytest.mark.parametrize("name", ["atrous", "stride_2", "groups", "depthwise", "depthwise_ragged", "3x3"])
def test_order_of_threads_changes_no_bit(name: str) -> None:
    """Bitwise repeatable, also with the threads of a block in other orders: no barrier is missing, nothing races."""
    results = []
    try:
        for kind, seed in (("ascending", 0), ("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)):
            emulated.schedule(kind, seed)
            torch.manual_seed(3)
            runs = [run_all(CASES[name], torch.float32, True, depthwise) for depthwise in paths(CASES[name])]
            results.append([result[0] for run in runs for result in run.values()])
    finally:
        emulated.schedule("ascending")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_infinite_values_outside_the_valid_taps_do_not_leak() -> None:
    """A tap in the padding is never multiplied: an infinite weight there must not give NaN (inf * 0)."""
    w = torch.full((4, 4, 3, 3), float("inf"))
    w[:, :, 1, 1] = 1
    geometry = ((1, 1), (9, 9), (9, 9), 1)
    x = torch.ones(1, 4, 5, 5)
    out = emulated.conv2d(x, w, None, *geometry, out=poisoned((1, 4, 5, 5), x.dtype, False))
    assert torch.equal(out, torch.full_like(out, 4.0))
    grad_x = emulated.conv2d_input(w, x, *geometry, out=poisoned((1, 4, 5, 5), x.dtype, False))
    assert torch.equal(grad_x, torch.full_like(x, 4.0))
    depth = (*geometry[:3], 4)
    out = emulated.conv2d(x, w[:, :1], None, *depth, depthwise=True, out=poisoned((1, 4, 5, 5), x.dtype, False))
    assert torch.equal(out, x)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_empty_tensors(depthwise: bool) -> None:
    groups = 3 if depthwise else 1
    geometry = ((1, 1), (1, 1), (1, 1), groups)
    x, w = torch.randn(0, 3, 5, 5), torch.randn(6, 3 // groups, 3, 3)
    g = torch.randn(0, 6, 5, 5)
    emulated.conv2d(x, w, None, *geometry, depthwise=depthwise, out=poisoned(g.shape, x.dtype, False))
    emulated.conv2d_input(w, g, *geometry, depthwise=depthwise, out=poisoned(x.shape, x.dtype, False))
    grad_w = emulated.conv2d_weight(x, g, *geometry, depthwise=depthwise, out=poisoned(w.shape, x.dtype, False))
    assert torch.equal(grad_w, torch.zeros_like(w))


def virtual(elements: int) -> Tensor:
    """A bfloat16 buffer of which only the touched pages exist; starts as zeros."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value, which Python names from 3.13 on
    try:
        buffer = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"the system gives no {2 * elements} bytes of address space: {error}")
    return torch.frombuffer(buffer, dtype=torch.bfloat16)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("far", ["n", "c", "h", "w"])
def test_more_than_2_to_the_31_elements(far: str, depthwise: bool) -> None:
    """Neighbours along one dimension lie more than 2^31 elements apart, in every tensor."""
    step = 2**31 + 24
    size, groups = (2, 2, 2, 2), 2 if depthwise else 1
    geometry = ((1, 1), (1, 1), (1, 1), groups)
    strides = {"n": (step, 1, 4, 2), "c": (4, step, 2, 1), "h": (8, 1, step, 2), "w": (8, 1, 2, step)}[far]

    def distant() -> Tensor:
        return virtual(step + 64).as_strided(size, strides)

    x, g, out, grad_x = (distant() for _ in range(4))
    for tensor in (x, g):
        tensor.copy_(torch.randint(-3, 4, size))  # integers: everything below is exact
    for tensor in (out, grad_x):
        tensor.fill_(float("nan"))
    w = torch.randint(-3, 4, (2, 2 // groups, 3, 3)).bfloat16()
    emulated.conv2d(x, w, None, *geometry, depthwise=depthwise, out=out)
    emulated.conv2d_input(w, g, *geometry, depthwise=depthwise, out=grad_x)
    grad_w = emulated.conv2d_weight(x, g, *geometry, depthwise=depthwise, out=poisoned(w.shape, w.dtype, False))
    X, W, G = x.contiguous().float(), w.float(), g.contiguous().float()
    assert torch.equal(out.float(), framework_conv2d(X, W, None, *geometry))
    assert torch.equal(grad_x.float(), framework_conv2d_input(list(size), W, G, *geometry))
    assert torch.equal(grad_w.float(), framework_conv2d_weight(X, list(w.shape), G, *geometry))
