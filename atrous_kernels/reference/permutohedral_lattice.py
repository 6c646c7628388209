"""The permutohedral lattice by its definition (Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral
Lattice", 2010).

Points of dimension d are embedded in the plane of d + 1 coordinates that add up to zero. The plane is tiled by simplices whose
vertices are integer points with equal remainders modulo d + 1; a point's weights are its barycentric coordinates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Arrays = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def scales(dimensions: int, like: Tensor) -> Tensor:
    """The factor of every feature: the blur then has the width of a unit Gaussian."""
    deviation = torch.tensor(math.sqrt(2 / 3) * (dimensions + 1), dtype=like.dtype).item()
    factors = [1 / math.sqrt((i + 2) * (i + 1)) * deviation for i in range(dimensions)]
    return torch.tensor(factors, dtype=like.dtype, device=like.device)


def elevate(features: Tensor) -> Tensor:
    """[..., d] -> [..., d + 1], coordinates that add up to zero."""
    d = features.shape[-1]
    scaled = features * scales(d, features)
    after = features.new_zeros(features.shape[:-1])
    coordinates: list[Tensor] = []
    for j in range(d, 0, -1):
        coordinates.append(after - j * scaled[..., j - 1])
        after = after + scaled[..., j - 1]
    return torch.stack([after, *reversed(coordinates)], -1)


def _simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """The vertex of remainder 0 and, per coordinate, how many others lie further above it: both [points, d + 1]."""
    corners = elevated.shape[-1]
    nearest = (elevated * (1 / torch.tensor(corners, dtype=elevated.dtype))).round()
    difference = elevated - nearest * corners
    before = torch.ones(corners, corners, dtype=torch.bool, device=elevated.device).triu(1)  # [i, j]: i < j
    smaller = difference[..., :, None] < difference[..., None, :]
    rank = torch.where(before, smaller, ~smaller.transpose(-1, -2) & before.T).sum(-1)
    rank = rank + nearest.sum(-1, keepdim=True).long()
    shift = torch.where(rank < 0, corners, 0) - torch.where(rank >= corners, corners, 0)
    return nearest.long() * corners + shift, rank + shift


def _barycentric(elevated: Tensor, origin: Tensor, rank: Tensor) -> Tensor:
    corners = elevated.shape[-1]
    share = (elevated - origin) * (1 / torch.tensor(corners, dtype=elevated.dtype))
    weights = elevated.new_zeros(*elevated.shape[:-1], corners + 1)
    weights.scatter_add_(-1, corners - 1 - rank, share).scatter_add_(-1, corners - rank, -share)
    return torch.cat([weights[..., :1] + (1 + weights[..., -1:]), weights[..., 1:-1]], -1)


def _numbered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Equal rows get equal numbers, in the order in which they first occur: per row its number, per number its row."""
    unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
    at = torch.arange(len(keys), device=keys.device)
    first = at.new_full((len(unique),), len(keys)).scatter_reduce_(0, inverse, at, "amin")
    order = first.argsort()
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), device=keys.device)
    return number[inverse], unique[order]


def permutohedral_lattice(features: Tensor) -> Arrays:
    """[images, points, d] -> vertices, weights, neighbours, begin, points, point_weights, ranks; all images in one lattice.

    Their meaning is described by ``PermutohedralLattice`` in ops/permutohedral_lattice.py.
    """
    images, _, d = features.shape
    corners = d + 1
    elevated = elevate(features).flatten(0, 1)
    origin, rank = _simplex(elevated)
    weights = _barycentric(elevated, origin, rank)

    remainder = torch.arange(corners, device=features.device)
    keys = origin[:, None] + remainder[:, None] - torch.where(rank[:, None] > d - remainder[:, None], corners, 0)
    image = torch.arange(images, device=features.device).repeat_interleave(features.shape[1])
    keys = torch.cat([image[:, None, None].expand(-1, corners, 1), keys], -1)
    vertices, known = _numbered(keys.flatten(0, 1))

    steps = corners * torch.eye(corners, dtype=torch.int64, device=features.device) - 1
    steps = torch.cat([steps.new_zeros(corners, 1), steps], 1)
    around = torch.stack([known + steps[:, None], known - steps[:, None]], 2)  # [corners, vertices, 2, 1 + corners]
    number, _ = _numbered(torch.cat([known, around.flatten(0, 2)]))
    neighbours = number[len(known) :].clamp(max=len(known)).unflatten(0, around.shape[:3])

    order = vertices.argsort(stable=True)
    begin = torch.cat([vertices.new_zeros(1), vertices.bincount(minlength=len(known)).cumsum(0)])
    return (
        vertices.view(-1, corners).int(),
        weights,
        neighbours.int(),
        begin,
        (order // corners).int(),
        weights.flatten()[order],
        rank.to(torch.uint8),
    )


def features_gradient(grad_weights: Tensor, ranks: Tensor) -> Tensor:
    """The gradient of the features [points, d] from that of the weights: within a simplex, these are linear in those."""
    corners = ranks.shape[-1]
    d = corners - 1
    at = d - ranks.long()
    grad = (grad_weights.gather(-1, at) - grad_weights.gather(-1, (at + 1) % corners)) / corners  # of the elevated coordinates
    before = grad.cumsum(-1)
    j = torch.arange(1, corners, device=grad.device)
    return scales(d, grad) * (before[..., :-1] - j * grad[..., 1:])
