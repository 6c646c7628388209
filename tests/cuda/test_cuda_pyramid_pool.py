"""The CUDA kernels of pyramid pooling, really executed: the same source compiled for the host, through the public op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_conv2d import virtual
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels.ops.pyramid_pool import pyramid_pool, pyramid_pool_input
from atrous_kernels.reference import pyramid_pool as reference
from tests.ops import test_pyramid_pool as of_pool
from tests.ops.test_pyramid_pool import LAYOUTS, MODES, PROBLEMS, TOLERANCE, _compare, _framework

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")


@pytest.fixture(autouse=True, scope="module")
def _emulation() -> Iterator[None]:
    with emulated.as_cuda_backend("pyramid_pool", "pyramid_pool_input"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_pool, "DEVICE", "cpu")  # whatever else the machine has
        yield


# What only these kernels have: cells and channels in several blocks, more cells than a launch takes.
CASES = PROBLEMS | {
    "channels beyond a block": ((1, 264, 3, 5), (1, 2)),
    "rows cut for more blocks": ((1, 8, 40, 9), (1,)),
    "more cells than a launch takes": ((1, 2, 3, 70), ((1, 70), (3, 2))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, mode: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    _compare(*CASES[name], mode, dtype, layout, "cuda")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 15), st.integers(1, 15)),
    bins=st.lists(st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))), min_size=1, max_size=4),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(list(TOLERANCE)),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_random_problems(size: Any, bins: Any, mode: str, dtype: torch.dtype, layout: str) -> None:
    _compare(size, bins, mode, dtype, layout, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_any_strides_and_alignments(mode: str, dtype: torch.dtype) -> None:
    wide = torch.full((4, 10, 14, 16), torch.nan)
    wide[::2, ::2, ::2, ::2] = torch.randint(-3, 4, (2, 5, 7, 8)).float()
    wide = wide.to(dtype)
    off_by_one = torch.randn(1 + 2 * 6 * 5 * 16).to(dtype)[1:].view(2, 6, 5, 16).permute(0, 3, 1, 2)
    views = wide[::2, ::2, ::2, ::2], wide[::2, ::2, ::2, ::2].flip(2), torch.ones(1, 1, 4, 5, dtype=dtype).expand(2, 3, 4, 5)
    for x in (*views, off_by_one):
        ours = ak.pyramid_pool(x, (1, 3), mode=mode, backend="cuda")
        for a, b in zip(ours, _framework(x.double(), (1, 3), mode), strict=True):
            torch.testing.assert_close(a.double(), b, **TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maximum_follows_the_framework_on_infinities_and_nan(layout: str) -> None:
    # The first maximum wins, and a NaN wins over everything: the last one, in the order of reading.
    x = torch.randint(-1, 2, (2, 9, 9, 20)).float()
    x[0, 0] = -torch.inf
    x[0, 1, 2:5, 3:7] = torch.inf
    x[1, 5:8, 4, ::3] = torch.nan
    x = x.contiguous(memory_format=LAYOUTS[layout])
    values, index = pyramid_pool(x, [1, 1, 2, 2, 3, 3], True, "cuda")
    begin = 0
    for level in (1, 2, 3):
        expected, at = F.adaptive_max_pool2d(x, level, return_indices=True)
        here = slice(begin, begin + level * level)
        begin = here.stop
        torch.testing.assert_close(values[:, here].transpose(1, 2), expected.flatten(2), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(index[:, here].transpose(1, 2), at.flatten(2))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    # Far apart, so that no step of the finite difference changes which value is the largest.
    x = (torch.randperm(2 * 2 * 4 * 3).double().reshape(2, 2, 4, 3) / 8).requires_grad_()

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(ak.pyramid_pool(x, (1, (3, 2)), mode=mode, backend="cuda"))

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_order_of_threads_changes_no_bit(mode: str, layout: str) -> None:
    """Bitwise repeatable, also with the threads of a block in other orders: no barrier is missing, nothing races."""
    results = []
    try:
        for kind, seed in (("ascending", 0), ("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)):
            emulated.schedule(kind, seed)
            torch.manual_seed(3)
            x = torch.randn(2, 12, 7, 9).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
            out = ak.pyramid_pool(x, (1, 2, 3), mode=mode, backend="cuda")
            results.append([*out, *torch.autograd.grad(out, x, [torch.randn_like(level) for level in out])])
    finally:
        emulated.schedule("ascending")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("far", ["n", "c", "h", "w"])
@pytest.mark.parametrize("maximum", [False, True])
def test_more_than_2_to_the_31_elements(maximum: bool, far: str) -> None:
    """Neighbours along one dimension lie more than 2^31 elements apart."""
    step = 2**31 + 24
    strides = {"n": (step, 1, 4, 2), "c": (4, step, 2, 1), "h": (8, 1, step, 2), "w": (8, 1, 2, step)}[far]
    x = virtual(step + 64).as_strided((2, 2, 2, 2), strides)
    x.copy_(torch.randint(-3, 4, x.shape))
    values, index = emulated.ops().pyramid_pool(x, [1, 1, 2, 2], maximum)
    expected, expected_index = reference.pyramid_pool(x.contiguous(), [1, 1, 2, 2], maximum)
    assert torch.equal(values, expected)
    assert torch.equal(index, expected_index)


def test_indices_outside_the_plane_are_skipped() -> None:
    grad = torch.ones(1, 2, 1)
    index = torch.tensor([-1, 4]).view(1, 2, 1)
    out = pyramid_pool_input(grad, index, [1, 1, 2, 2], [1, 2], True, False, "cuda")
    assert torch.equal(out, torch.zeros(1, 1, 2, 2))


def test_too_many_levels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="bins: expected at most 16 levels, but got 17"):
        emulated.ops().pyramid_pool(torch.ones(1, 1, 2, 2), [1, 1] * 17, False)
