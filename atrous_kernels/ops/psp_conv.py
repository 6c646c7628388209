"""The convolution over the concatenation of a map with upsampled smaller ones, without the concatenation.

Made of differentiable registered operations, so that gradients and double backward need no code of their own. The algebra is
in docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels.ops.conv2d import conv2d, is_channels_last
from atrous_kernels.reference.upsample_concat import interpolation_matrix


def psp_conv(
    input: Tensor, levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None, align_corners: bool, backend: str
) -> Tensor:
    """[N, C, H, W], per level [N, c, h, w], [O, C + sum of c, kh, kw] with odd kh and kw -> [N, O, H, W]; zero padding."""
    kernel = weight.shape[2:]
    # Not slices: the gradient of a split is one concatenation.
    dense, *pooled = weight.split([input.shape[1], *(level.shape[1] for level in levels)], 1)
    padding = [size // 2 for size in kernel]
    out = conv2d(input, dense, bias, [1, 1], padding, [1, 1], 1, backend)
    if not levels:
        return out
    rows, columns = [], []
    for level, part in zip(levels, pooled, strict=True):
        shifted = _shifted(input.shape[3], level.shape[3], kernel[1], align_corners, out)
        columns.append(_stretch(_project(level.to(out.dtype), part.to(out.dtype)), shifted))
        rows.append(_shifted(input.shape[2], level.shape[2], kernel[0], align_corners, out))
    tall, wide = torch.cat(rows, 1), torch.cat(columns, 1)
    size = (input.shape[3], weight.shape[0])
    if is_channels_last(out):
        flat = out.permute(0, 2, 3, 1).flatten(2)
        return torch.baddbmm(flat, tall.expand(len(flat), -1, -1), wide.flatten(2)).unflatten(2, size).permute(0, 3, 1, 2)
    return out + (tall @ wide.flatten(2)).unflatten(2, size).permute(0, 3, 1, 2)


def _project(level: Tensor, weight: Tensor) -> Tensor:
    """[N, c, h, w] and [O, c, kh, kw] -> [N, h, kh, w * kw, O]: what every tap reads, at the level's own resolution."""
    out_channels, channels, *kernel = weight.shape
    taps = weight.permute(0, 2, 3, 1).reshape(-1, channels)  # a view where the weight is channels-last
    product = level.permute(0, 2, 3, 1) @ taps.t()
    product = product.unflatten(3, (out_channels, *kernel))  # n h w o kh kw
    return product.permute(0, 1, 4, 2, 5, 3).flatten(3, 4)


def _stretch(projected: Tensor, shifted: Tensor) -> Tensor:
    """[N, h, kh, w * kw, O] -> [N, h * kh, W, O]."""
    return (shifted @ projected).flatten(1, 2)


def _shifted(out: int, size: int, taps: int, align_corners: bool, like: Tensor) -> Tensor:
    """[out, size * taps]: column (i, k) is what output ``o`` gets from cell ``i`` through tap ``k``, which reads at
    ``o + k - taps // 2``; zero where that lies outside."""
    matrix = interpolation_matrix(out, size, align_corners, like)
    padded = F.pad(matrix, (0, 0, taps // 2, taps // 2))
    return torch.stack([padded[k : k + out] for k in range(taps)], 2).flatten(1)
