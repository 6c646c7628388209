"""The convolution over the concatenation of a map with upsampled smaller ones, without the concatenation.

Made of differentiable registered operations, so that gradients and double backward need no code of their own; with Triton, one
further operation, ``torch.ops.atrous.add_upsampled``, does what follows the products at bin resolution. The algebra is in
docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels import dispatch
from atrous_kernels.ops.conv2d import conv2d, dense, is_channels_last, layout_of
from atrous_kernels.reference.upsample_concat import interpolation_matrix
from atrous_kernels.triton import psp_conv as triton

Ints = Sequence[int]


def psp_conv(
    input: Tensor, levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None, align_corners: bool, backend: str
) -> Tensor:
    """[N, C, H, W], per level [N, c, h, w], [O, C + sum of c, kh, kw] with odd kh and kw -> [N, O, H, W]; zero padding."""
    kernel = weight.shape[2:]
    # Not slices: the gradient of a split is one concatenation.
    own, *pooled = weight.split([input.shape[1], *(level.shape[1] for level in levels)], 1)
    padding = [size // 2 for size in kernel]
    out = conv2d(input, own, bias, [1, 1], padding, [1, 1], 1, backend)
    if not levels:
        return out
    if backend == "triton" or (backend == dispatch.AUTO and dispatch.default_backend() == "triton"):
        pairs = zip(levels, pooled, strict=True)
        products = torch.cat([_project(level.to(out.dtype), part.to(out.dtype)).flatten(1, 3) for level, part in pairs], 1)
        cells = [size for level in levels for size in level.shape[2:]]
        return add_upsampled(out, products, cells, list(kernel), align_corners)
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


# One launch for all levels -----------------------------------------------------------------------------------------------

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define("add_upsampled(Tensor input, Tensor products, SymInt[] cells, SymInt[2] kernel, bool align_corners) -> Tensor")


def _add_upsampled(input: Tensor, products: Tensor, cells: Ints, kernel: Ints, align_corners: bool) -> Tensor:
    matrices = _terms(tuple(input.shape[2:]), tuple(cells), tuple(kernel), align_corners, input.device)
    out = triton.add_upsampled(dense(input), products.contiguous(), *matrices)
    return out.contiguous(memory_format=layout_of(input))


for _key in ("CPU", "CUDA"):
    _library.impl("add_upsampled", _add_upsampled, _key)


@torch.library.register_fake("atrous::add_upsampled", lib=_library)
def _fake(input, products, cells, kernel, align_corners):
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=layout_of(input))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, _, *ctx.options = inputs
    ctx.size = input.shape[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    products = _gathered(grad, ctx.size, *ctx.options) if ctx.needs_input_grad[1] else None
    return grad, products, None, None, None


torch.library.register_autograd("atrous::add_upsampled", _backward, setup_context=_save, lib=_library)
add_upsampled = torch.ops.atrous.add_upsampled.default


def _gathered(grad: Tensor, size: Ints, cells: Ints, kernel: Ints, align_corners: bool) -> Tensor:
    """[N, O, H, W] -> [N, K, O]: the gradient of the products."""
    pixels = grad.permute(0, 2, 3, 1)
    found = []
    for level in zip(cells[::2], cells[1::2], strict=True):
        rows, columns = (_shifted(*axis, align_corners, grad) for axis in zip(size, level, kernel, strict=True))
        down = (rows.t() @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
        found.append((columns.t() @ down).flatten(1, 2))
    return torch.cat(found, 1)


@cache
def _terms(size: Ints, cells: Ints, kernel: Ints, align_corners: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """[H, K] and [W, K] float32: the factors with which position and term meet, along each axis.

    Made once per geometry and device and kept, for a captured CUDA graph holds their addresses.
    """
    like = torch.empty(0, device=device)
    all_rows, all_columns = [], []
    for level in zip(cells[::2], cells[1::2], strict=True):
        rows, columns = (_shifted(*axis, align_corners, like) for axis in zip(size, level, kernel, strict=True))
        shape = (rows.shape[1], columns.shape[1])
        all_rows.append(rows[:, :, None].expand(-1, *shape).flatten(1))
        all_columns.append(columns[:, None].expand(-1, *shape).flatten(1))
    return torch.cat(all_rows, 1), torch.cat(all_columns, 1)
