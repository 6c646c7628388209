"""Mean field inference in a fully connected CRF, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from atrous_kernels.reference.permutohedral_filter import permutohedral_filter

ARRAYS = 6  # of a lattice that a filter reads


def mean_field(
    unary: Tensor,
    lattices: Sequence[Tensor],
    compatibilities: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    iterations: int,
    permutohedral_filter: Callable[..., Tensor] = permutohedral_filter,
) -> Tensor:
    """[points, C] -> the marginals [points, C]; ``lattices`` holds six tensors for each of ``compatibilities``, ``before`` and
    ``after`` one factor [points] for each, or nothing."""
    marginals = (-unary).softmax(-1)
    for _ in range(iterations):
        energy = unary
        for k, compatibility in enumerate(compatibilities):
            x = marginals * before[k][:, None] if before else marginals
            vertices, weights, neighbours, begin, points, point_weights = lattices[k * ARRAYS : (k + 1) * ARRAYS]
            x = permutohedral_filter(x, vertices, weights, neighbours, begin, points, point_weights, False)
            x = x * after[k][:, None] if after else x
            energy = energy + (x * compatibility if compatibility.dim() == 1 else x @ compatibility.T)
        marginals = (-energy).softmax(-1)
    return marginals
