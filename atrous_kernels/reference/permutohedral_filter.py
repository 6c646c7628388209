"""Gaussian filtering through a permutohedral lattice, and the exact filter that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_filter(values: Tensor, features: Tensor) -> Tensor:
    """The exact filter: out[i] = sum over all points j of the image of exp(-|f_i - f_j|^2 / 2) values[j].

    values [images, points, C], features [images, points, d]; time and memory grow with the square of the points.
    """
    return (-0.5 * torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()).exp() @ values


def filter_scale(corners: int) -> float:
    """The peak of the blurred lattice over that of the Gaussian, inverted."""
    return 1 / (1 + 2.0 ** (1 - corners))


def blurred(values: Tensor, neighbours: Tensor, begin: Tensor, points: Tensor, point_weights: Tensor, reverse: bool) -> Tensor:
    """Values of the vertices [M, C]: each sums its points; then, axis by axis, half of both neighbours is added."""
    corners, count, _ = neighbours.shape
    row = torch.arange(count, device=values.device).repeat_interleave(begin.diff())
    x = values.new_zeros(count, values.shape[1]).index_add(0, row, values[points] * point_weights[:, None])
    for axis in reversed(range(corners)) if reverse else range(corners):
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        x = x + 0.5 * (padded[neighbours[axis, :, 0]] + padded[neighbours[axis, :, 1]])
    return x


def permutohedral_filter(
    values: Tensor,
    vertices: Tensor,
    weights: Tensor,
    neighbours: Tensor,
    begin: Tensor,
    points: Tensor,
    point_weights: Tensor,
    reverse: bool,
) -> Tensor:
    """[points, C] -> [points, C]."""
    x = blurred(values, neighbours, begin, points, point_weights, reverse)
    return filter_scale(vertices.shape[1]) * (x[vertices] * weights[..., None]).sum(1)


def permutohedral_filter_weights(
    grad: Tensor,
    values: Tensor,
    vertices: Tensor,
    weights: Tensor,
    neighbours: Tensor,
    begin: Tensor,
    points: Tensor,
    point_weights: Tensor,
    reverse: bool,
) -> Tensor:
    """The gradient of the weights [points, corners], which take part twice: on the way in and on the way out."""
    out = blurred(values, neighbours, begin, points, point_weights, reverse)
    back = blurred(grad, neighbours, begin, points, point_weights, not reverse)
    total = (out[vertices] * grad[:, None]).sum(-1) + (back[vertices] * values[:, None]).sum(-1)
    return filter_scale(vertices.shape[1]) * total
