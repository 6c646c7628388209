"""Pyramid pooling and its gradient, bin by bin.

Bin (i, j) of b_h x b_w covers rows floor(i H / b_h) to ceil((i + 1) H / b_h) and columns alike: the framework's adaptive pooling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from atrous_kernels.reference.conv2d import accumulator


def bin_slices(bins: Sequence[int], size: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of every bin, level by level; ``bins`` holds (rows, columns) of each level."""
    for b_h, b_w in zip(bins[::2], bins[1::2], strict=True):
        for i in range(b_h):
            for j in range(b_w):
                rows = slice(i * size[0] // b_h, -(-(i + 1) * size[0] // b_h))
                yield rows, slice(j * size[1] // b_w, -(-(j + 1) * size[1] // b_w))


def pyramid_pool(input: Tensor, bins: Sequence[int], maximum: bool) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] -> [N, cells, C] and, for the maximum, the pixel that each came from (else an empty tensor)."""
    x = input.to(accumulator(input.dtype))
    values, indices = [], []
    for rows, columns in bin_slices(bins, x.shape[2:]):
        window = x[:, :, rows, columns]
        if not maximum:
            values.append(window.mean((2, 3)))
            continue
        value, at = window.flatten(2).max(2)
        width = window.shape[3]
        values.append(value)
        indices.append((rows.start + at // width) * x.shape[3] + columns.start + at % width)
    index = torch.stack(indices, 1) if maximum else torch.empty(0, dtype=torch.int64, device=x.device)
    return torch.stack(values, 1).to(input.dtype), index


def pyramid_pool_input(
    grad: Tensor, index: Tensor, input_size: Sequence[int], bins: Sequence[int], maximum: bool, channels_last: bool
) -> Tensor:
    """[N, cells, C] -> ``input_size``: each bin's gradient shared by its pixels, or sent to the one of its maximum."""
    g = grad.to(accumulator(grad.dtype)).transpose(1, 2)
    out = g.new_zeros(list(input_size))
    if maximum:
        out.flatten(2).scatter_add_(2, index.transpose(1, 2), g)
    else:
        for at, (rows, columns) in enumerate(bin_slices(bins, input_size[2:])):
            pixels = (rows.stop - rows.start) * (columns.stop - columns.start)
            out[:, :, rows, columns] += g[:, :, at, None, None] / pixels
    return out.to(grad.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
