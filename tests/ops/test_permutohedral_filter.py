"""The permutohedral lattice, the filter through it and mean field inference: every backend that this machine can run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops.mean_field import NORMALIZATIONS, mean_field
from atrous_kernels.ops.permutohedral_filter import permutohedral_filter, permutohedral_filter_weights
from atrous_kernels.ops.permutohedral_lattice import permutohedral_lattice
from atrous_kernels.reference.permutohedral_filter import gaussian_filter
from tests.repeats import assert_same_bits, assert_same_bits_for_threads, built_isas, repeat_capped

BACKENDS = ("cpu", "reference")
needs_cpu = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))

# Sums of a few thousand products of numbers below 1, relative to their size; the blur multiplies values by up to 2^(d + 1).
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.float64: dict(rtol=1e-11, atol=1e-11)}


def _skip_unless_runnable(backend: str) -> None:
    if backend == "cpu" and native.cpu_missing() is not None:
        pytest.skip(str(native.cpu_missing()))


def _features(n: int, d: int, height: int, width: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    """Some positions are equal, others far apart, as pixels are."""
    x = torch.randn(n, d, height, width, dtype=dtype) * spread
    x[:, :, ::2, ::3] = x[:, :, :1, :1].clone()
    return x


LATTICES: dict[str, Any] = dict(
    n=st.integers(0, 3),
    d=st.integers(1, 6),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)


def check_lattice(backend: str, n: int, d: int, size: tuple[int, int], dtype: torch.dtype, spread: float, seed: int) -> None:
    """That the lattice of features drawn so is the reference's."""
    torch.manual_seed(seed)
    features = _features(n, d, *size, dtype, spread)
    ours, truth = (ak.permutohedral_lattice(features, backend=one) for one in (backend, "reference"))
    for a, b in zip(ours, truth, strict=True):
        # Both round alike, so integers and order agree exactly; weights are differences of coordinates of up to 12 spread.
        torch.testing.assert_close(a, b, rtol=0, atol=200 * spread * torch.finfo(dtype).eps if a.is_floating_point() else 0)


@needs_cpu
@settings(max_examples=60, deadline=None)
@given(**LATTICES)
def test_the_lattice_is_that_of_the_definition(**case: Any) -> None:
    check_lattice("cpu", **case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_lattice_is(backend: str) -> None:
    _skip_unless_runnable(backend)
    lattice = ak.permutohedral_lattice(_features(2, 5, 9, 7), backend=backend)
    torch.testing.assert_close(lattice.weights.sum(-1), torch.ones(2, 9, 7))
    assert lattice.weights.min() > -1e-5
    vertices, count = lattice.vertices.long(), lattice.begin.numel() - 1
    assert vertices.flatten(0, -2).sort(-1).values.diff(dim=-1).min() > 0  # corners differ
    assert not set(vertices[0].flatten().tolist()) & set(vertices[1].flatten().tolist())
    for axis in lattice.neighbours.long():
        for side in (0, 1):
            known = axis[:, side] < count
            assert torch.equal(axis[axis[known, side], 1 - side], torch.arange(count)[known])  # neighbours are mutual
    dense = torch.zeros(2 * 9 * 7, count).scatter_(1, vertices.view(126, -1), lattice.weights.view(126, -1))
    row = torch.arange(count).repeat_interleave(lattice.begin.diff())
    other = torch.zeros(126, count).index_put_((lattice.points.long(), row), lattice.point_weights)
    assert torch.equal(dense, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 6])
def test_near_the_exact_gaussian(d: int, backend: str) -> None:
    """A dense grid or cloud, many points per vertex; the paper's own error of the splat-blur-slice kernel is a few per cent."""
    _skip_unless_runnable(backend)
    features = torch.rand(1, d, 40, 40, dtype=torch.float64) * 4
    values = torch.rand(1, 2, 40, 40, dtype=torch.float64)
    ours = ak.permutohedral_filter(values, features, backend=backend)
    rows = [t.flatten(2).transpose(1, 2) for t in (values, features)]
    truth = gaussian_filter(*rows).transpose(1, 2).view(values.shape)
    ours, truth = (t[:, :1] / t[:, 1:] for t in (ours, truth))  # the ratio is free of the scale
    assert (ours / truth - 1).abs().mean() < 0.03


