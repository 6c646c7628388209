"""Mean field inference in a fully connected CRF, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from atrous_kernels.reference.permutohedral_filter import permutohedral_filter

ARRAYS = 6  # of a lattice that a filter reads


def mean_field(logits: Tensor, lattices: Sequence[Tensor], compatibilities: Sequence[Tensor], iterations: int) -> Tensor:
    """[points, C] -> the marginals [points, C]; ``lattices`` holds six tensors for each of ``compatibilities``."""
    marginals = logits.softmax(-1)
    for _ in range(iterations):
        energy = -logits
        for k, compatibility in enumerate(compatibilities):
            filtered = permutohedral_filter(marginals, *lattices[k * ARRAYS : (k + 1) * ARRAYS], reverse=False)
            energy = energy + (filtered * compatibility if compatibility.dim() == 1 else filtered @ compatibility.T)
        marginals = (-energy).softmax(-1)
    return marginals
