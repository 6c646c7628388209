"""Winograd's algorithm: forward pass and both gradients against float64, its cached weights, when it is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

import atrous_kernels as ak
from atrous_kernels import dispatch, native, tuned
from atrous_kernels.problem import ConvProblem, winograd_tile
from tests.repeats import assert_same_bits_for_threads, built_isas, repeat_capped

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))

# Rounding errors relative to the root mean square of the result, for standard normal operands. A sum of K products errs by
# about sqrt(K) * 2**-24 of the products' size, which is the size of the result; the transforms magnify that by the norms of
# their matrices: a few times for tiles of 2, some twenty for 3 and 4. The largest of thousands of errors is five deviations out.
TOLERANCE = {2: 1e-5, 3: 4e-5, 4: 4e-5}

# batch, in, out, size, padding, rate, groups
CASES = {
    "plain": (2, 20, 36, (13, 9), (1, 1), (1, 1), 1),
    "ASPP": (1, 48, 64, (17, 17), (6, 6), (6, 6), 1),
    "rates differ": (1, 16, 16, (15, 22), (3, 5), (2, 5), 1),
    "rate beyond the image": (2, 8, 9, (5, 7), (9, 9), (9, 9), 1),
    "phases of two pixels and one": (2, 24, 40, (9, 13), (6, 8), (6, 8), 1),
    "short phases along one axis": (2, 16, 20, (7, 22), (5, 5), (5, 5), 1),
    "short phases, wider padding": (1, 8, 8, (7, 8), (6, 9), (4, 6), 1),
    "two pixels whose neighbours count": (1, 8, 8, (9, 9), (3, 3), (4, 4), 1),
    "padding beyond the image": (1, 8, 8, (4, 4), (9, 6), (1, 2), 1),
    "no padding": (1, 33, 17, (11, 12), (0, 0), (2, 1), 1),
    "groups": (2, 24, 40, (8, 9), (2, 2), (2, 2), 2),
    "one pixel": (1, 5, 3, (1, 1), (1, 1), (1, 1), 1),
    "few channels": (3, 1, 2, (6, 5), (1, 1), (1, 1), 1),
    "more than one panel": (1, 70, 150, (6, 6), (1, 1), (1, 1), 1),
    "empty batch": (0, 8, 8, (6, 6), (1, 1), (1, 1), 1),
}


def _three(x: Tensor, w: Tensor, b: Tensor | None, tile: int, geometry: tuple) -> list[Tensor]:
    """Output, input gradient, weight gradient by our kernels, for the output gradient _grad_of(output)."""
    ops = torch.ops.atrous_native
    out = ops.conv2d_winograd(x, w, None, b, *geometry, tile)
    g = _grad_of(out)
    return [
        out,
        ops.conv2d_input_winograd(list(x.shape), w, None, g, *geometry, tile),
        ops.conv2d_weight_winograd(x, list(w.shape), g, *geometry, tile),
    ]


def _grad_of(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator).contiguous(memory_format=_layout(out))


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.contiguous_format if tensor.is_contiguous() else torch.channels_last


def _check(case: tuple, tile: int, layout: torch.memory_format) -> None:
    batch, c, o, size, padding, rate, groups = case
    x, w, b = torch.randn(batch, c, *size), torch.randn(o, c // groups, 3, 3), torch.randn(o)
    x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
    geometry = ((1, 1), padding, rate, groups)
    out, grad_input, grad_weight = _three(x, w, b, tile, geometry)
    g = _grad_of(out).double()
    truths = [
        F.conv2d(x.double(), w.double(), b.double(), *geometry),
        conv2d_input(x.shape, w.double(), g, *geometry),
        conv2d_weight(x.double(), w.shape, g, *geometry),
    ]
    for ours, truth in zip((out, grad_input, grad_weight), truths, strict=True):
        assert ours.shape == truth.shape
        if truth.numel():
            # Where few taps are valid, results are small beside the values that pass through the transforms.
            scale = max(truth.square().mean().sqrt().item(), 1.0)
            assert (ours - truth).abs().max().item() / scale < TOLERANCE[tile]


@pytest.mark.parametrize("tile", [2, 3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, layout: torch.memory_format, tile: int, poison: None) -> None:
    _check(CASES[case], tile, layout)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(
        st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.tuples(st.integers(1, 19), st.integers(1, 19)),
        st.tuples(st.integers(0, 9), st.integers(0, 9)), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.just(1),
    ).filter(lambda c: all(n + 2 * p > 2 * r for n, p, r in zip(c[3], c[4], c[5], strict=True))),
    st.sampled_from([2, 3, 4]),
    st.booleans(),
)  # fmt: skip
def test_any_geometry(case: tuple, tile: int, channels_last: bool) -> None:
    _check(case, tile, torch.channels_last if channels_last else torch.contiguous_format)


def test_integers_are_exact_with_tiles_of_two() -> None:
    # Its matrices hold 0, 1 and 1/2 only.
    x, w = torch.randint(-3, 4, (2, 24, 12, 11)).float(), torch.randint(-3, 4, (20, 24, 3, 3)).float()
    geometry = ((1, 1), (2, 2), (2, 2), 1)
    ops = torch.ops.atrous_native
    out = ops.conv2d_winograd(x, w, None, None, *geometry, 2)
    assert torch.equal(out, F.conv2d(x.double(), w.double(), None, *geometry).float())
    g = torch.randint(-3, 4, out.shape).float()
    grad_input = ops.conv2d_input_winograd(list(x.shape), w, None, g, *geometry, 2)
    assert torch.equal(grad_input, conv2d_input(x.shape, w.double(), g.double(), *geometry).float())


@pytest.mark.parametrize("tile", [2, 3, 4])
def test_error_stays_within_what_the_documentation_says(tile: int) -> None:
    # Root mean square relative to the result's, for 512 channels of a ReLU's output: the bounds that docs/kernels.md gives.
    x, w = torch.randn(1, 512, 24, 24).relu(), torch.randn(64, 512, 3, 3) / 68
    out = torch.ops.atrous_native.conv2d_winograd(x, w, None, None, (1, 1), (2, 2), (2, 2), 1, tile)
    truth = F.conv2d(x.double(), w.double(), None, 1, 2, 2)
    error = (out - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < {2: 1e-6, 3: 3e-6, 4: 3e-6}[tile]


def test_same_bits_for_any_number_of_threads() -> None:
    x, w = torch.randn(3, 64, 21, 22), torch.randn(96, 64, 3, 3)
    assert_same_bits_for_threads(lambda: _three(x, w, None, 4, ((1, 1), (2, 2), (2, 2), 1)))


def test_many_blocks_of_tiles() -> None:
    # 36 points of 64 + 64 channels: more than 16 MiB of transformed values, so several blocks.
    case = (2, 64, 64, (100, 90), (1, 1), (1, 1), 1)
    _check(case, 4, torch.contiguous_format)


@pytest.mark.parametrize("isa", built_isas())
def test_every_instruction_set(isa: str) -> None:
    """Part of this module again, capped and with poisoned memory."""
    done = repeat_capped(isa, "float64 or integers or threads or blocks", __file__)
    assert done.returncode == 0, done.stdout


ONES = ([1, 1], [1, 1], [1, 1], 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, x, w: ops.conv2d_winograd(x, w, None, None, *ONES, 5), "tile: expected 2, 3 or 4, but got 5"),
        (lambda ops, x, w: ops.conv2d_winograd(x, w, None, None, [2, 1], *ONES[1:], 2), "expected 3x3 and stride 1"),
        (lambda ops, x, w: ops.conv2d_winograd(x.double(), w.double(), None, None, *ONES, 2), "expected float32"),
        (lambda ops, x, w: ops.conv2d_winograd(x, w, w, None, *ONES, 2), "transformed: expected"),
        (lambda ops, x, w: ops.winograd_weight(w[0], x.shape, *ONES, 2, False), "expected 4 dimensions"),
        (lambda ops, x, w: ops.fingerprint(x[:, :1]), "memory without gaps"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.atrous_native, torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3))


# Choice ---------------------------------------------------------------------------------------------------------------


def _explain(size: int = 33, channels: int = 256, rate: int = 2, **changes) -> ak.Explanation:
    x, w = torch.empty(1, channels, size, size), torch.empty(channels, channels, 3, 3)
    return ak.explain("conv2d", x, w, padding=rate, dilation=rate, **changes)


def test_the_cost_model_takes_it_where_it_saves_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "table", dict)
    dispatch.forget()
    assert _explain(rate=1).chosen == _explain(rate=4).chosen == "winograd"
    assert _explain(rate=18).chosen == "winograd"  # phases of two pixels
    assert _explain(rate=33).chosen != "winograd"
    assert _explain(channels=16).chosen != "winograd"


def test_ieee_precision_leaves_it_out() -> None:
    x, w = torch.randn(1, 64, 33, 33), torch.randn(64, 64, 3, 3)
    fast = ak.conv2d(x, w, padding=1)
    with ak.precision("ieee"):
        assert "is set" in str(_explain())
        with pytest.raises(RuntimeError, match=r'precision\("ieee"\) is set'):
            ak.conv2d(x, w, padding=1, backend="winograd")
        exact = ak.conv2d(x, w, padding=1)
    assert not torch.equal(fast, exact)
    assert torch.equal(ak.conv2d(x, w, padding=1), fast)
    with pytest.raises(ValueError, match="unknown precision 'tf32': expected 'fast' or 'ieee'"), ak.precision("tf32"):
        pass


def test_the_tile_is_the_one_that_fits_the_phases() -> None:
    problem = ConvProblem(1, 256, 256, (33, 33), (3, 3), padding=(12, 12), dilation=(12, 12))
    assert winograd_tile(problem) == 3  # phases of 2 and 3 pixels


def test_backward_through_the_module_matches_the_framework() -> None:
    ours = ak.nn.Conv2d(40, 48, 3, padding=3, dilation=3, backend="winograd")
    theirs = torch.nn.Conv2d(40, 48, 3, padding=3, dilation=3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 40, 14, 15)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    grads = []
    for module, leaf in zip((ours, theirs), leaves, strict=True):
        grads.append(torch.autograd.grad(module(leaf).square().sum(), (leaf, *module.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
