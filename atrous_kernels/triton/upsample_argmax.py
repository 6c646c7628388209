"""The most likely class of every pixel of bilinearly upsampled logits, without the upsampled logits.

The programs are those of :mod:`atrous_kernels.triton.upsample_cross_entropy`: rows between two low-resolution rows, whose
logits are base + share * delta with all classes of a column in one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atrous_kernels.triton.runtime import Launch, kernel, run, strides
from atrous_kernels.triton.upsample import GEOMETRY, can_run, load_tile, locate, upsample_tiles

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["can_run", "upsample_argmax"]


@kernel()
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@kernel()
def _first_of(z, top, first_class, NONE: tl.constexpr, CLASSES: tl.constexpr):
    """The first class whose logit is the largest; NaN counts as that."""
    found = (z == top[None, :]) | (z != z)
    return tl.min(tl.where(found, first_class + tl.arange(0, CLASSES)[:, None], NONE), axis=0)


@kernel(do_not_specialize=["logits_c", *GEOMETRY])
def _argmax(
    logits, output, classes,
    logits_n, logits_c, logits_h, logits_w, row_slots, column_blocks,
    rows_n_in, rows_n_out, rows_step, rows_offset, rows_divisor, rows_first_cell, rows_pieces,
    columns_n_in, columns_n_out, columns_step, columns_offset, columns_divisor, columns_first_cell, columns_pieces,
    ROWS: tl.constexpr, CELLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The rows of one row slot and the columns of CELLS column slots; the grid is images x row slots x blocks of cells."""
    image, _, first_row, rows, row_share, row_rate, inside, column, right_share, upper, lower, left, right = locate(
        tl.program_id(0), logits, logits_n, logits_h, logits_w, row_slots, column_blocks,
        rows_n_in, rows_n_out, rows_step, rows_offset, rows_divisor, rows_first_cell, rows_pieces,
        columns_n_in, columns_n_out, columns_step, columns_offset, columns_divisor, columns_first_cell, columns_pieces,
        ROWS, CELLS, WIDTH,
    )  # fmt: skip
    base, delta = load_tile(upper, lower, left, right, right_share, inside, 0, classes, logits_c, BLOCK)
    if TAIL:
        tail_base, tail_delta = load_tile(upper, lower, left, right, right_share, inside, BLOCK, classes, logits_c, TAIL)
    output += (image * rows_n_out + first_row) * columns_n_out + column
    for row in range(rows):
        share = row_share + row * row_rate
        z = base + delta * share
        top = tl.reduce(z, 0, _larger)
        if TAIL:
            tail_z = tail_base + tail_delta * share
            top = _larger(top, tl.reduce(tail_z, 0, _larger))
        first = _first_of(z, top, 0, BLOCK + TAIL, BLOCK)
        if TAIL:
            first = tl.minimum(first, _first_of(tail_z, top, BLOCK, BLOCK + TAIL, TAIL))
        tl.store(output, first.to(tl.int64), mask=inside)
        output += columns_n_out


def plan(logits: Tensor, size: Sequence[int], align_corners: bool) -> tuple[Tensor, list[Launch]]:
    """The unwritten result of :func:`upsample_argmax` and the launch that writes it."""
    batch, classes, height, width = logits.shape
    tiles = upsample_tiles(batch, classes, (height, width), size, align_corners)
    output = torch.empty((batch, *size), dtype=torch.int64, device=logits.device)
    arguments = {"logits": logits, "output": output, "classes": classes, **strides("logits", logits), **tiles.arguments()}
    return output, [Launch(_argmax, (tiles.programs,), arguments, tiles.constants(), 1, 1)]


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """[N, C, h, w] -> int64 [N, H, W]: of classes with equal logits the first, a NaN above all."""
    output, launches = plan(logits, size, align_corners)
    run(launches, logits.device)
    return output
