"""pyramid_pool and its gradient: every backend that this machine can run, against the framework in float64."""

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
from atrous_kernels.ops.pyramid_pool import pyramid_pool, pyramid_pool_input
from tests.repeats import assert_same_bits, built_isas, repeat_capped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("auto", "cpu", "torch", "reference", *(("cuda",) if DEVICE == "cuda" else ()))
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
MODES = ("avg", "max")
Bins = Sequence[int | tuple[int, int]]

# Averages of a few hundred unit normals: rounding of their sum stays below 1e-6 in fp32. 16-bit results round once (2**-9 for
# bf16, 2**-12 for fp16, relative); gradients sum the shares of several bins, each rounded by the framework before it adds them.
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-6),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
    torch.float16: dict(rtol=4e-3, atol=4e-3),
}

PROBLEMS: dict[str, tuple[tuple[int, int, int, int], Bins]] = {
    "PSPNet": ((2, 35, 12, 12), (1, 2, 3, 6)),
    "bins that do not divide": ((2, 70, 13, 17), (1, 2, 3, 6)),
    "one bin": ((1, 16, 9, 8), (1,)),
    "finer than the map": ((1, 5, 3, 4), (7, 2)),
    "pairs": ((2, 33, 10, 7), ((2, 3), 4, (1, 7))),
    "one pixel": ((3, 4, 1, 1), (1, 3)),
    "one channel": ((2, 1, 8, 40), (1, 6)),
    "wide": ((1, 130, 5, 67), (2, 3)),
    "empty batch": ((0, 4, 6, 6), (1, 2)),
}


def _skip_unless_runnable(backend: str, dtype: torch.dtype = torch.float32) -> None:
    try:
        ak.explain("pyramid_pool", torch.empty(1, 1, 2, 2, dtype=dtype, device=DEVICE), backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))


def _framework(x: Tensor, bins: Bins, mode: str) -> list[Tensor]:
    pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
    return [pool(x, level) for level in bins]


