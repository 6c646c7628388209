"""domain_transform and its gradients: every backend that this machine can run, against the definition in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops.domain_transform import domain_transform, domain_transform_backward
from tests.repeats import assert_same_bits, built_isas, repeat_capped

BACKENDS = ("cpu", "reference")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
needs_cpu = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))

# Of values of order 1: a recursion of width s forgets a rounding error after about s positions, so a pass in float32 is off by
# some 30 of them (2**-24 each) at most. 16-bit results are rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# Size, channels of the edges, sigma_s, sigma_r, iterations.
PROBLEMS: dict[str, tuple[tuple[int, int, int, int], int, float, float, int]] = {
    "ragged tiles": ((2, 3, 37, 70), 1, 12.0, 0.7, 3),
    "rows and columns apart": ((1, 21, 20, 33), 2, 30.0, 2.0, 3),
    "long rows": ((1, 2, 3, 1100), 2, 60.0, 5.0, 1),
    "one pixel": ((3, 2, 1, 1), 1, 4.0, 1.0, 2),
    "one row": ((1, 2, 1, 9), 2, 4.0, 1.0, 2),
    "one column": ((1, 1, 19, 1), 2, 4.0, 1.0, 4),
    "empty batch": ((0, 2, 4, 4), 1, 4.0, 1.0, 2),
}


def _skip_unless_runnable(backend: str) -> None:
    if backend == "cpu" and native.cpu_missing() is not None:
        pytest.skip(str(native.cpu_missing()))


def _recursion(input: Tensor, edge: Tensor, sigma_s: float, sigma_r: float, iterations: int) -> Tensor:
    """The definition, pixel by pixel, as the papers write it."""
    out = input.clone()
    n, _, height, width = input.shape
    for k in range(1, iterations + 1):
        sigma = sigma_s * math.sqrt(3) * 2 ** (iterations - k) / math.sqrt(4**iterations - 1)
        w = torch.exp(-math.sqrt(2) / sigma * (1 + edge * sigma_s / sigma_r)).expand(n, 2, -1, -1)[:, :, None]
        for x in range(1, width):
            out[..., x] = (1 - w[:, 0, :, :, x]) * out[..., x] + w[:, 0, :, :, x] * out[..., x - 1]
        for x in reversed(range(width - 1)):
            out[..., x] = (1 - w[:, 0, :, :, x + 1]) * out[..., x] + w[:, 0, :, :, x + 1] * out[..., x + 1]
        for y in range(1, height):
            out[..., y, :] = (1 - w[:, 1, :, y]) * out[..., y, :] + w[:, 1, :, y] * out[..., y - 1, :]
        for y in reversed(range(height - 1)):
            out[..., y, :] = (1 - w[:, 1, :, y + 1]) * out[..., y, :] + w[:, 1, :, y + 1] * out[..., y + 1, :]
    return out


def _compare(problem: Any, dtype: torch.dtype, layout: str, backend: str) -> None:
    size, maps, *numbers = problem
    x = torch.randn(size, dtype=torch.float64).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    edge = (torch.rand(size[0], maps, *size[2:], dtype=torch.float64) * 3).to(dtype).requires_grad_()
    upstream = torch.randn(size, dtype=torch.float64).to(dtype)
    out = ak.domain_transform(x, edge, *numbers, backend=backend)
    assert out.dtype == dtype
    assert out.stride() == x.stride() or not x.numel()
    ours = [out, *torch.autograd.grad(out, [x, edge], upstream)]
    truths = [t.detach().double().requires_grad_() for t in (x, edge)]
    true = ak.domain_transform(*truths, *numbers, backend="reference")
    torch.testing.assert_close(true, _recursion(*(t.detach() for t in truths), *numbers), rtol=0, atol=1e-12)
    for a, b in zip(ours, [true, *torch.autograd.grad(true, truths, upstream.double())], strict=True):
        # The gradient of an edge is a sum over the channels, and for one map over both directions.
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double() / scale, b / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(name: str, dtype: torch.dtype, layout: str, backend: str, poison: None) -> None:
    _skip_unless_runnable(backend)
    if name == "long rows" and (backend, layout) != ("cpu", "nchw"):
        pytest.skip("the width of a tile depends on the length of the rows; only the compiled kernel has tiles")
    _compare(PROBLEMS[name], dtype, layout, backend)


@needs_cpu
@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    maps=st.integers(1, 2),
    sigma_s=st.floats(0.5, 60),
    sigma_r=st.floats(0.5, 60),
    iterations=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_random_problems(
    size: Any, maps: int, sigma_s: float, sigma_r: float, iterations: int, dtype: torch.dtype, layout: str
) -> None:
    _compare((size, maps, sigma_s, sigma_r, iterations), dtype, layout, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    _skip_unless_runnable(backend)
    x, edge = torch.randn(2, 3, 7, 8), torch.rand(2, 2, 7, 8)
    expected = ak.domain_transform(x, edge, 9.0, 1.0, backend=backend)
    wide, wide_edge = torch.full((4, 6, 14, 16), torch.nan), torch.full((4, 4, 14, 16), torch.nan)
    wide[::2, ::2, ::2, ::2], wide_edge[::2, ::2, ::2, ::2] = x, edge
    out = ak.domain_transform(wide[::2, ::2, ::2, ::2], wide_edge[::2, ::2, ::2, ::2], 9.0, 1.0, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    turned = edge.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    torch.testing.assert_close(ak.domain_transform(x, turned, 9.0, 1.0, backend=backend), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_it_does(backend: str) -> None:
    _skip_unless_runnable(backend)
    x = torch.zeros(1, 1, 30, 40)
    x[..., 20:] = 1
    edge = torch.zeros(1, 2, 30, 40)
    flat = ak.domain_transform(x, edge, 20.0, 1.0, backend=backend)
    assert flat[0, 0, 15, 19] > 0.3  # no edge: smoothed
    edge[:, 0, :, 20] = 1e6
    torch.testing.assert_close(ak.domain_transform(x, edge, 20.0, 1.0, backend=backend), x, rtol=0, atol=1e-6)
    ones = torch.ones(1, 2, 9, 9)  # weights of each position add up to one
    torch.testing.assert_close(ak.domain_transform(ones, torch.rand(1, 1, 9, 9), 5.0, 1.0, backend=backend), ones)
    # Extremes of every number stay numbers.
    for sigma_s, sigma_r, iterations in ((1e-30, 1e-30, 3), (1e30, 1e-30, 2), (1e-30, 1e30, 2), (4.0, 1.0, 150)):
        assert ak.domain_transform(x, edge, sigma_s, sigma_r, iterations, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, backend: str) -> None:
    _skip_unless_runnable(backend)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    for maps in (1, 2):
        edge = torch.rand(1, maps, 3, 4, dtype=torch.float64, requires_grad=True)

        def call(x: Tensor, edge: Tensor) -> Tensor:
            return ak.domain_transform(x, edge, 3.0, 0.8, 2, backend=backend)

        assert torch.autograd.gradcheck(call, (x, edge))
        assert torch.autograd.gradgradcheck(call, (x, edge))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    _skip_unless_runnable(backend)
    for layout in LAYOUTS.values():
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
        edge = torch.rand(2, 2, 4, 5, requires_grad=True)
        torch.library.opcheck(domain_transform, (x, edge, 4.0, 1.0, 2, backend))
        grad = torch.randn_like(x)
        torch.library.opcheck(domain_transform_backward, (grad, x.detach(), edge.detach(), 4.0, 1.0, 2, backend))


def test_compiles_whole_and_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, edge: ak.domain_transform(x, edge, 5.0, 1.0), fullgraph=True, backend="aot_eager", dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (9, 12, 17):
            x, edge = torch.randn(2, 3, size, size + 1, requires_grad=True), torch.rand(2, 1, size, size + 1, requires_grad=True)
            out = compiled(x, edge)
            torch.testing.assert_close(out, ak.domain_transform(x, edge, 5.0, 1.0))
            out.sum().backward()


@needs_cpu
def test_channels_in_parts() -> None:
    # So many passes that a gradient keeps the planes of a few channels at a time only.
    x, grad = (torch.randn(1, 16, 130, 150) for _ in range(2))
    edge, numbers = torch.rand(1, 2, 130, 150), (40.0, 1.0, 70, "cpu")
    of_input, of_edge = domain_transform_backward(grad, x, edge, *numbers)
    halves = [domain_transform_backward(grad[:, c : c + 8], x[:, c : c + 8], edge, *numbers) for c in (0, 8)]
    assert torch.equal(of_input, torch.cat([half[0] for half in halves], 1))
    torch.testing.assert_close(of_edge, halves[0][1] + halves[1][1], rtol=1e-5, atol=1e-5)


_BITS = """
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(2, 30, 90, 100).contiguous(memory_format=layout).requires_grad_()
    edge = torch.rand(2, 1, 90, 100, requires_grad=True)
    out = ak.domain_transform(x, edge, 30.0, 1.0, backend="cpu")
    results += [out, *torch.autograd.grad(out, [x, edge], torch.randn(x.shape))]