@needs_cpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 11, 16, 21, 33, 64, 70, 150])
def test_against_the_definition(channels: int, dtype: torch.dtype, poison: None) -> None:
    for n, d, height, width in ((2, 5, 13, 11), (1, 2, 30, 1), (1, 6, 1, 1), (0, 3, 4, 4)):
        features, values = _features(n, d, height, width, dtype), torch.randn(n, channels, height, width, dtype=dtype)
        lattice = ak.permutohedral_lattice(features)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = values.contiguous(memory_format=layout)
            ours, truth = (ak.permutohedral_filter(x, lattice, backend=backend) for backend in BACKENDS)
            torch.testing.assert_close(ours, truth, **TOLERANCE[dtype])
        arrays = lattice.arrays()
        grad, rows = torch.randn(2, n * height * width, channels, dtype=dtype)
        for reverse in (False, True):
            ours, truth = (permutohedral_filter_weights(grad, rows, *arrays, reverse, backend) for backend in BACKENDS)
            torch.testing.assert_close(ours, truth, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-3 * channels**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_values_are_computed_in_float32(dtype: torch.dtype, backend: str) -> None:
    _skip_unless_runnable(backend)
    features, values = _features(1, 3, 8, 9), torch.randn(1, 4, 8, 9).to(dtype)
    ours = ak.permutohedral_filter(values, features, backend=backend)
    assert ours.dtype == dtype
    assert torch.equal(ours, ak.permutohedral_filter(values.float(), features, backend=backend).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_spatial_dimensions(backend: str) -> None:
    _skip_unless_runnable(backend)
    wide = torch.randn(2, 6, 10, 12)
    features, values = (
        torch.rand(2, 6, 5, 8).transpose(2, 3)[:, ::2],
        wide[
            :,
            ::2,
            ::2,
        ][..., 2:7].transpose(2, 3),
    )
    features, values = features[:, :, :5], values[:, :, :5]
    expected = ak.permutohedral_filter(values.contiguous(), features.contiguous(), backend=backend)
    assert torch.equal(ak.permutohedral_filter(values, features, backend=backend), expected)
    lines = ak.permutohedral_filter(values.flatten(2), features.flatten(2), backend=backend)
    assert torch.equal(lines, expected.flatten(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_gradients(d: int, backend: str) -> None:
    _skip_unless_runnable(backend)
    # Ranks of coordinates change where the filter has a kink; finite steps of 1e-6 do not meet one at random positions.
    features = torch.randn(2, d, 3, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(values: Tensor, features: Tensor) -> Tensor:
        return ak.permutohedral_filter(values, features, backend=backend)

    assert torch.autograd.gradcheck(call, (values, features))
    assert torch.autograd.gradgradcheck(lambda values: call(values, features.detach()), (values,))
    with pytest.raises(NotImplementedError, match="differentiable once only"):
        torch.autograd.gradgradcheck(lambda features: call(values, features), (features,))


@needs_cpu
def test_the_adjoint_has_its_axes_reversed() -> None:
    lattice = ak.permutohedral_lattice(_features(1, 5, 12, 9, torch.float64))
    x, y = torch.randn(2, 108, 4, dtype=torch.float64)
    forward, back = (permutohedral_filter(t, *lattice.arrays(), reverse, "cpu") for t, reverse in ((x, False), (y, True)))
    torch.testing.assert_close((forward * y).sum(), (x * back).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    _skip_unless_runnable(backend)
    features = torch.randn(2, 12, 3)
    torch.library.opcheck(permutohedral_lattice, (features, backend))
    # opcheck's own sum of outputs fails where the first is an integer and a gradient is asked for; test_gradients takes those.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(permutohedral_lattice, (features.requires_grad_(), backend), test_utils=utils)
    lattice = ak.permutohedral_lattice(features.detach().transpose(1, 2), backend=backend).arrays()
    values = torch.randn(24, 5, requires_grad=True)
    torch.library.opcheck(permutohedral_filter, (values, *lattice, False, backend))
    torch.library.opcheck(permutohedral_filter_weights, (torch.randn(24, 5), values.detach(), *lattice, True, backend))
    torch.library.opcheck(mean_field, (values.detach(), list(lattice), [torch.randn(5)], [torch.rand(24)], [], 2, backend))


def test_exports_and_compiles_whole() -> None:
    class Filter(torch.nn.Module):
        def forward(self, values: Tensor, features: Tensor) -> Tensor:
            return ak.permutohedral_filter(values, features)

    values, features = torch.randn(2, 3, 6, 5), torch.randn(2, 2, 6, 5)
    expected = ak.permutohedral_filter(values, features)
    exported = torch.export.export(Filter(), (values, features)).module()
    torch.testing.assert_close(exported(values, features), expected)
    torch._dynamo.reset()
    compiled = torch.compile(Filter(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, features), expected)


@needs_cpu
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("channels", [1, 2, 5, 16, 21, 40])
def test_mean_field_against_the_definition(channels: int, normalization: str, poison: None) -> None:
    for n, height, width in ((2, 13, 11), (1, 1, 17), (1, 1, 1), (0, 3, 3)):
        unary = torch.randn(n, channels, height, width) * 2
        lattices = [ak.permutohedral_lattice(_features(n, d, height, width)) for d in (5, 2)]
        scale = 0.01 if normalization in ("none", "before") else 1.0  # so that softmax does not saturate
        compatibilities = [-2 * scale * torch.rand(channels), scale * torch.randn(channels, channels)]
        ours, truth = (
            ak.mean_field(unary, lattices, compatibilities, 5, normalization=normalization, backend=backend)
            for backend in BACKENDS
        )
        # Differences of unary of 1e-5 move a marginal by as much, and each iteration passes them on about once.
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)
    assert torch.equal(ak.mean_field(unary, [], [], 3), (-unary).softmax(1))


@needs_cpu
@pytest.mark.parametrize("channels", [3, 21, 70])
def test_mean_field_a_few_channels_at_a_time(channels: int, poison: None) -> None:
    """Of large images; the same bits, from energies of any strides."""
    features = _features(1, 5, 23, 31)
    grid = torch.stack(torch.meshgrid(torch.arange(23.0), torch.arange(31.0), indexing="ij"))[None]
    lattices = [array for x in (features, grid) for array in ak.permutohedral_lattice(x).arrays()]
    unary = torch.randn(channels, 23 * 31).T
    factors = [-2 * torch.rand(channels), -torch.rand(channels)]
    run = torch.ops.atrous_native.mean_field
    whole = run(unary, lattices, factors, [], [], 4)
    assert torch.equal(whole, run(unary, lattices, factors, [], [], 4, most_vertex_bytes=1))
    assert torch.equal(whole, run(unary.contiguous(), lattices, factors, [], [], 4))
    mixing = [factors[0], torch.randn(channels, channels)]  # all channels at once, whatever it takes
    assert torch.equal(run(unary, lattices, mixing, [], [], 2), run(unary, lattices, mixing, [], [], 2, most_vertex_bytes=1))


@needs_cpu
def test_mean_field_is_for_inference() -> None:
    unary = torch.randn(1, 3, 4, 4, requires_grad=True)
    lattice = ak.permutohedral_lattice(_features(1, 2, 4, 4))
    with pytest.raises(NotImplementedError, match="for inference"):
        ak.mean_field(unary, [lattice], [torch.ones(3)]).sum().backward()


def _everything() -> list[Tensor]:
    torch.manual_seed(0)
    features = _features(2, 5, 70, 61, spread=1.0)
    features.requires_grad_()
    values = torch.randn(2, 21, 70, 61, requires_grad=True)
    lattice = ak.permutohedral_lattice(features, backend="cpu")
    out = ak.permutohedral_filter(values, lattice, backend="cpu")
    grads = torch.autograd.grad(out, [values, features], torch.ones_like(out))
    marginals = ak.mean_field(values.detach(), [lattice], [-torch.ones(21)], 3, backend="cpu")
    return [*lattice, out, *grads, marginals]


@needs_cpu
def test_same_bits_for_any_number_of_threads() -> None:
    assert_same_bits_for_threads(_everything)


@needs_cpu
def test_same_bits_with_poisoned_scratch() -> None:
    assert_same_bits("from tests.ops.test_permutohedral_filter import _everything\nresults += _everything()\n")


@pytest.mark.parametrize("isa", built_isas())
def test_every_instruction_set(isa: str) -> None:
    done = repeat_capped(isa, "definition", __file__)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], None), TypeError, "argument 'features' must be Tensor, not NoneType"),
        ((torch.zeros(1, 2, 3), torch.zeros(2, 3)), ValueError, r"features of shape \[2, 3\], .*expected floating-point \[N, d"),
        ((torch.zeros(1, 2, 3), torch.zeros(1, 7, 3)), ValueError, r"\[1, 7, 3\]: expected .* d from 1 to 6"),
        ((torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)), ValueError, r"values of shape \[1, 2, 4\].* N and \*spatial \[1, 3\]"),
        ((torch.zeros(1, 0, 3), torch.zeros(1, 2, 3)), ValueError, r"values of shape \[1, 0, 3\].*a channel at least"),
    ],
)
def test_mistakes_name_the_value(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ak.permutohedral_filter(*arguments)


@needs_cpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_features_that_have_no_place_are_named(bad: float) -> None:
    features = torch.zeros(1, 2, 8)
    features[0, 1, 5] = bad
    with pytest.raises(RuntimeError, match=rf"finite values of at most 65536 .*, but point 5 has {re.escape(f'{bad:g}')}"):
        ak.permutohedral_lattice(features)


@needs_cpu
def test_mistakes_of_mean_field_and_of_the_native_ops() -> None:
    unary, lattice = torch.zeros(1, 3, 4), ak.permutohedral_lattice(torch.rand(1, 2, 4))
    with pytest.raises(ValueError, match="2 compatibilities: expected 1, one per lattice"):
        ak.mean_field(unary, [lattice], [torch.ones(3)] * 2)
    with pytest.raises(ValueError, match=r"compatibility of shape \[4\]: expected \[3\] \(a diagonal\) or \[3, 3\]"):
        ak.mean_field(unary, [lattice], [torch.ones(4)])
    with pytest.raises(ValueError, match="iterations=-1: expected 0 or more"):
        ak.mean_field(unary, [lattice], [torch.ones(3)], -1)
    with pytest.raises(ValueError, match="normalization='mean': expected one of symmetric, before, after, none"):
        ak.mean_field(unary, [lattice], [torch.ones(3)], normalization="mean")
    vertices, *rest = lattice.arrays()
    op = torch.ops.atrous_native.permutohedral_filter
    count = rest[2].numel() - 1
    with pytest.raises(RuntimeError, match=f"vertices: expected 0 to {count - 1}, but got {count + 1}"):
        op(torch.zeros(4, 3), torch.full_like(vertices, count + 1), *rest, False)
    with pytest.raises(RuntimeError, match=r"values: expected \[4, channels\], at least 1 channel, but got sizes \[5, 3\]"):
        op(torch.zeros(5, 3), vertices, *rest, False)


def test_explain() -> None:
    features, values = torch.rand(1, 5, 375, 500), torch.rand(1, 21, 375, 500)
    explanation = ak.explain("permutohedral_filter", values, features)
    assert {choice.name for choice in explanation.choices} == {"cpu", "cuda", "reference"}
    assert "187500 points of 21 channels in 5 dimensions, float32 on cpu" in str(explanation)
    assert "94.5 MFLOP" in str(explanation)
    assert "1125000 corners" in str(ak.explain("permutohedral_lattice", features))
