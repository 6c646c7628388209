"""Pyramid pooling and its gradient: the map is read once, and the gradient written once.

Rows and columns are cut at the borders of all bins of all levels, and long stretches between them again, so that a bin is a
rectangle of whole cells and a cell's pixels lie in the same bins. One kernel sums the cells (or finds their maxima), one
unites the cells of every bin; the gradient of a pixel is gathered from the bins of its cell. Which cells make up a bin, and
which bins a cell lies in, are lists made once per geometry, so every sum has a fixed order. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from atrous_kernels.triton import launch_table
from atrous_kernels.triton.runtime import Launch, kernel, power_of_two, run, strides

if TYPE_CHECKING:
    import triton.language as tl

Ints = Sequence[int]
# Cells have this many rows and columns at most: more of them keep a GPU busy where bins are few and large.
LARGEST_CELL = 16


# Kernels: the grid is (images x cells or bins x blocks of channels) ---------------------------------------------------


@kernel()
def _united(value, at, MAXIMUM: tl.constexpr):
    """One value per channel of [rows, channels]: the sum, or the maximum and its pixel.

    Of equal values the earliest pixel counts, of NaNs, which exceed all values, the latest: what a scan in reading order keeps.
    """
    if MAXIMUM:
        number = value == value
        largest = tl.max(tl.where(number, value, float("-inf")), axis=0)
        pixel = tl.min(tl.where(number & (value == largest[None, :]), at, 2147483647), axis=0)
        unknown = tl.max(tl.where(number, -1, at), axis=0)
        result = tl.where(unknown >= 0, float("nan"), largest)
        pixel = tl.where(unknown >= 0, unknown, pixel)
    else:
        result = tl.sum(value, axis=0)
        pixel = tl.max(at, axis=0)
    return result, pixel


@kernel()
def _cell(table, cells, channels, channel_blocks, BLOCK_C: tl.constexpr):
    """The cell and image of a program; the cell's first row and column, columns and pixels; the program's channels and which of
    them exist."""
    block = tl.program_id(0)
    cell = block // channel_blocks % cells
    image = (block // channel_blocks // cells).to(tl.int64)
    cols = tl.load(table + 3 * cells + cell)
    area = tl.load(table + 2 * cells + cell) * cols
    channel = block % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return cell, image, tl.load(table + cell), tl.load(table + cells + cell), cols, area, channel, channel < channels


@kernel(do_not_specialize=["cells", "channels", "channel_blocks"])
def _pool_cells(
    input, sums, pixels, table, cells, channels, channel_blocks, width, input_n, input_c, input_h, input_w,
    MAXIMUM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one cell into ``sums`` [N, cells, C] and, for the maximum, its pixel into ``pixels``."""
    cell, image, row, col, cols, area, channel, exists = _cell(table, cells, channels, channel_blocks, BLOCK_C)
    source = input + image * input_n + (channel.to(tl.int64) * input_c)[None, :]
    if MAXIMUM:
        value = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    else:
        value = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    at = tl.full((BLOCK_P, BLOCK_C), 2147483647, tl.int32)
    for first in range(0, area, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        y, x = row + pixel // cols, col + pixel % cols
        mask = (pixel < area)[:, None] & exists[None, :]
        offsets = y.to(tl.int64) * input_h + x.to(tl.int64) * input_w
        here = tl.load(source + offsets[:, None], mask=mask, other=0.0).to(tl.float32)
        if MAXIMUM:
            # A lane meets its pixels in reading order: the first of equal values stays, a NaN gives way to a later one.
            better = mask & ((here > value) | (here != here) | (at == 2147483647))
            value = tl.where(better, here, value)
            at = tl.where(better, (y * width + x)[:, None], at)
        else:
            value += here
    united, where = _united(value, at, MAXIMUM)
    to = (image * cells + cell) * channels + channel
    tl.store(sums + to, united, mask=exists)
    if MAXIMUM:
        tl.store(pixels + to, where, mask=exists)


@kernel(do_not_specialize=["bins", "cells", "channels", "channel_blocks"])
def _unite_cells(
    sums, pixels, output, index, table, members, bins, cells, channels, channel_blocks,
    MAXIMUM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one bin: its cells, named by ``members``, united."""
    block = tl.program_id(0)
    bin_ = block // channel_blocks % bins
    image = (block // channel_blocks // bins).to(tl.int64)
    begin = tl.load(table + bin_)
    count = tl.load(table + bins + bin_)
    channel = block % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    if MAXIMUM:
        value = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    else:
        value = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    at = tl.full((BLOCK_P, BLOCK_C), 2147483647, tl.int32)
    for first in range(0, count, BLOCK_P):
        member = first + tl.arange(0, BLOCK_P)
        mask = (member < count)[:, None] & exists[None, :]
        cell = tl.load(members + begin + member, mask=member < count, other=0)
        offsets = ((image * cells + cell) * channels)[:, None] + channel[None, :]
        here = tl.load(sums + offsets, mask=mask, other=0.0)
        if MAXIMUM:
            pixel = tl.load(pixels + offsets, mask=mask, other=2147483647)
            # Cells follow each other in reading order of their corners, their pixels do not: ties go by the pixel.
            later = (here != here) & ((value == value) | (at == 2147483647) | (pixel > at))
            better = (here > value) & (value == value) | ((here == value) & (pixel < at))
            better = mask & (later | better)
            value = tl.where(better, here, value)
            at = tl.where(better, pixel, at)
        else:
            value += here
    united, where = _united(value, at, MAXIMUM)
    to = (image * bins + bin_) * channels + channel
    if MAXIMUM:
        tl.store(index + to, where.to(tl.int64), mask=exists)
    else:
        united = united / tl.load(table + 2 * bins + bin_).to(tl.float32)
    tl.store(output + to, united.to(output.dtype.element_ty), mask=exists)


@kernel(do_not_specialize=["bins", "cells", "channels", "channel_blocks"])
def _gather(
    grad, index, target, table, members, bin_table, bins, cells, channels, channel_blocks, width,
    grad_n, grad_b, grad_c, index_n, index_b, index_c, target_n, target_c, target_h, target_w,
    MAXIMUM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one cell's pixels: the shares of the bins that the cell lies in, named by ``members``."""
    cell, image, row, col, cols, area, channel, exists = _cell(table, cells, channels, channel_blocks, BLOCK_C)
    begin = tl.load(table + 4 * cells + cell)
    count = tl.load(table + 5 * cells + cell)
    channel = channel.to(tl.int64)
    grads = grad + image * grad_n + channel * grad_c
    share = tl.zeros((BLOCK_C,), tl.float32)
    if not MAXIMUM:
        for member in range(count):
            bin_ = tl.load(members + begin + member).to(tl.int64)
            g = tl.load(grads + bin_ * grad_b, mask=exists, other=0.0).to(tl.float32)
            share += g / tl.load(bin_table + 2 * bins + bin_).to(tl.float32)
    for first in range(0, area, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        y, x = row + pixel // cols, col + pixel % cols
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + share[None, :]
        if MAXIMUM:
            for member in range(count):
                bin_ = tl.load(members + begin + member).to(tl.int64)
                g = tl.load(grads + bin_ * grad_b, mask=exists, other=0.0).to(tl.float32)
                at = tl.load(index + image * index_n + bin_ * index_b + channel * index_c, mask=exists, other=-1)
                total += tl.where(at[None, :] == (y * width + x)[:, None], g[None, :], 0.0)
        offsets = image * target_n + y.to(tl.int64) * target_h + x.to(tl.int64) * target_w
        mask = (pixel < area)[:, None] & exists[None, :]
        to = target + offsets[:, None] + (channel * target_c)[None, :]
        tl.store(to, total.to(target.dtype.element_ty), mask=mask)


# Tables ---------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Geometry of a pyramid on one device, int32.

    ``cells``: per cell its first row, first column, rows, columns, and where its bins begin in ``bins_of`` and how many they
    are. ``bins``: per bin where its cells begin in ``cells_of``, how many they are, and its pixels.
    """

    cells: Tensor
    bins_of: Tensor
    bins: Tensor
    cells_of: Tensor


def _edges(size: int, bins: Ints) -> list[int]:
    """Borders of all bins along one axis, and further ones that keep every stretch short."""
    borders = {i * size // b for b in bins for i in range(b)} | {-(-(i + 1) * size // b) for b in bins for i in range(b)}
    edges = [0]
    for begin, end in pairwise(sorted(borders)):
        pieces = -(-(end - begin) // LARGEST_CELL)
        edges += [begin + (end - begin) * piece // pieces for piece in range(1, pieces + 1)]
    return edges


@cache
def plan_of(size: tuple[int, int], bins: tuple[int, ...], device: torch.device) -> Plan:
    """Cells, bins and who belongs to whom, for a map of ``size`` and (rows, columns) of each level."""
    levels = list(zip(bins[::2], bins[1::2], strict=True))
    axes = [_edges(size[axis], bins[axis::2]) for axis in (0, 1)]
    stretches = [list(pairwise(edges)) for edges in axes]
    cells = [(y[0], x[0], y[1] - y[0], x[1] - x[0]) for y, x in product(*stretches)]
    columns = len(stretches[1])
    bins_of: list[list[int]] = [[] for _ in cells]
    cells_of: list[list[int]] = []
    pixels = []
    for b_h, b_w in levels:
        for i, j in product(range(b_h), range(b_w)):
            top, bottom = i * size[0] // b_h, -(-(i + 1) * size[0] // b_h)
            left, right = j * size[1] // b_w, -(-(j + 1) * size[1] // b_w)
            rows = range(axes[0].index(top), axes[0].index(bottom))
            here = [r * columns + c for r in rows for c in range(axes[1].index(left), axes[1].index(right))]
            for cell in here:
                bins_of[cell].append(len(cells_of))
            cells_of.append(here)
            pixels.append((bottom - top) * (right - left))
    of_cells, of_bins = _starts(bins_of), _starts(cells_of)
    tables = (
        [[*cell, *of] for cell, of in zip(cells, of_cells, strict=True)],
        [[bin_] for members in bins_of for bin_ in members],
        [[*of, area] for of, area in zip(of_bins, pixels, strict=True)],
        [[cell] for members in cells_of for cell in members],
    )
    return Plan(*(torch.tensor(table, dtype=torch.int32).t().contiguous().to(device) for table in tables))


def _starts(lists: list[list[int]]) -> list[tuple[int, int]]:
    """(first position, length) of each list when they follow each other."""
    found, begin = [], 0
    for one in lists:
        found.append((begin, len(one)))
        begin += len(one)
    return found


# Launching ------------------------------------------------------------------------------------------------------------


def plan_pyramid_pool(input: Tensor, bins: Ints, maximum: bool) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The unwritten results of :func:`pyramid_pool` and the launches that write them."""
    batch, channels, *size = input.shape
    plan = plan_of((size[0], size[1]), tuple(bins), input.device)
    cells, count = plan.cells.shape[1], plan.bins.shape[1]
    output = input.new_empty((batch, count, channels))
    index = input.new_empty(output.shape if maximum else (0,), dtype=torch.int64)
    sums = input.new_empty((batch, cells, channels), dtype=torch.float32)
    pixels = torch.empty_like(sums, dtype=torch.int32) if maximum else None
    block_p, block_c, warps = _blocks(input, "pool", maximum)
    channel_blocks = -(-channels // block_c)
    sizes = {"cells": cells, "channels": channels, "channel_blocks": channel_blocks}
    pooling = {
        "input": input, "sums": sums, "pixels": pixels, "table": plan.cells, **sizes, "width": size[1],
        **strides("input", input),
    }  # fmt: skip
    constants = {"MAXIMUM": maximum, "BLOCK_P": block_p, "BLOCK_C": block_c}
    united_c = power_of_two(channels, 1, 64)
    united_blocks = -(-channels // united_c)
    uniting = {
        "sums": sums, "pixels": pixels, "output": output, "index": index if maximum else None,
        "table": plan.bins, "members": plan.cells_of, **sizes, "bins": count, "channel_blocks": united_blocks,
    }  # fmt: skip
    return (output, index), [
        Launch(_pool_cells, (batch * cells * channel_blocks,), pooling, constants, warps),
        Launch(_unite_cells, (batch * count * united_blocks,), uniting, {**constants, "BLOCK_P": 8, "BLOCK_C": united_c}),
    ]


def plan_pyramid_pool_input(
    grad: Tensor, index: Tensor, input_size: Ints, bins: Ints, maximum: bool, channels_last: bool
) -> tuple[Tensor, list[Launch]]:
    """The unwritten result of :func:`pyramid_pool_input` and the launch that writes it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    target = torch.empty(list(input_size), dtype=grad.dtype, device=grad.device, memory_format=layout)
    batch, channels, *size = input_size
    plan = plan_of((size[0], size[1]), tuple(bins), grad.device)
    cells, count = plan.cells.shape[1], plan.bins.shape[1]
    block_p, block_c, warps = _blocks(target, "spread", maximum)
    channel_blocks = -(-channels // block_c)
    of_index = index.stride() if maximum else (None,) * 3
    arguments = {
        "grad": grad, "index": index if maximum else None, "target": target,
        "table": plan.cells, "members": plan.bins_of, "bin_table": plan.bins, "bins": count,
        "cells": cells, "channels": channels, "channel_blocks": channel_blocks, "width": size[1],
        **dict(zip(("grad_n", "grad_b", "grad_c"), grad.stride(), strict=True)),
        **dict(zip(("index_n", "index_b", "index_c"), of_index, strict=True)),
        **strides("target", target),
    }  # fmt: skip
    constants = {"MAXIMUM": maximum, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return target, [Launch(_gather, (batch * cells * channel_blocks,), arguments, constants, warps)]


def _blocks(tensor: Tensor, direction: str, maximum: bool) -> tuple[int, int, int]:
    """(pixels of a cell, channels, warps) of a block, so that neighbouring threads read neighbours.

    A measured table goes before the rule. ``direction`` is "pool" or "spread".
    """
    vectors = tensor.stride(1) == 1
    how = f"{direction} {'maximum' if maximum else 'average'} {'vectors' if vectors else 'elements'}"
    rule = (8, 128, 4) if vectors else (128, 8, 4)
    pixels, channels = tensor.shape[0] * tensor.shape[2] * tensor.shape[3], tensor.shape[1]
    block_p, most_c, warps = launch_table.choose("pooling", tensor, how, (pixels, channels), rule)
    return block_p, power_of_two(channels, 1, most_c), warps


def pyramid_pool(input: Tensor, bins: Ints, maximum: bool) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] of any strides -> [N, cells, C] and, for the maximum, the pixel that each came from (else empty).

    ``bins`` holds (rows, columns) of each level; a plane has fewer than 2**31 pixels.
    """
    results, launches = plan_pyramid_pool(input, bins, maximum)
    run(launches, input.device)
    return results


def pyramid_pool_input(
    grad: Tensor, index: Tensor, input_size: Ints, bins: Ints, maximum: bool, channels_last: bool
) -> Tensor:
    """[N, cells, C] -> ``input_size``: each bin's gradient shared by its pixels, or sent to the one of its maximum."""
    grad_input, launches = plan_pyramid_pool_input(grad, index, input_size, bins, maximum, channels_last)
    run(launches, grad.device)
    return grad_input