def _compare(size: Sequence[int], bins: Bins, mode: str, dtype: torch.dtype, layout: str, backend: str) -> None:
    # The maximum of small integers has ties, and its gradients are exact.
    x = torch.randn(*size, dtype=torch.float64) if mode == "avg" else torch.randint(-3, 4, size).double()
    x = x.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    truth = x.detach().double().requires_grad_()
    ours, theirs = ak.pyramid_pool(x, bins, mode=mode, backend=backend), _framework(truth, bins, mode)
    grads = [torch.randint(-2, 3, level.shape, device=DEVICE).double() for level in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **TOLERANCE[dtype])
    (ours_grad,) = torch.autograd.grad(ours, x, [g.to(dtype) for g in grads])
    (their_grad,) = torch.autograd.grad(theirs, truth, grads)
    assert ours_grad.stride() == x.stride() or x.numel() == 0
    torch.testing.assert_close(ours_grad.double(), their_grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(name: str, mode: str, dtype: torch.dtype, layout: str, backend: str, poison: None) -> None:
    _skip_unless_runnable(backend, dtype)
    _compare(*PROBLEMS[name], mode, dtype, layout, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    bins=st.lists(st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))), min_size=1, max_size=4),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_random_problems(size: Any, bins: Bins, mode: str, dtype: torch.dtype, layout: str, backend: str) -> None:
    _skip_unless_runnable(backend, dtype)
    _compare(size, bins, mode, dtype, layout, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_any_strides(mode: str, backend: str) -> None:
    _skip_unless_runnable(backend)
    wide = torch.full((4, 10, 14, 16), torch.nan, device=DEVICE)
    wide[::2, ::2, ::2, ::2] = torch.randint(-3, 4, (2, 5, 7, 8)).float()
    ones = torch.ones(1, 1, 4, 5, device=DEVICE)
    for x in (wide[::2, ::2, ::2, ::2], wide[::2, ::2, ::2, ::2].flip(2), ones.expand(2, 3, 4, 5)):
        for a, b in zip(ak.pyramid_pool(x, (1, 3), mode=mode, backend=backend), _framework(x, (1, 3), mode), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maximum_follows_the_framework_on_infinities_and_nan(layout: str, backend: str) -> None:
    # The first maximum wins, and a NaN wins over everything: the last one, in the order of reading.
    _skip_unless_runnable(backend)
    x = torch.randint(-1, 2, (2, 33, 9, 20), device=DEVICE).float()
    x[0, 0] = -torch.inf
    x[0, 1, 2:5, 3:7] = torch.inf
    if backend != "reference":  # the reference takes the first NaN
        x[1, 5:20, 4, ::3] = torch.nan
    x = x.contiguous(memory_format=LAYOUTS[layout])
    values, index = pyramid_pool(x, [1, 1, 2, 2, 3, 3], True, backend)
    begin = 0
    for level in (1, 2, 3):
        expected, at = F.adaptive_max_pool2d(x, level, return_indices=True)
        here = slice(begin, begin + level * level)
        begin = here.stop
        torch.testing.assert_close(values[:, here].transpose(1, 2), expected.flatten(2), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(index[:, here].transpose(1, 2), at.flatten(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, mode: str, backend: str) -> None:
    _skip_unless_runnable(backend, torch.float64)
    # Far apart, so that no step of the finite difference changes which value is the largest.
    x = torch.randperm(2 * 2 * 5 * 4, device=DEVICE).double().reshape(2, 2, 5, 4) / 8
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(ak.pyramid_pool(x, (1, 2, (3, 2)), mode=mode, backend=backend))

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maximum", [False, True])
def test_opcheck(maximum: bool, backend: str) -> None:
    _skip_unless_runnable(backend)
    bins = [1, 1, 2, 3]
    for layout in LAYOUTS.values():
        x = torch.randn(2, 3, 7, 6, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
        torch.library.opcheck(pyramid_pool, (x, bins, maximum, backend))
        _, index = pyramid_pool(x, bins, maximum, backend)
        grad = torch.randn(2, 7, 3, device=DEVICE, requires_grad=True)
        arguments = (grad, index, x.shape, bins, maximum, layout is torch.channels_last, backend)
        torch.library.opcheck(pyramid_pool_input, arguments)


def test_compiles_whole_and_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ak.pyramid_pool(x), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (9, 12, 17):
            x = torch.randn(2, 3, size, size + 1, requires_grad=True)
            out = compiled(x)
            for a, b in zip(out, _framework(x, (1, 2, 3, 6), "avg"), strict=True):
                torch.testing.assert_close(a, b)
            sum(level.sum() for level in out).backward()


_BITS = """
for layout in (torch.contiguous_format, torch.channels_last):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 300, 31, 29).to(dtype).contiguous(memory_format=layout).requires_grad_()
        for mode in ("avg", "max"):
            out = ak.pyramid_pool(x, mode=mode, backend="cpu")
            results += [*out, *torch.autograd.grad(out, x, [torch.ones_like(level) for level in out])]
"""


@pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
def test_same_bits_for_any_number_of_threads_and_with_poisoned_scratch() -> None:
    assert_same_bits(_BITS)


@pytest.mark.parametrize("isa", built_isas())
def test_every_instruction_set(isa: str) -> None:
    """Every problem again, capped and with poisoned memory."""
    done = repeat_capped(isa, "against_float64 and cpu", __file__)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
def test_addresses_beyond_32_bits() -> None:
    # 2.2 billion bf16 values; memory that nobody touches is never given to the process, so it costs one read of zeros.
    x = torch.zeros(1, 70_000, 178, 178, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[0, -1] = 3
    (out,) = ak.pyramid_pool(x, (1,), backend="cpu")
    assert out[0, -1].item() == 3.0
    assert out.sum().item() == 3.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "must be Tensor, not list"),
        ((torch.zeros(3, 4, 4),), ValueError, r"shape \[3, 4, 4\], torch.float32: expected floating-point \[N, C, H, W\]"),
        ((torch.zeros(1, 3, 4, 4, dtype=torch.int64),), ValueError, "torch.int64: expected floating-point"),
        ((torch.zeros(1, 3, 0, 4),), ValueError, r"\[1, 3, 0, 4\]: expected at least one channel and one pixel"),
        ((torch.zeros(1, 3, 4, 4), ()), ValueError, r"bins=\(\): expected one grid per level"),
        ((torch.zeros(1, 3, 4, 4), 3), ValueError, "bins=3: expected one grid per level"),
        ((torch.zeros(1, 3, 4, 4), (1, 0)), ValueError, r"bins=\(1, 0\): 0 is not a positive integer or a pair"),
        ((torch.zeros(1, 3, 4, 4), ((1, 2, 3),)), ValueError, r"\(1, 2, 3\) is not a positive integer or a pair"),
    ],
)
def test_mistakes_name_the_value(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ak.pyramid_pool(*arguments)


def test_unknown_mode_and_backend() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="mode='sum': expected 'avg' or 'max'"):
        ak.pyramid_pool(x, mode="sum")
    with pytest.raises(ValueError, match="unknown backend 'gpu': expected one of auto, cpu, triton, cuda, torch, reference"):
        ak.pyramid_pool(x, backend="gpu")


def test_native_op_checks_its_arguments() -> None:
    if native.cpu_missing() is not None:
        pytest.skip(str(native.cpu_missing()))
    op, gradient = torch.ops.atrous_native.pyramid_pool, torch.ops.atrous_native.pyramid_pool_input
    x, index = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"bins: expected pairs \(rows, columns\), but got \[1, 2, 3\]"):
        op(x, [1, 2, 3], False)
    with pytest.raises(RuntimeError, match=r"grad: expected sizes \[1, 4, 2\], but got \[1, 3, 2\]"):
        gradient(torch.zeros(1, 3, 2), index, [1, 2, 4, 4], [2, 2], True, False)
    with pytest.raises(RuntimeError, match="index: expected pixels of a plane of 16, but got 16"):
        gradient(torch.zeros(1, 4, 2), index + 16, [1, 2, 4, 4], [2, 2], True, False)


def test_explain() -> None:
    explanation = ak.explain("pyramid_pool", torch.empty(2, 2048, 60, 60))
    assert {choice.name for choice in explanation.choices} == {"cpu", "triton", "cuda", "torch", "reference"}
    assert "2x2048x60x60 to 1x1, 2x2, 3x3, 6x6, average, float32 on cpu" in str(explanation)
    assert "50 bins per channel, at least 59.8 MB" in str(explanation)
    half = ak.explain("pyramid_pool", torch.empty(1, 2, 4, 4, dtype=torch.float16), mode="max")
    assert half.chosen == "torch"
    many = ak.explain("pyramid_pool", torch.empty(1, 2, 4, 4), (1,) * 17)
    assert "its plan holds 16 levels, not 17" in str(many)
