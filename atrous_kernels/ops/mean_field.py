"""``torch.ops.atrous.mean_field``: inference in a fully connected CRF, all iterations in one call. Not differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops.conv2d import gpu_unmeasured
from atrous_kernels.ops.permutohedral_filter import permutohedral_filter, problem_of
from atrous_kernels.ops.permutohedral_lattice import PermutohedralLattice, always, cpu_can_run, cuda_can_run, last_resort, pick
from atrous_kernels.reference import mean_field as reference

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define(
    "mean_field(Tensor unary, Tensor[] lattices, Tensor[] compatibilities, Tensor[] before, Tensor[] after, SymInt iterations, "
    "str backend) -> Tensor"
)

NORMALIZATIONS = ("symmetric", "before", "after", "none")


def _mean_field(unary: Tensor, lattices: Sequence[Tensor], *rest: Any) -> Tensor:
    compatibilities, before, after, iterations, backend = rest
    vertices = lattices[0] if lattices else unary.new_empty(0, 2, dtype=torch.int32)
    run = pick("mean_field", backend, problem_of(unary, vertices)).run
    return run(unary, list(lattices), list(compatibilities), list(before), list(after), iterations)


for _key in ("CPU", "CUDA"):
    _library.impl("mean_field", _mean_field, _key)


@torch.library.register_fake("atrous::mean_field", lib=_library)
def _fake(unary, *_):
    return unary.new_empty(unary.shape)


def _no_gradient(ctx: Any, grad: Tensor) -> Any:
    raise NotImplementedError("mean_field is for inference: build training on permutohedral_filter, which is differentiable")


torch.library.register_autograd("atrous::mean_field", _no_gradient, lib=_library)

mean_field = torch.ops.atrous.mean_field.default


def normalizers(lattices: Sequence[PermutohedralLattice], normalization: str, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Per lattice the factors [points] of the values before and after the filter K, from its own response k = K 1 (+ 1e-20).

    ``"symmetric"``: k^-1/2 K k^-1/2, ``"before"``: K k^-1, ``"after"``: k^-1 K, ``"none"``: K.
    """
    factors = []
    for lattice in lattices if normalization != "none" else ():
        arrays = lattice.arrays()
        response = permutohedral_filter(arrays[1].new_ones(len(arrays[1]), 1), *arrays, False, backend)[:, 0] + 1e-20
        factors.append(response.rsqrt() if normalization == "symmetric" else response.reciprocal())
    return [] if normalization == "after" else factors, [] if normalization == "before" else factors


def _native(*args: Any) -> Tensor:
    return torch.ops.atrous_native.mean_field(*args)


def _by_filters(*args: Any) -> Tensor:
    run: Any = reference.mean_field
    return run(*args, permutohedral_filter=torch.ops.atrous_native.permutohedral_filter)


dispatch.register(
    "mean_field",
    [
        Implementation("cpu", _native, cpu_can_run, always),
        Implementation("cuda", _by_filters, cuda_can_run, gpu_unmeasured),
        Implementation("reference", reference.mean_field, always, last_resort),
    ],
)
