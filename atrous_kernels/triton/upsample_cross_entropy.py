"""Cross-entropy of bilinearly upsampled logits and its gradient, in one launch, without the upsampled logits.

A program has the output rows and columns between a few low-resolution points (:mod:`atrous_kernels.triton.upsample`). It
loads their logits once and walks down its rows; the logits of a row are base + share * delta, with all classes of a column in
one thread. Over its rows it sums, per class and column, the gradient and share times the gradient. At the end these are
added over the columns of a cell, four numbers per class for the four points around it, and written to a part of its own. A
second kernel adds the losses of all programs, a third one adds, for every low-resolution point, the parts of the cells that
touch it. No atomics, every sum in a fixed order: the same inputs give the same bits.

Arithmetic is float32, with logits in units of log2(e) so that exponentials are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atrous_kernels.triton.runtime import Launch, kernel, new_tensor, power_of_two, run, strides
from atrous_kernels.triton.upsample import (
    GEOMETRY,
    UpsampleTiles,
    can_run,
    load_columns,
    load_tile,
    locate,
    tiles_of,
)

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["can_run", "upsample_cross_entropy"]


@kernel(do_not_specialize=["ignore_index", "logits_c", "programs", "column_slots", *GEOMETRY])
def _loss(
    logits, target, weight, scale, losses, parts, sums,
    classes, ignore_index, hard, smooth,  # 1 - s and s / C of a label smoothing s
    logits_n, logits_c, logits_h, logits_w,
    target_n, target_h, target_w,
    programs, row_slots, column_blocks, column_slots,
    rows_n_in, rows_n_out, rows_step, rows_offset, rows_divisor, rows_first_cell, rows_pieces,
    columns_n_in, columns_n_out, columns_step, columns_offset, columns_divisor, columns_first_cell, columns_pieces,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The rows of one row slot and the columns of CELLS column slots; the grid is images x row slots x blocks of cells.

    ``weight`` [C], ``scale`` [N, H, W] and ``losses`` [N, H, W] are optional, so are ``parts`` [images, row slots, column
    slots, 4, C]: the gradient with respect to the upper left, upper right, lower left and lower right logits of a cell.
    ``sums`` [2, programs]: the losses, and scale times the weight of the label.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    (
        image, row_slot, first_row, rows, row_share, row_rate, inside, column, right_share, upper, lower, left, right,
    ) = locate(
        program, logits, logits_n, logits_h, logits_w, row_slots, column_blocks,
        rows_n_in, rows_n_out, rows_step, rows_offset, rows_divisor, rows_first_cell, rows_pieces,
        columns_n_in, columns_n_out, columns_step, columns_offset, columns_divisor, columns_first_cell, columns_pieces,
        ROWS, CELLS, WIDTH,
    )  # fmt: skip
    base, delta = load_tile(upper, lower, left, right, right_share, inside, 0, classes, logits_c, BLOCK)
    base *= LOG2E
    delta *= LOG2E
    if TAIL:
        tail_base, tail_delta = load_tile(upper, lower, left, right, right_share, inside, BLOCK, classes, logits_c, TAIL)
        tail_base *= LOG2E
        tail_delta *= LOG2E

    index = tl.arange(0, BLOCK)
    if TAIL:
        tail_index = BLOCK + tl.arange(0, TAIL)
    if SMOOTH:
        # The sum over c of w[c] z[c] is interpolated like a class.
        if weight is not None:
            class_weight = tl.load(weight + index, mask=index < classes, other=0.0).to(tl.float32)
        else:
            class_weight = (index < classes).to(tl.float32)
        weight_sum = tl.sum(class_weight, axis=0)
        mean_base = tl.sum(tl.where((index < classes)[:, None], base, 0.0) * class_weight[:, None], axis=0)
        mean_delta = tl.sum(delta * class_weight[:, None], axis=0)
        if TAIL:
            if weight is not None:
                tail_weight = tl.load(weight + tail_index, mask=tail_index < classes, other=0.0).to(tl.float32)
            else:
                tail_weight = (tail_index < classes).to(tl.float32)
            weight_sum += tl.sum(tail_weight, axis=0)
            mean_base += tl.sum(tl.where((tail_index < classes)[:, None], tail_base, 0.0) * tail_weight[:, None], axis=0)
            mean_delta += tl.sum(tail_delta * tail_weight[:, None], axis=0)

    total_loss = tl.zeros((CELLS * WIDTH,), tl.float32)
    total_weight = tl.zeros((CELLS * WIDTH,), tl.float32)
    if parts is not None:
        total = tl.zeros((BLOCK, CELLS * WIDTH), tl.float32)  # of the gradient
        slope = tl.zeros((BLOCK, CELLS * WIDTH), tl.float32)  # of the gradient times the share of the lower row
        if TAIL:
            tail_total = tl.zeros((TAIL, CELLS * WIDTH), tl.float32)
            tail_slope = tl.zeros((TAIL, CELLS * WIDTH), tl.float32)
        if SMOOTH:
            total_scale = tl.zeros((CELLS * WIDTH,), tl.float32)
            slope_scale = tl.zeros((CELLS * WIDTH,), tl.float32)

    target += image * target_n + first_row.to(tl.int64) * target_h + column.to(tl.int64) * target_w
    pixel = (image * rows_n_out + first_row) * columns_n_out + column
    # Rows as a block: the interpreter of Triton 3.9 refuses masks made of a condition on scalars.
    ahead = tl.zeros_like(column)
    next_label = tl.load(target, mask=inside & (ahead < rows), other=0)
    for row in range(rows):
        share = row_share + row * row_rate
        label = next_label.to(tl.int64)
        target += target_h
        ahead += 1
        next_label = tl.load(target, mask=inside & (ahead < rows), other=0)  # arrives while this row is worked on
        counted = inside & (label != ignore_index)
        wrong = counted & ((label < 0) | (label >= classes))
        label = tl.where(counted, tl.where(wrong, 0, label), -1).to(tl.int32)

        z = base + delta * share
        top = tl.max(z, axis=0)
        if TAIL:
            tail_z = tail_base + tail_delta * share
            top = tl.maximum(top, tl.max(tail_z, axis=0))
        exponentials = tl.exp2(z - top[None, :])
        normalizer = tl.sum(exponentials, axis=0)
        if TAIL:
            tail_exponentials = tl.exp2(tail_z - top[None, :])
            normalizer += tl.sum(tail_exponentials, axis=0)

        # The logit of the label is interpolated again, by the same operations: cheaper than to look for it in the tile.
        at = tl.maximum(label, 0).to(tl.int64) * logits_c
        wanted, wanted_delta = load_columns(upper, lower, at + left, at + right, right_share, counted)
        wanted = wanted * LOG2E + wanted_delta * LOG2E * share

        pixel_scale = tl.where(wrong, float("nan"), counted.to(tl.float32))
        if scale is not None:
            pixel_scale *= tl.load(scale + pixel, mask=counted, other=0.0)
        pixel_weight = pixel_scale
        if weight is not None:
            pixel_weight *= tl.load(weight + tl.maximum(label, 0), mask=counted, other=0.0).to(tl.float32)
        one_hot = hard * pixel_weight
        factor = one_hot
        log_sum = tl.log2(normalizer)
        loss = one_hot * (log_sum + (top - wanted))
        if SMOOTH:
            factor += smooth * weight_sum * pixel_scale
            loss += smooth * pixel_scale * ((log_sum + top) * weight_sum - (mean_base + mean_delta * share))
        loss = tl.where(counted, loss * LN2, 0.0)
        if losses is not None:
            tl.store(losses + pixel, loss, mask=inside)
        total_loss += loss
        total_weight += pixel_weight
        pixel += columns_n_out

        if parts is not None:
            factor = factor / normalizer
            gradient = exponentials * factor[None, :] - tl.where(index[:, None] == label[None, :], one_hot[None, :], 0.0)
            total += gradient
            slope += gradient * share
            if TAIL:
                hit = tail_index[:, None] == label[None, :]
                gradient = tail_exponentials * factor[None, :] - tl.where(hit, one_hot[None, :], 0.0)
                tail_total += gradient
                tail_slope += gradient * share
            if SMOOTH:
                total_scale += pixel_scale
                slope_scale += pixel_scale * share

    tl.store(sums + program, tl.sum(total_loss, axis=0))
    tl.store(sums + programs + program, tl.sum(total_weight, axis=0))
    if parts is not None:
        if SMOOTH:
            total -= (smooth * class_weight)[:, None] * total_scale[None, :]
            slope -= (smooth * class_weight)[:, None] * slope_scale[None, :]
            if TAIL:
                tail_total -= (smooth * tail_weight)[:, None] * total_scale[None, :]
                tail_slope -= (smooth * tail_weight)[:, None] * slope_scale[None, :]
        slot = program % column_blocks * CELLS + tl.arange(0, CELLS)
        part = parts + ((image * row_slots + row_slot) * column_slots + slot) * (4 * classes)
        _store_parts(part, total, slope, right_share, 0, classes, slot < column_slots, BLOCK, CELLS, WIDTH)
        if TAIL:
            _store_parts(part, tail_total, tail_slope, right_share, BLOCK, classes, slot < column_slots, TAIL, CELLS, WIDTH)


@kernel()
def _store_parts(
    part, total, slope, right_share, first_class, classes, exists,
    CLASSES: tl.constexpr, CELLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The columns of a cell added up, for its four low-resolution points."""
    index = first_class + tl.arange(0, CLASSES)
    at = part[None, :] + index[:, None]
    mask = (index < classes)[:, None] & exists[None, :]
    for lower in tl.static_range(2):
        row = slope if lower else total - slope
        to_right = row * right_share[None, :]
        tl.store(at + 2 * lower * classes, _sum_cells(row - to_right, CLASSES, CELLS, WIDTH), mask=mask)
        tl.store(at + (2 * lower + 1) * classes, _sum_cells(to_right, CLASSES, CELLS, WIDTH), mask=mask)


