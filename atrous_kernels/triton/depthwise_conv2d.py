"""Depthwise convolution and its two gradients: every channel on its own, bounded by memory, not by arithmetic.

The plan is that of :mod:`atrous_kernels.triton.conv2d`, with element-wise products in place of matrix products: rectangles
of constant valid taps flattened across the batch, the input gradient as the same correlation per residue of the stride,
the weight gradient per tap over the pixels where it is valid. Each input channel may have several output channels (the
"channel multiplier": weight [multiplier * C, 1, kh, kw] and C groups).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atrous_kernels.triton import launch_table
from atrous_kernels.triton.common import sum_splits, tile_pixels
from atrous_kernels.triton.epilogue import Epilogue, finish, store_moments
from atrous_kernels.triton.runtime import Launch, kernel, power_of_two, strides
from atrous_kernels.triton.schedule import Axes, rectangle_table, split_count, steps, tap_table

if TYPE_CHECKING:
    import triton.language as tl


@kernel(do_not_specialize=["rectangles", "batch", "channel_blocks", "channels", "tap_step_h", "tap_step_w"])
def _correlate(
    source, weight, bias, target, table, rectangles, batch, channel_blocks, channels,
    shared, summed,  # output channels that share one input channel: seen from the forward pass, from the gradient
    source_n, source_c, source_h, source_w,
    weight_o, weight_h, weight_w,
    target_n, target_c, target_h, target_w,
    source_step_h, source_step_w, tap_step_h, tap_step_w, kernel_step_h, kernel_step_w, target_step_h, target_step_w,
    mean, var, gain, residual, residual_n, residual_c, residual_h, residual_w, parts,
    RECTANGLES: tl.constexpr, EPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_P pixels, BLOCK_C channels] tile of the target; the grid is (tiles x channel blocks)."""
    tile = tl.program_id(0) // channel_blocks
    entry, image, row, col, inside = tile_pixels(table, tile, rectangles, batch, RECTANGLES, BLOCK_P)
    taps_h = tl.load(entry + 3 * rectangles)
    taps_w = tl.load(entry + 4 * rectangles)
    source_row = (tl.load(entry + 5 * rectangles) + row * source_step_h).to(tl.int64)
    source_col = (tl.load(entry + 6 * rectangles) + col * source_step_w).to(tl.int64)
    kernel_row = tl.load(entry + 7 * rectangles)
    kernel_col = tl.load(entry + 8 * rectangles)
    target_row = (tl.load(entry + 9 * rectangles) + row * target_step_h).to(tl.int64)
    target_col = (tl.load(entry + 10 * rectangles) + col * target_step_w).to(tl.int64)

    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    channel = channel.to(tl.int64)
    # The forward pass reads one channel (summed is 1), the gradient as many as there are outputs per input (shared is 1).
    source_pixels = source + image * source_n + source_row * source_h + source_col * source_w
    source_tile = source_pixels[:, None] + (channel // shared * summed * source_c)[None, :]
    weight_tile = weight + channel * summed * weight_o

    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(taps_h * taps_w * summed):
        tap = step // summed
        member = tl.cast(step % summed, tl.int64)
        tap_row = tl.cast(tap // taps_w, tl.int64)
        tap_col = tl.cast(tap % taps_w, tl.int64)
        source_shift = tap_row * tap_step_h * source_h + tap_col * tap_step_w * source_w + member * source_c
        weight_shift = (kernel_row + tap_row * kernel_step_h) * weight_h + (kernel_col + tap_col * kernel_step_w) * weight_w
        values = tl.load(source_tile + source_shift, mask=exists[None, :], other=0.0)
        factors = tl.load(weight_tile + weight_shift + member * weight_o, mask=exists, other=0.0)
        total += values.to(tl.float32) * factors.to(tl.float32)[None, :]

    total = finish(
        total, inside, image, target_row, target_col, channel, exists,
        bias, mean, var, gain, residual, residual_n, residual_c, residual_h, residual_w, EPS, LOW, HIGH,
    )  # fmt: skip
    result = total.to(target.dtype.element_ty)
    target_pixels = target + image * target_n + target_row * target_h + target_col * target_w
    tl.store(target_pixels[:, None] + (channel * target_c)[None, :], result, mask=inside[:, None] & exists[None, :])
    if parts is not None:
        store_moments(parts, tile, channels, channel, exists, result, inside)


def correlation(
    source: Tensor, weight: Tensor, target: Tensor, axes: Axes, groups: int, gradient: bool, epilogue: Epilogue
) -> list[Launch]:
    """The launches that write ``target`` from ``source``: the output, or for ``gradient`` the input gradient."""
    batch, channels = target.shape[:2]
    multiplier = weight.shape[0] // groups
    block_p, block_c, num_warps = _config(target, batch * target.shape[2] * target.shape[3], sums=False)
    table, tiles = rectangle_table(axes, gradient, batch, block_p, target.device)
    channel_blocks = -(-channels // block_c)
    weight_o, _, weight_h, weight_w = weight.stride()
    parts, merging = epilogue.parts(tiles, channels)
    arguments = {
        "source": source, "weight": weight, "target": target,
        "table": table, "rectangles": table.shape[1], "batch": batch,
        "channel_blocks": channel_blocks, "channels": channels,
        "shared": 1 if gradient else multiplier, "summed": multiplier if gradient else 1,
        **strides("source", source), **strides("target", target),
        "weight_o": weight_o, "weight_h": weight_h, "weight_w": weight_w, **steps(axes, gradient),
        **epilogue.arguments(), "parts": parts,
    }  # fmt: skip
    constants = {
        "RECTANGLES": power_of_two(table.shape[1], 1, 1 << 20), **epilogue.constants(),
        "BLOCK_P": block_p, "BLOCK_C": block_c,
    }  # fmt: skip
    return [Launch(_correlate, (tiles * channel_blocks,), arguments, constants, num_warps), *merging]


@kernel(do_not_specialize=["taps", "batch", "channel_blocks", "channels", "splits", "split_stride"])
def _correlate_weight(
    source, grad, target, table, taps, batch, channel_blocks, channels, splits, split_stride,
    multiplier,
    source_n, source_c, source_h, source_w,
    grad_n, grad_c, grad_h, grad_w,
    target_o, target_h, target_w,
    stride_h, stride_w,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one tap, summed over one split of its pixels; the grid is taps x splits x channel blocks."""
    block = tl.program_id(0)
    split = block // channel_blocks % splits
    entry = table + block // channel_blocks // splits
    channel = (block % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    channel = channel.to(tl.int64)
    rows = tl.load(entry + 2 * taps)
    cols = tl.load(entry + 3 * taps)
    grad_row = tl.load(entry + 4 * taps)
    grad_col = tl.load(entry + 5 * taps)
    source_row = tl.load(entry + 6 * taps)
    source_col = tl.load(entry + 7 * taps)

    area = rows * cols
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    last = tl.cdiv(batch * area, BLOCK_P)
    steps_per_split = tl.cdiv(last, splits)
    first_step = split * steps_per_split
    for step in range(first_step, tl.minimum(first_step + steps_per_split, last)):
        pixel = step * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (pixel // area).to(tl.int64)
        row = pixel % area // cols
        col = pixel % cols  # area is a multiple of cols
        grad_at = image * grad_n + (grad_row + row).to(tl.int64) * grad_h + (grad_col + col).to(tl.int64) * grad_w
        source_at = image * source_n + (source_row + row * stride_h).to(tl.int64) * source_h
        source_at = source_at + (source_col + col * stride_w).to(tl.int64) * source_w
        mask = (image < batch)[:, None] & exists[None, :]
        g = tl.load(grad + grad_at[:, None] + (channel * grad_c)[None, :], mask=mask, other=0.0)
        x = tl.load(source + source_at[:, None] + (channel // multiplier * source_c)[None, :], mask=mask, other=0.0)
        total += g.to(tl.float32) * x.to(tl.float32)

    tap_row = tl.load(entry).to(tl.int64)
    tap_col = tl.load(entry + taps).to(tl.int64)
    target_tap = target + split.to(tl.int64) * split_stride + tap_row * target_h + tap_col * target_w
    tl.store(target_tap + channel * target_o, tl.sum(total, axis=0).to(target.dtype.element_ty), mask=exists)


def weight_correlation(source: Tensor, grad: Tensor, target: Tensor, axes: Axes, groups: int) -> list[Launch]:
    """The launches that write the weight gradient ``target`` [multiplier * C, 1, kh, kw]."""
    batch, channels = grad.shape[:2]
    pixels = batch * grad.shape[2] * grad.shape[3]
    block_p, block_c, num_warps = _config(grad, pixels, sums=True)
    table = tap_table(axes, source.device)
    taps, channel_blocks = table.shape[1], -(-channels // block_c)
    # Loads are all that a step does, so several programs have to wait for theirs at a time; a part is a row of a block.
    splits = split_count(axes, batch, block_p, channel_blocks, resident=8, adding=1)
    # The parts repeat the layout of the target, so that adding them is one pass over flat memory.
    parts = target if splits == 1 else target.new_empty((splits, target.numel()), dtype=torch.float32)
    target_o, _, target_h, target_w = target.stride()
    arguments = {
        "source": source, "grad": grad, "target": parts, "table": table, "taps": taps, "batch": batch,
        "channel_blocks": channel_blocks, "channels": channels, "splits": splits,
        "split_stride": target.numel(),
        "multiplier": channels // groups,
        **strides("source", source), **strides("grad", grad),
        "target_o": target_o, "target_h": target_h, "target_w": target_w,
        "stride_h": axes[0][3], "stride_w": axes[1][3],
    }  # fmt: skip
    constants = {"BLOCK_P": block_p, "BLOCK_C": block_c}
    launches = [Launch(_correlate_weight, (taps * channel_blocks * splits,), arguments, constants, num_warps)]
    if splits > 1:
        launches.append(sum_splits(parts, target))
    return launches


def _config(tensor: Tensor, pixels: int, sums: bool) -> tuple[int, int, int]:
    """(pixels per block, channels per block, warps), so that neighbouring threads read neighbours.

    A measured table goes before the rule. ``sums``: over pixels, for the gradient of the weight.
    """
    vectors = tensor.stride(1) == 1
    how = f"{'sums' if sums else 'maps'} {'vectors' if vectors else 'elements'}"
    rule = (16, 64, 4) if vectors else (256, 1, 4)
    most_p, most_c, warps = launch_table.choose("depthwise", tensor, how, (pixels, tensor.shape[1]), rule)
    return power_of_two(pixels, 1, most_p), power_of_two(tensor.shape[1], 1, most_c), warps
