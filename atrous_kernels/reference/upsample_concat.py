"""Bilinear upsampling as a matrix per axis, and the concatenation of a map with upsampled smaller ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atrous_kernels.reference.conv2d import accumulator


def interpolation_matrix(out: int, size: int, align_corners: bool, like: Tensor) -> Tensor:
    """[out, size]: row ``o`` holds the weights with which output ``o`` reads the input, of the dtype and device of ``like``."""
    position = torch.arange(out, dtype=torch.float64, device=like.device)
    if align_corners:
        source = position * ((size - 1) / max(out - 1, 1))
    else:
        source = ((position + 0.5) * (size / out) - 0.5).clamp(0, size - 1)
    cells = torch.arange(size, dtype=torch.float64, device=like.device)
    return (1 - (source[:, None] - cells).abs()).clamp(min=0).to(like.dtype)


def upsample(level: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """[N, C, h, w] -> [N, C, *size]."""
    rows = interpolation_matrix(size[0], level.shape[2], align_corners, level)
    columns = interpolation_matrix(size[1], level.shape[3], align_corners, level)
    return torch.einsum("yi,xj,ncij->ncyx", rows, columns, level)


def upsample_concat(input: Tensor, levels: Sequence[Tensor], align_corners: bool) -> Tensor:
    """[N, C, H, W] and per level [N, c, h, w] -> [N, C + sum of c, H, W]."""
    dtype = accumulator(input.dtype)
    wide = [upsample(level.to(dtype), input.shape[2:], align_corners).to(input.dtype) for level in levels]
    return torch.cat([input, *wide], 1)
