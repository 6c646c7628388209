"""Bilinear upsampling as the losses and class maps need it: output pixels grouped by the low-resolution points around them.

Along one axis output position o lies at (o * step + offset) / divisor among the n low-resolution points, in integers and so
without rounding. The positions between neighbouring points are a cell; cell -1 lies before the first point, cell n - 1 behind
the last one. Cells are cut into pieces of a fixed number of positions, so that a cell of any size fits a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from atrous_kernels.problem import UpsampleProblem
from atrous_kernels.triton import launch_table
from atrous_kernels.triton.runtime import MAX_PIXELS, kernel, power_of_two, unavailable

if TYPE_CHECKING:
    import triton.language as tl

MAX_CLASSES = 1024  # one column of pixels then fills the registers of a warp
_ELEMENTS = 1024  # classes x columns of a program: 32 for each thread of its warp
_ROWS = 16  # of a program, at most
_PROGRAMS = 1056  # two for each scheduler of 132 multiprocessors


_FIELDS = ("n_in", "n_out", "step", "offset", "divisor", "first_cell", "pieces")
# Arguments of the kernels that vary with every size, so that none is worth a compilation of its own.
GEOMETRY = ("row_slots", "column_blocks", *(f"{axis}_{field}" for axis in ("rows", "columns") for field in _FIELDS))


@dataclass(frozen=True)
class UpsampleAxis:
    """One axis as the kernels take it; a slot is one piece of one cell."""

    n_in: int
    n_out: int
    step: int
    offset: int
    divisor: int
    first_cell: int
    pieces: int  # of a cell
    width: int  # positions of a piece, at most

    @property
    def slots(self) -> int:
        return (self.n_in - self.first_cell) * self.pieces

    def arguments(self, name: str) -> dict[str, int]:
        """As kernel arguments; ``name`` is "rows" or "columns"."""
        return {f"{name}_{field}": getattr(self, field) for field in _FIELDS}


def upsample_axis(n_in: int, n_out: int, align_corners: bool, widest: int) -> UpsampleAxis:
    """The cells of an axis in pieces of at most ``widest`` positions, a power of two."""
    if not align_corners:
        step, offset, divisor, first_cell = 2 * n_in, n_in - n_out, 2 * n_out, -1
    elif n_in > 1:
        step, offset, divisor, first_cell = n_in - 1, 0, max(n_out - 1, 1), 0
    else:
        step, offset, divisor, first_cell = 1, 0, n_out, 0  # one cell holds all
    largest = min(-(-divisor // step), n_out)
    widths = [1 << i for i in range(widest.bit_length())]
    # What a piece costs: its positions, and about two more to add it up and store it.
    width = min(widths, key=lambda width: -(-largest // width) * (width + 2))
    return UpsampleAxis(n_in, n_out, step, offset, divisor, first_cell, -(-largest // width), width)


@dataclass(frozen=True)
class UpsampleTiles:
    """The programs of one call: each has the rows of a row slot and the columns of ``cells`` column slots, all classes.

    The classes are a block that is a power of two and a tail that is another one, or empty: 21 are 16 + 8.
    """

    batch: int
    rows: UpsampleAxis
    columns: UpsampleAxis
    cells: int
    block: int
    tail: int

    @property
    def column_blocks(self) -> int:
        return -(-self.columns.slots // self.cells)

    @property
    def programs(self) -> int:
        return self.batch * self.rows.slots * self.column_blocks

    def arguments(self) -> dict[str, int]:
        numbers = {"row_slots": self.rows.slots, "column_blocks": self.column_blocks}
        return {**numbers, **self.rows.arguments("rows"), **self.columns.arguments("columns")}

    def constants(self) -> dict[str, int]:
        return {
            "ROWS": self.rows.width, "CELLS": self.cells, "WIDTH": self.columns.width, "BLOCK": self.block, "TAIL": self.tail,
        }  # fmt: skip


def tiles_of(logits: Tensor, out_size: Sequence[int], align_corners: bool) -> UpsampleTiles:
    """:func:`upsample_tiles` of logits [N, C, h, w] for the loss; a measured table goes before the rule."""
    batch, classes, *in_size = logits.shape
    layout = "vectors" if logits.stride(1) == 1 else "elements"
    sizes = (classes, batch * prod(in_size), batch * prod(out_size))
    elements, rows = launch_table.choose("upsample", logits, f"loss {layout}", sizes, (_ELEMENTS, _ROWS))
    return upsample_tiles(batch, classes, in_size, out_size, align_corners, elements, rows)


def upsample_tiles(
    batch: int,
    classes: int,
    in_size: Sequence[int],
    out_size: Sequence[int],
    align_corners: bool,
    elements: int = _ELEMENTS,
    most_rows: int = _ROWS,
) -> UpsampleTiles:
    """How the pixels of an upsampled [batch, classes, *in_size] are shared out."""
    block, tail = _largest_power(classes), 0
    if classes > block:
        tail = power_of_two(classes - block, 1, block)
    if tail == block:
        block, tail = 2 * block, 0
    # A thread keeps all classes of one column, so that sums over classes need no other thread, or shares them with few.
    across = min(32, _largest_power(max(elements // (block + tail), 1)))
    columns = upsample_axis(in_size[1], out_size[1], align_corners, across)
    for height in (most_rows, most_rows // 2, most_rows // 4):  # fewer rows where programs are few
        rows = upsample_axis(in_size[0], out_size[0], align_corners, height)
        tiles = UpsampleTiles(batch, rows, columns, across // columns.width, block, tail)
        if tiles.programs >= _PROGRAMS:
            break
    return tiles


def _largest_power(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def can_run(problem: UpsampleProblem) -> str | None:
    """None where the Triton kernels can compute ``problem``, else the reason why not."""
    if problem.classes > MAX_CLASSES:
        return f"{problem.classes} classes are more than {MAX_CLASSES}"
    low_resolution_pixels = problem.batch * problem.in_size[0] * problem.in_size[1]
    if low_resolution_pixels > MAX_PIXELS:
        return f"{low_resolution_pixels} low-resolution pixels are more than {MAX_PIXELS}"
    for small, large in zip(problem.in_size, problem.out_size, strict=True):
        if (small + 64) * (large + 64) >= 2**30:
            return f"positions are products in 32 bits, and {small} x {large} along an axis are too many"
    programs = upsample_tiles(problem.batch, problem.classes, problem.in_size, problem.out_size, False).programs
    if programs >= 2**29:  # a quarter of the grid's limit: a measured table may ask for smaller tiles
        return f"{programs} programs are more than {2**29}"
    return unavailable(problem.device_type, problem.dtype)


@kernel()
def first_position(cell, n_out, step, offset, divisor):
    """The first output position in a cell, or behind it where the cell has none."""
    position = (cell * divisor - offset + step - 1) // step  # rounds up; towards zero where negative, which comes to zero
    return tl.minimum(tl.maximum(position, 0), n_out)


@kernel()
def piece_of(slot, n_in, n_out, step, offset, divisor, first_cell, pieces, WIDTH: tl.constexpr):
    """The piece of a slot: its cell, first position and the one behind its last, and the weight of the further neighbour at the
    first position with its increase from one position to the next."""
    cell = slot // pieces + first_cell
    first = first_position(cell, n_out, step, offset, divisor) + slot % pieces * WIDTH
    last = tl.minimum(first + WIDTH, first_position(cell + 1, n_out, step, offset, divisor))
    # Rounded once, so that exact where a share is a binary fraction: logits that are equal then stay so.
    share = tl.div_rn((first * step + offset - cell * divisor).to(tl.float32), divisor.to(tl.float32))
    rate = tl.div_rn(step.to(tl.float32), divisor.to(tl.float32))
    # The outermost cells have a neighbour on one side only.
    between = (cell >= 0) & (cell < n_in - 1)
    return cell, first, last, tl.where(between, share, tl.where(cell < 0, 1.0, 0.0)), tl.where(between, rate, 0.0)


@kernel()
def locate(
    program, logits, logits_n, logits_h, logits_w, row_slots, column_blocks,
    rows_n_in, rows_n_out, rows_step, rows_offset, rows_divisor, rows_first_cell, rows_pieces,
    columns_n_in, columns_n_out, columns_step, columns_offset, columns_divisor, columns_first_cell, columns_pieces,
    ROWS: tl.constexpr, CELLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What a program works on: image and row slot; first row, rows, share of the lower low-resolution row at the first and its
    increase; per column whether it exists, its number and the share of the right neighbour; pointers to the low-resolution
    rows above and below, offsets of the columns left and right."""
    row_slot = program // column_blocks % row_slots
    image = (program // column_blocks // row_slots).to(tl.int64)
    row_cell, first_row, last_row, row_share, row_rate = piece_of(
        row_slot, rows_n_in, rows_n_out, rows_step, rows_offset, rows_divisor, rows_first_cell, rows_pieces, ROWS
    )
    place = tl.arange(0, CELLS * WIDTH)
    cell, first_column, last_column, share, rate = piece_of(
        program % column_blocks * CELLS + place // WIDTH, columns_n_in, columns_n_out,
        columns_step, columns_offset, columns_divisor, columns_first_cell, columns_pieces, WIDTH,
    )  # fmt: skip
    column = first_column + place % WIDTH
    share += (place % WIDTH).to(tl.float32) * rate
    upper = logits + image * logits_n + tl.maximum(row_cell, 0).to(tl.int64) * logits_h
    lower = logits + image * logits_n + tl.minimum(row_cell + 1, rows_n_in - 1).to(tl.int64) * logits_h
    left = tl.minimum(tl.maximum(cell, 0), columns_n_in - 1).to(tl.int64) * logits_w
    right = tl.minimum(cell + 1, columns_n_in - 1).to(tl.int64) * logits_w
    return (
        image, row_slot, first_row, last_row - first_row, row_share, row_rate,
        column < last_column, column, share, upper, lower, left, right,
    )  # fmt: skip


@kernel()
def between_rows(upper_left, upper_right, lower_left, lower_right, share):
    """The logits of a column: those on the upper row, and what is added to them on the way to the lower row."""
    upper = upper_left + share * (upper_right - upper_left)
    return upper, lower_left + share * (lower_right - lower_left) - upper


@kernel()
def load_columns(upper, lower, left, right, share, mask):
    """:func:`between_rows` of logits in memory, in float32."""
    return between_rows(
        tl.load(upper + left, mask=mask, other=0.0).to(tl.float32),
        tl.load(upper + right, mask=mask, other=0.0).to(tl.float32),
        tl.load(lower + left, mask=mask, other=0.0).to(tl.float32),
        tl.load(lower + right, mask=mask, other=0.0).to(tl.float32),
        share,
    )


@kernel()
def load_tile(upper, lower, left, right, share, inside, first_class, classes, class_step, CLASSES: tl.constexpr):
    """:func:`load_columns` of CLASSES classes. Classes that do not exist are -inf, columns that do not exist zero."""
    index = first_class + tl.arange(0, CLASSES)
    exists = (index < classes)[:, None]
    at = (index.to(tl.int64) * class_step)[:, None]
    base, delta = load_columns(upper, lower, at + left[None, :], at + right[None, :], share[None, :], exists & inside[None, :])
    return tl.where(exists, base, float("-inf")), delta
