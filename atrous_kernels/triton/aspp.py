"""The convolutions of atrous spatial pyramid pooling in one launch.

All branches read the same input with stride 1 and keep its size. Their rectangles of constant valid taps are one list, the
longest first, so that the tiles of one branch fill the waves that another leaves empty, and every branch writes its slice of
the channels of one tensor: what follows is one pass, and one 1x1 convolution, over that tensor. A tile is computed as in
:mod:`atrous_kernels.triton.conv2d`, with its branch's weight and rate taken from the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atrous_kernels.triton.common import tile_pixels
from atrous_kernels.triton.conv2d import accumulate, dot_constants, tile_config
from atrous_kernels.triton.epilogue import Epilogue, bounds, finish, merge_moments, new_statistics, store_moments
from atrous_kernels.triton.runtime import Launch, kernel, new_tensor, power_of_two, run, strides
from atrous_kernels.triton.schedule import axis_numbers, branch_table

if TYPE_CHECKING:
    import triton.language as tl

Pairs = Sequence[Sequence[int]]
#: The kernel has this many arguments for weights.
MOST_BRANCHES = 8


@kernel()
def _or(pointer, other, condition):
    """``other`` instead, where there is one and the condition holds."""
    if other is not None:
        pointer = tl.where(condition, other, pointer)
    return pointer


@kernel(do_not_specialize=["rectangles", "batch", "column_blocks", "channels"])
def _branches(
    source, weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, weight_7, target,
    table, rectangles, batch, column_blocks, channels_read, channels, weight_read,
    source_n, source_c, source_h, source_w, target_n, target_c, target_h, target_w,
    bias, mean, var, gain, parts,
    RECTANGLES: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    EPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M pixels, BLOCK_N channels] tile of one branch; the grid is (tiles x column blocks).

    ``weight_read`` is None where the branches' strides between channels differ. ALIGNED: branches' channels and rows of
    weights begin at multiples of 16 elements.
    """
    tile = tl.program_id(0) // column_blocks
    entry, image, row, col, inside = tile_pixels(table, tile, rectangles, batch, RECTANGLES, BLOCK_M)
    taps_h = tl.load(entry + 3 * rectangles)
    taps_w = tl.load(entry + 4 * rectangles)
    source_row = (tl.load(entry + 5 * rectangles) + row).to(tl.int64)
    source_col = (tl.load(entry + 6 * rectangles) + col).to(tl.int64)
    kernel_row = tl.load(entry + 7 * rectangles)
    kernel_col = tl.load(entry + 8 * rectangles)
    target_row = (tl.load(entry + 9 * rectangles) + row).to(tl.int64)
    target_col = (tl.load(entry + 10 * rectangles) + col).to(tl.int64)
    branch = tl.load(entry + 11 * rectangles)
    part = tl.load(entry + 12 * rectangles) + tile - tl.load(entry)
    rate_h = tl.load(entry + 13 * rectangles)
    rate_w = tl.load(entry + 14 * rectangles)
    first_channel = tl.load(entry + 15 * rectangles)
    channels_written = tl.load(entry + 16 * rectangles)
    weight_written = tl.load(entry + 17 * rectangles)
    weight_h = tl.load(entry + 18 * rectangles)
    weight_w = tl.load(entry + 19 * rectangles)
    if weight_read is None:
        weight_read = tl.load(entry + 20 * rectangles)
    if ALIGNED:
        first_channel = tl.multiple_of(first_channel, 16)
        channels_written = tl.multiple_of(channels_written, 16)
        weight_written = tl.multiple_of(weight_written, 16)
        weight_h = tl.multiple_of(weight_h, 16)
        weight_w = tl.multiple_of(weight_w, 16)
    weight = weight_0
    weight = _or(weight, weight_1, branch == 1)
    weight = _or(weight, weight_2, branch == 2)
    weight = _or(weight, weight_3, branch == 3)
    weight = _or(weight, weight_4, branch == 4)
    weight = _or(weight, weight_5, branch == 5)
    weight = _or(weight, weight_6, branch == 6)
    weight = _or(weight, weight_7, branch == 7)

    read = tl.arange(0, BLOCK_K)
    written = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = accumulate(
        source + image * source_n + source_row * source_h + source_col * source_w,
        read.to(tl.int64) * source_c, source_c, source_h, source_w, rate_h, rate_w,
        weight + read.to(tl.int64) * weight_read, written.to(tl.int64) * weight_written,
        weight_read, weight_h, weight_w, 1, 1,
        kernel_row, kernel_col, taps_h, taps_w, read, channels_read, written, channels_written, None, None, None, None,
        False, RAGGED, PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    in_range = written < channels_written
    channel = (first_channel + written).to(tl.int64)
    total = finish(
        total, inside, image, target_row, target_col, channel, in_range,
        bias, mean, var, gain, None, None, None, None, None, EPS, LOW, HIGH,
    )  # fmt: skip
    result = total.to(target.dtype.element_ty)
    pixels = target + image * target_n + target_row * target_h + target_col * target_w
    tl.store(pixels[:, None] + (channel * target_c)[None, :], result, mask=inside[:, None] & in_range[None, :])
    if parts is not None:
        store_moments(parts, part, channels, channel, in_range, result, inside)


def plan_aspp_branches(
    input: Tensor, weights: Sequence[Tensor], dilations: Pairs, epilogue: Epilogue
) -> tuple[Tensor, list[Launch]]:
    """The unwritten maps of all branches, side by side in the channels, and the launches that write them.

    The epilogue's vectors hold all branches' channels; it has no residual.
    """
    if not 1 <= len(weights) <= MOST_BRANCHES:
        raise ValueError(f"expected 1 to {MOST_BRANCHES} branches, but got {len(weights)}")
    batch, channels_read, *size = input.shape
    widths = [weight.shape[0] for weight in weights]
    channels = sum(widths)
    target = new_tensor((batch, channels, *size), input, *weights)
    block_m, block_n, block_k, num_warps, num_stages = tile_config(
        (input, *weights), batch * size[0] * size[1], max(widths), channels_read, "aspp"
    )
    if epilogue.is_heavy:
        num_warps = 8 if block_m * block_n >= 64 * 64 else num_warps
    rows = []
    for index, (weight, rate) in enumerate(zip(weights, dilations, strict=True)):
        kernel_size = weight.shape[2:]
        padding = [r * (k // 2) for r, k in zip(rate, kernel_size, strict=True)]
        axes = axis_numbers(size, size, kernel_size, (1, 1), padding, rate)
        out, read, height, width = weight.stride()
        rows.append((axes, (*map(int, rate), sum(widths[:index]), widths[index], out, height, width, read)))
    table, tiles, most_tiles = branch_table(tuple(rows), batch, block_m, target.device)
    column_blocks = -(-max(widths) // block_n)
    reads = {weight.stride(1) for weight in weights}
    aligned = all(n % 16 == 0 for weight in weights for n in (weight.shape[0], weight.stride(0), *weight.stride()[2:]))
    parts, merging = None, []
    if epilogue.statistics is not None:
        # A branch with fewer tiles than another leaves parts unwritten: they count no pixel.
        parts = input.new_zeros((most_tiles, 3, channels), dtype=torch.float32)
        merging = [merge_moments(parts, *epilogue.statistics)]
    vectors = {"bias": epilogue.bias, "mean": epilogue.mean, "var": epilogue.var, "gain": epilogue.gain}
    arguments = {
        "source": input, "target": target,
        **{f"weight_{i}": weights[i] if i < len(weights) else None for i in range(MOST_BRANCHES)},
        "table": table, "rectangles": table.shape[1], "batch": batch, "column_blocks": column_blocks,
        "channels_read": channels_read, "channels": channels, "weight_read": reads.pop() if len(reads) == 1 else None,
        **strides("source", input), **strides("target", target), **vectors, "parts": parts,
    }  # fmt: skip
    constants = {
        "RECTANGLES": power_of_two(table.shape[1], 1, 1 << 20),
        "RAGGED": channels_read % block_k != 0 or any(width % block_n != 0 for width in widths),
        "ALIGNED": aligned, **dot_constants(input.dtype), **epilogue.constants(),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    return target, [Launch(_branches, (tiles * column_blocks,), arguments, constants, num_warps, num_stages), *merging]


def aspp_branches(input: Tensor, weights: Sequence[Tensor], dilations: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Input [N, C, H, W] and centred weights [O_i, C, k, k] with rates -> [N, sum O_i, H, W], and its mean and moment.

    The last two are float32 vectors, per channel: the mean, and the sum of squared distances from it.
    """
    mean, moment = new_statistics(sum(weight.shape[0] for weight in weights), input)
    output, launches = plan_aspp_branches(input, weights, dilations, Epilogue(statistics=(mean, moment)))
    run(launches, input.device)
    return output, mean, moment


def aspp_branches_act(
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Pairs,
    norm: Sequence[Tensor | None],
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    """The maps of :func:`aspp_branches`, normalised by constants and activated before they are written.

    ``norm`` is (weight, bias, mean, variance) of all branches' channels, the first two or None.
    """
    gain, bias, mean, var = norm
    epilogue = Epilogue(bias, mean, var, gain, eps, None, *bounds(low, high))
    output, launches = plan_aspp_branches(input, weights, dilations, epilogue)
    run(launches, input.device)
    return output