@kernel()
def _sum_cells(tile, CLASSES: tl.constexpr, CELLS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.sum(tl.reshape(tile, (CLASSES, CELLS, WIDTH)), axis=2)


@kernel(do_not_specialize=["programs"])
def _finish(sums, loss, factor, programs, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds the sums of all, in float64: the loss, and what its mean multiplies gradients by."""
    total = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < programs
        total += tl.load(sums + index, mask=mask, other=0.0).to(tl.float64)
        weight += tl.load(sums + programs + index, mask=mask, other=0.0).to(tl.float64)
    result = tl.sum(total, axis=0)
    if MEAN:
        divisor = tl.sum(weight, axis=0)
        result = result / divisor
        divisor = tl.where(divisor == 0, 1.0, divisor)  # without a counted pixel the gradient stays zero
        tl.store(factor, (1.0 / divisor).to(tl.float32))
    tl.store(loss, result.to(tl.float32))


@kernel(do_not_specialize=[
    "pixels", "height", "width", "class_blocks", "row_slots", "column_slots",
    "rows_first_cell", "rows_pieces", "columns_first_cell", "columns_pieces",
])  # fmt: skip
def _gather(
    parts, factor, gradient, pixels, classes, height, width, class_blocks, row_slots, column_slots,
    rows_first_cell, rows_pieces, columns_first_cell, columns_pieces,
    gradient_n, gradient_c, gradient_h, gradient_w,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_P low-resolution pixels, BLOCK_C classes] of the gradient: the parts of the four cells around each pixel."""
    pixel = tl.program_id(0) // class_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    index = tl.program_id(0) % class_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = pixel < pixels
    image = (pixel // width // height).to(tl.int64)
    row = pixel // width % height
    column = pixel % width
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for above in tl.static_range(2):  # the cell above the pixel owes it what it has for its lower points
        row_cell = row - above - rows_first_cell
        for row_piece in range(rows_pieces):
            row_part = (image * row_slots + row_cell * rows_pieces + row_piece) * column_slots
            for before in tl.static_range(2):
                column_cell = column - before - columns_first_cell
                for column_piece in range(columns_pieces):
                    part = parts + ((row_part + column_cell * columns_pieces + column_piece) * 4 + 2 * above + before) * classes
                    mask = (inside & (row_cell >= 0) & (column_cell >= 0))[:, None] & (index < classes)[None, :]
                    total += tl.load(part[:, None] + index[None, :], mask=mask, other=0.0)
    if factor is not None:
        total *= tl.load(factor)
    at = gradient + image * gradient_n + row.to(tl.int64) * gradient_h + column.to(tl.int64) * gradient_w
    tl.store(
        at[:, None] + index.to(tl.int64)[None, :] * gradient_c, total, mask=inside[:, None] & (index < classes)[None, :]
    )


@dataclass(frozen=True)
class Results:
    """What the launches of a plan write."""

    loss: Tensor  # float32, a scalar or [N, H, W]
    gradient: Tensor  # float32 [N, C, h, w], or empty


def plan(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    *,
    mean: bool,
    per_pixel: bool,
    with_gradient: bool,
) -> tuple[Results, list[Launch]]:
    """The unwritten results and the launches that write them; ``scale`` [N, H, W] multiplies loss and gradient of a pixel."""
    batch, classes = logits.shape[:2]
    tiles = tiles_of(logits, target.shape[1:], align_corners)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=logits.device)

    parts = new(batch, tiles.rows.slots, tiles.columns.slots, 4, classes) if with_gradient else None
    sums = new(2, tiles.programs)
    total, factor = new(), new() if mean else None
    losses = new(*target.shape) if per_pixel else None
    results = Results(
        total if losses is None else losses,
        new_tensor(logits.shape, logits, dtype=torch.float32) if with_gradient else new(0),
    )
    arguments = {
        "logits": logits, "target": target, "weight": weight, "scale": scale, "losses": losses, "parts": parts,
        "sums": sums,
        "classes": classes, "ignore_index": ignore_index,
        "hard": 1 - label_smoothing, "smooth": label_smoothing / classes,
        **strides("logits", logits),
        **{f"target_{axis}": stride for axis, stride in zip("nhw", target.stride(), strict=True)},
        "programs": tiles.programs, "column_slots": tiles.columns.slots, **tiles.arguments(),
    }  # fmt: skip
    launches = [Launch(_loss, (tiles.programs,), arguments, {"SMOOTH": label_smoothing > 0, **tiles.constants()}, 1, 1)]
    finish = {"sums": sums, "loss": total, "factor": factor, "programs": tiles.programs}
    launches.append(Launch(_finish, (1,), finish, {"MEAN": mean, "BLOCK": 4096}, 16))
    if parts is not None:
        launches.append(_plan_gather(parts, factor, results.gradient, tiles))
    return results, launches


def _plan_gather(parts: Tensor, factor: Tensor | None, gradient: Tensor, tiles: UpsampleTiles) -> Launch:
    batch, classes, height, width = gradient.shape
    pixels = batch * height * width
    block_c = power_of_two(classes, 1, 64)
    block_p = 1024 // block_c
    class_blocks = -(-classes // block_c)
    arguments = {
        "parts": parts, "factor": factor, "gradient": gradient,
        "pixels": pixels, "classes": classes, "height": height, "width": width, "class_blocks": class_blocks,
        "row_slots": tiles.rows.slots, "column_slots": tiles.columns.slots,
        **{name: value for name, value in tiles.arguments().items() if name.endswith(("first_cell", "pieces"))},
        **strides("gradient", gradient),
    }  # fmt: skip
    grid = -(-pixels // block_p) * class_blocks
    return Launch(_gather, (grid,), arguments, {"BLOCK_P": block_p, "BLOCK_C": block_c})


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    hard_fraction: float,
    align_corners: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """[N, C, h, w] and [N, H, W] -> the loss, and its gradient [N, C, h, w] (empty unless asked for), both float32.

    ``upstream`` [N, H, W] multiplies the gradient of each pixel. Nothing waits for the device: a label that is neither a class
    nor ``ignore_index`` makes the loss and the gradient of its pixel NaN.
    """
    options = (ignore_index, label_smoothing, align_corners)
    scale = None if upstream is None else upstream.contiguous()
    weight = None if weight is None else weight.contiguous()
    if hard_fraction < 1:
        first, launches = plan(logits, target, weight, None, *options, mean=False, per_pixel=True, with_gradient=False)
        run(launches, logits.device)
        kept = _hard_pixels(first.loss, target != ignore_index, hard_fraction)
        scale = kept if scale is None else kept * scale
    results, launches = plan(
        logits, target, weight, scale, *options,
        mean=reduction == "mean", per_pixel=reduction == "none", with_gradient=with_gradient,
    )  # fmt: skip
    run(launches, logits.device)
    return results.loss, results.gradient


def _hard_pixels(losses: Tensor, counted: Tensor, fraction: float) -> Tensor:
    """1 for the pixels that :func:`atrous_kernels.reference.upsample_cross_entropy.hard_pixels` keeps, else 0.

    Sorted where the reference selects, because how many are kept is known on the device only.
    """
    rank = losses.nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(~counted, -torch.inf).flatten()
    keep = (counted.sum().double() * fraction).ceil()
    order = rank.sort(descending=True, stable=True).indices
    kept = torch.arange(rank.numel(), device=rank.device) < keep
    return torch.empty_like(rank).scatter_(0, order, kept.to(rank.dtype)).view_as(losses)
