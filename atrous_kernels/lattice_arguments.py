"""Arguments of the functions on permutohedral lattices, checked, with errors that name the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atrous_kernels.ops import mean_field as _mean_field_op
from atrous_kernels.ops import permutohedral_filter as _permutohedral_filter_op
from atrous_kernels.ops import permutohedral_lattice as _permutohedral_lattice_op
from atrous_kernels.ops.permutohedral_lattice import MOST_DIMENSIONS, LatticeProblem, PermutohedralLattice


def check_features(features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"permutohedral_lattice(): argument 'features' must be Tensor, not {type(features).__name__}")
    if features.dim() < 3 or not features.is_floating_point():
        raise ValueError(f"features of shape {list(features.shape)}, {features.dtype}: expected floating-point [N, d, *spatial]")
    if not 1 <= features.shape[1] <= MOST_DIMENSIONS:
        raise ValueError(f"features of shape {list(features.shape)}: expected [N, d, *spatial], d from 1 to {MOST_DIMENSIONS}")


def check_values(op: str, values: Tensor, lattice: PermutohedralLattice) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{op}(): expected a tensor, not {type(values).__name__}")
    points = list(lattice.vertices.shape[:-1])
    legal = values.dim() >= 3 and values.is_floating_point() and values.shape[1] > 0
    if not legal or [values.shape[0], *values.shape[2:]] != points:
        raise ValueError(
            f"values of shape {list(values.shape)}, {values.dtype}: expected floating-point [N, C, *spatial] with N and *spatial "
            f"{points}, as the features, and a channel at least"
        )
    if values.device != lattice.weights.device:
        raise ValueError(f"values on {values.device}: expected {lattice.weights.device}, where the features are")


def points_first(values: Tensor) -> Tensor:
    """[N, C, *spatial] -> [N *spatial, C]: a view where the channels are last in memory."""
    return values.movedim(1, -1).reshape(-1, values.shape[1])


def channels_second(rows: Tensor, like: Tensor) -> Tensor:
    """[N *spatial, C] -> [N, C, *spatial], sizes and dtype of ``like``."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[-1]).movedim(-1, 1).to(like.dtype)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """16-bit features and values are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_mean_field(
    unary: Tensor,
    lattices: Sequence[PermutohedralLattice],
    compatibilities: Sequence[Tensor],
    iterations: int,
    normalization: str,
) -> None:
    if not isinstance(unary, Tensor):
        raise TypeError(f"mean_field(): argument 'unary' must be Tensor, not {type(unary).__name__}")
    if unary.dim() < 3 or not unary.is_floating_point() or unary.shape[1] < 1:
        raise ValueError(f"unary of shape {list(unary.shape)}, {unary.dtype}: expected floating-point [N, C, *spatial]")
    if len(lattices) != len(compatibilities):
        raise ValueError(f"{len(compatibilities)} compatibilities: expected {len(lattices)}, one per lattice")
    for lattice in lattices:
        check_values("mean_field", unary, lattice)
    classes = unary.shape[1]
    for compatibility in compatibilities:
        if tuple(compatibility.shape) not in ((classes,), (classes, classes)):
            raise ValueError(
                f"compatibility of shape {list(compatibility.shape)}: expected [{classes}] (a diagonal) or [{classes}, {classes}]"
            )
    if not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations={iterations!r}: expected 0 or more")
    if normalization not in _mean_field_op.NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r}: expected one of {', '.join(_mean_field_op.NORMALIZATIONS)}")


def describe_lattice(features: Tensor) -> LatticeProblem:
    """The numbers of a call of :func:`permutohedral_lattice`."""
    check_features(features)
    return _permutohedral_lattice_op.problem_of(features.flatten(2).transpose(1, 2).to(computed_in(features.dtype)))


def describe_filter(values: Tensor, features: Tensor | PermutohedralLattice) -> LatticeProblem:
    """The numbers of a call of :func:`permutohedral_filter`."""
    if isinstance(features, PermutohedralLattice):
        check_values("permutohedral_filter", values, features)
        return _permutohedral_filter_op.problem_of(points_first(values).to(features.weights.dtype), features.vertices)
    lattice = describe_lattice(features)
    return LatticeProblem(lattice.points, lattice.dimensions, values.shape[1], lattice.dtype, lattice.device_type)


def describe_mean_field(unary: Tensor, lattices: Sequence[PermutohedralLattice], *_: Any, **__: Any) -> LatticeProblem:
    """The numbers of a call of :func:`mean_field`."""
    rows = points_first(unary).to(computed_in(unary.dtype))
    return _mean_field_op.problem_of(rows, lattices[0].vertices if lattices else unary.new_empty(0, 2))