"""


@needs_cpu
def test_same_bits_for_any_number_of_threads_and_with_poisoned_scratch() -> None:
    assert_same_bits(_BITS)


@pytest.mark.parametrize("isa", [isa for isa in built_isas() if not isa.startswith("avx512")])
def test_every_instruction_set(isa: str) -> None:
    """Every problem again, capped and with poisoned memory; nothing here depends on which AVX-512 it is."""
    done = repeat_capped(isa, "against_float64 and cpu and (float32 or float64-)", __file__)
    assert done.returncode == 0, done.stdout


X, EDGE = torch.zeros(1, 3, 4, 5), torch.zeros(1, 1, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], EDGE, 1.0, 1.0), TypeError, "argument 'input' must be Tensor, not list"),
        ((X, None, 1.0, 1.0), TypeError, "argument 'edge' must be Tensor, not NoneType"),
        ((X[0], EDGE, 1.0, 1.0), ValueError, r"input of shape \[3, 4, 5\], torch.float32: expected floating-point \[N"),
        ((X.long(), EDGE, 1.0, 1.0), ValueError, r"input of shape \[1, 3, 4, 5\], torch.int64: expected floating-point"),
        ((X, EDGE.int(), 1.0, 1.0), ValueError, r"edge of shape \[1, 1, 4, 5\], torch.int32: expected floating-point"),
        ((X[:, :, :0], EDGE, 1.0, 1.0), ValueError, r"input of shape \[1, 3, 0, 5\], .* a channel and a pixel at least"),
        ((X, EDGE[..., 1:], 1.0, 1.0), ValueError, r"edge of shape \[1, 1, 4, 4\]: expected \[1, 1 or 2, 4, 5\]"),
        ((X, X, 1.0, 1.0), ValueError, r"edge of shape \[1, 3, 4, 5\]: expected \[1, 1 or 2, 4, 5\]"),
        ((X, EDGE - 1, 1.0, 1.0), ValueError, r"edge holds -1.0 at \[0, 0, 0, 0\]: expected finite values of at least 0"),
        ((X, EDGE + math.nan, 1.0, 1.0), ValueError, r"edge holds nan at \[0, 0, 0, 0\]"),
        ((X, EDGE + math.inf, 1.0, 1.0), ValueError, r"edge holds inf at \[0, 0, 0, 0\]"),
        ((X, EDGE, 0.0, 1.0), ValueError, "sigma_s=0.0: expected a number above 0"),
        ((X, EDGE, 1.0, -2), ValueError, "sigma_r=-2: expected a number above 0"),
        ((X, EDGE, math.nan, 1.0), ValueError, "sigma_s=nan"),
        ((X, EDGE, 1.0, math.inf), ValueError, "sigma_r=inf"),
        ((X, EDGE, 1.0, 1.0, 0), ValueError, "iterations=0: expected 1 or more"),
        ((X, EDGE, 1.0, 1.0, 1.5), ValueError, "iterations=1.5: expected 1 or more"),
    ],
)
def test_mistakes_name_the_value(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ak.domain_transform(*arguments)


@needs_cpu
def test_native_op_checks_its_arguments() -> None:
    op, gradient = torch.ops.atrous_native.domain_transform, torch.ops.atrous_native.domain_transform_backward
    edge = torch.zeros(1, 2, 4, 5)
    for arguments, message in (
        ((X, edge[:, :1], 1.0, 1.0, 1), r"edge: expected sizes \[1, 2, 4, 5\], but got \[1, 1, 4, 5\]"),
        ((X, edge.double(), 1.0, 1.0, 1), "edge: expected the dtype of input"),
        ((X.bfloat16(), edge.bfloat16(), 1.0, 1.0, 1), "input: expected float32 or float64, but got bfloat16"),
        ((X, edge, 0.0, 1.0, 1), "sigma_s: expected a width above 0, but got 0"),
        ((X, edge, 1.0, math.nan, 1), "sigma_r: expected a width above 0, but got nan"),
        ((X, edge, 1.0, 1.0, 0), "iterations: expected at least 1, but got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    with pytest.raises(RuntimeError, match=r"grad: expected sizes \[1, 3, 4, 5\], but got \[1, 2, 4, 5\]"):
        gradient(X[:, :2], X, edge, 1.0, 1.0, 1)


def test_explain() -> None:
    explanation = ak.explain("domain_transform", torch.empty(1, 21, 375, 500), torch.empty(1, 1, 375, 500), 50.0, 5.0)
    assert {choice.name for choice in explanation.choices} >= {"cpu", "reference"}
    assert "1x21x375x500, 3 iterations, float32 on cpu" in str(explanation)
    assert "141.8 MFLOP, 189.0 MB of memory traffic" in str(explanation)
