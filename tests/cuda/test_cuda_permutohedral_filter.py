"""The CUDA kernels of the permutohedral lattice and filter, really executed: the same source compiled for the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels.ops.permutohedral_filter import permutohedral_filter, permutohedral_filter_weights
from tests.ops.test_permutohedral_filter import LATTICES, TOLERANCE, _features, check_lattice

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")

OPS = ("permutohedral_lattice", "permutohedral_filter", "permutohedral_filter_weights", "mean_field")
BACKENDS = ("cuda", "reference")


@pytest.fixture(autouse=True, scope="module")
def _emulation() -> Iterator[None]:
    with emulated.as_cuda_backend(*OPS):
        yield


@settings(max_examples=25, deadline=None, derandomize=True)
@given(**LATTICES)
def test_the_lattice_is_that_of_the_definition(**case: Any) -> None:
    check_lattice("cuda", **case)


def test_more_vertices_than_two_digits_of_the_sort() -> None:
    """Far apart, every corner is a vertex of its own: more than 2^16 of them, and many tiles of the scan and of the sort."""
    features = torch.rand(1, 2, 25000) * 60000
    ours, truth = (ak.permutohedral_lattice(features, backend=backend) for backend in BACKENDS)
    assert ours.begin.numel() > 2**16
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.1)  # coordinates of 1e5 keep seven binary digits behind the point


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("channels", [1, 3, 21, 40])
def test_against_the_definition(channels: int, dtype: torch.dtype, poison: None) -> None:
    for n, d, height, width, spread in ((2, 5, 13, 11, 3.0), (1, 2, 30, 21, 0.1), (1, 6, 1, 1, 1.0), (0, 3, 4, 4, 1.0)):
        features, values = _features(n, d, height, width, dtype, spread), torch.randn(n, channels, height, width, dtype=dtype)
        lattice = ak.permutohedral_lattice(features, backend="cuda")
        if spread == 0.1:
            assert lattice.begin.diff().max() > 128  # a vertex with a block of its own
        ours, truth = (ak.permutohedral_filter(values, lattice, backend=backend) for backend in BACKENDS)
        torch.testing.assert_close(ours, truth, **TOLERANCE[dtype])
        arrays = lattice.arrays()
        grad, rows = torch.randn(2, n * height * width, channels, dtype=dtype)
        for reverse in (False, True):
            ours, truth = (permutohedral_filter_weights(grad, rows, *arrays, reverse, backend) for backend in BACKENDS)
            torch.testing.assert_close(ours, truth, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-3 * channels**0.5)


def test_gradients() -> None:
    features = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(values: Tensor, features: Tensor) -> Tensor:
        return ak.permutohedral_filter(values, features, backend="cuda")

    assert torch.autograd.gradcheck(call, (values, features))
    assert torch.autograd.gradgradcheck(lambda values: call(values, features.detach()), (values,))


def test_mean_field_by_filters() -> None:
    unary, lattices = torch.randn(2, 5, 9, 8), [ak.permutohedral_lattice(_features(2, d, 9, 8), backend="cuda") for d in (5, 2)]
    compatibilities = [-2 * torch.rand(5), torch.randn(5, 5)]
    ours, truth = (ak.mean_field(unary, lattices, compatibilities, 3, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)


def test_order_of_threads_changes_no_bit() -> None:
    """The winner of a slot of the hash depends on the order of the threads, the lattice and its sums do not."""
    torch.manual_seed(0)
    features, values = _features(2, 3, 12, 11, spread=0.5), torch.randn(2, 5, 12, 11)
    results = []
    try:
        for kind, seed in (("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)):
            emulated.schedule(kind, seed)
            lattice = ak.permutohedral_lattice(features, backend="cuda")
            out = permutohedral_filter(values.flatten(2).movedim(1, 2).reshape(-1, 5), *lattice.arrays(), False, "cuda")
            results.append([*lattice, out])
    finally:
        emulated.schedule("ascending")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_features_that_have_no_place_are_named(bad: float, dtype: torch.dtype) -> None:
    features = torch.zeros(1, 2, 8, dtype=dtype)
    features[0, 1, 5] = features[0, 0, 7] = bad
    with pytest.raises(RuntimeError, match=rf"finite values of at most 65536 .*, but point 5 has {bad:g}".replace("+", r"\+")):
        ak.permutohedral_lattice(features, backend="cuda")


def test_arrays_that_are_no_lattice_are_refused() -> None:
    vertices, *rest = ak.permutohedral_lattice(torch.rand(1, 2, 4), backend="cuda").arrays()
    with pytest.raises(RuntimeError, match="begin: expected contiguous scalar type"):
        emulated.ops().permutohedral_filter(torch.zeros(4, 3), vertices, *rest[:2], rest[2][1:], *rest[3:], False)
    with pytest.raises(RuntimeError, match=r"values: expected \[4, channels\], at least 1 channel, but got sizes \[5, 3\]"):
        emulated.ops().permutohedral_filter(torch.zeros(5, 3), vertices, *rest, False)
    with pytest.raises(RuntimeError, match=r"features: expected 1 to 6 dimensions, but got sizes \[1, 4, 7\]"):
        emulated.ops().permutohedral_lattice(torch.zeros(1, 4, 7))
