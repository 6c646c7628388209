"""``torch.ops.atrous.mean_field``: inference in a fully connected CRF, all iterations in one call. Not differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops.permutohedral_filter import permutohedral_filter, problem_of
from atrous_kernels.ops.permutohedral_lattice import PermutohedralLattice, always, cpu_can_run, last_resort, pick
from atrous_kernels.reference import mean_field as reference

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define(
    "mean_field(Tensor logits, Tensor[] lattices, Tensor[] compatibilities, SymInt iterations, str backend) -> Tensor"
)

NORMALIZATIONS = ("symmetric", "before", "after", "none")


def _mean_field(logits: Tensor, lattices: Sequence[Tensor], compatibilities: Sequence[Tensor], iterations: int, backend: str) -> Tensor:
    vertices = lattices[0] if lattices else logits.new_empty(0, 2, dtype=torch.int32)
    run = pick("mean_field", backend, problem_of(logits, vertices)).run
    return run(logits, list(lattices), list(compatibilities), iterations)


for _key in ("CPU", "CUDA"):
    _library.impl("mean_field", _mean_field, _key)


@torch.library.register_fake("atrous::mean_field", lib=_library)
def _fake(logits, lattices, compatibilities, iterations, backend):
    return logits.new_empty(logits.shape)


def _no_gradient(ctx: Any, grad: Tensor) -> Any:
    raise NotImplementedError("mean_field is for inference: build training on permutohedral_filter, which is differentiable")


torch.library.register_autograd("atrous::mean_field", _no_gradient, lib=_library)

mean_field = torch.ops.atrous.mean_field.default


def normalized(lattice: PermutohedralLattice, normalization: str, backend: str) -> tuple[Tensor, ...]:
    """The arrays of a lattice whose filter is K normalised by its own response k = K 1 (+ 1e-20).

    ``"symmetric"``: k^-1/2 K k^-1/2, ``"before"``: K k^-1, ``"after"``: k^-1 K, ``"none"``: K.
    """
    vertices, weights, neighbours, begin, points, point_weights = lattice.arrays()
    if normalization == "none":
        return vertices, weights, neighbours, begin, points, point_weights
    ones = weights.new_ones(len(weights), 1)
    factor = 1 / (permutohedral_filter(ones, *lattice.arrays(), False, backend) + 1e-20)
    if normalization == "symmetric":
        factor = factor.sqrt()
    if normalization != "before":
        weights = weights * factor
    if normalization != "after":
        point_weights = point_weights * factor[:, 0].index_select(0, points)
    return vertices, weights, neighbours, begin, points, point_weights


def _native(*args: Any) -> Tensor:
    return torch.ops.atrous_native.mean_field(*args)


dispatch.register(
    "mean_field",
    [
        Implementation("cpu", _native, cpu_can_run, always),
        Implementation("reference", reference.mean_field, always, last_resort),
    ],
)
