"""Convolution and its two gradients as implicit matrix products over valid taps.

Forward and input gradient are one kernel. Seen from the tensor that is written ("target") both correlate the tensor that
is read ("source") with a subset of the kernel's taps: the forward pass with a step of the stride, the input gradient with
a step of one for each residue of the stride. The target is cut into rectangles whose set of valid taps is constant; each
rectangle is flattened across the batch into tiles of BLOCK_M pixels, and a tile multiplies [pixels, channels read] by
[channels read, channels written] for every valid tap and block of channels. Padding zeros are never loaded or multiplied.

The weight gradient multiplies, per tap, [channels out, pixels] by [pixels, channels in] over the output rectangle on which
the tap is valid. Where that gives too few programs the pixels are cut into a fixed number of parts, each summed into
float32 of its own and added in order by a second kernel. No atomics: the same inputs give the same bits.

Tensors are read and written through their strides, so both memory layouts are taken as they are. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atrous_kernels.problem import out_extent
from atrous_kernels.triton import depthwise_conv2d as depthwise
from atrous_kernels.triton import launch_table
from atrous_kernels.triton.common import sum_splits, tile_pixels
from atrous_kernels.triton.epilogue import Epilogue, finish, store_moments
from atrous_kernels.triton.runtime import (
    Blocks,
    Launch,
    can_run,
    copies_blocks,
    dot_precision,
    interpreting,
    kernel,
    new_tensor,
    power_of_two,
    run,
    strides,
)
from atrous_kernels.triton.schedule import Axes, axis_numbers, rectangle_table, split_count, steps, tap_table

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["can_run", "conv2d", "conv2d_input", "conv2d_weight"]

Ints = Sequence[int]


# Forward and input gradient -------------------------------------------------------------------------------------------


@kernel()
def accumulate(
    source_pixels, source_channels, source_c, source_h, source_w, tap_step_h, tap_step_w,
    weight_read_at, weight_written_at, weight_read, weight_h, weight_w, kernel_step_h, kernel_step_w,
    kernel_row, kernel_col, taps_h, taps_w, read, channels_read, written, channels_written,
    weight_blocks, weight_row, first_written, kernel_width,
    GRADIENT: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile's sums over its valid taps and blocks of the channels read.

    ``source_pixels`` are addresses at the first valid tap, ``source_channels`` offsets of the first block of channels. Where
    ``weight_blocks`` is given, weights come through it: rows are output channels, ``weight_row`` the first of the tile or, for
    GRADIENT, of the group; columns are taps times input channels.
    """
    channel_blocks = tl.cdiv(channels_read, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(taps_h * taps_w * channel_blocks):
        tap = step // channel_blocks
        first_channel = (step % channel_blocks) * BLOCK_K
        # Promoted before the strides come in: these are the products that leave 32 bits.
        channel = tl.cast(first_channel, tl.int64)
        tap_row = tl.cast(tap // taps_w, tl.int64)
        tap_col = tl.cast(tap % taps_w, tl.int64)
        source_shift = tap_row * tap_step_h * source_h + tap_col * tap_step_w * source_w + channel * source_c
        weight_shift = (kernel_row + tap_row * kernel_step_h) * weight_h + (kernel_col + tap_col * kernel_step_w) * weight_w
        weight_shift = weight_shift + channel * weight_read
        # Added up in the loop: a tile of 64-bit pointers kept across it would spill where loads are not vectors.
        source_tile = source_pixels[:, None] + (source_channels + source_shift)[None, :]
        weight_tile = (weight_read_at + weight_shift)[:, None] + weight_written_at[None, :]
        if RAGGED:
            exists = first_channel + read < channels_read
            a = tl.load(source_tile, mask=exists[None, :], other=0.0)
            b = tl.load(weight_tile, mask=exists[:, None] & (written < channels_written)[None, :], other=0.0)
        else:
            a = tl.load(source_tile)
            if weight_blocks is not None:
                kernel_tap = (kernel_row + tap_row * kernel_step_h) * kernel_width + kernel_col + tap_col * kernel_step_w
                kernel_tap = kernel_tap.to(tl.int32)
                if GRADIENT:
                    b = weight_blocks.load([weight_row + first_channel, kernel_tap * channels_written + first_written])
                else:
                    b = tl.trans(weight_blocks.load([weight_row, kernel_tap * channels_read + first_channel]))
            else:
                b = tl.load(weight_tile)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@kernel(do_not_specialize=["rectangles", "batch", "column_blocks", "tap_step_h", "tap_step_w", "kernel_width"])
def _correlate(
    source, weight, weight_blocks, kernel_width, bias, target, table, rectangles, batch, column_blocks,
    channels_read, channels_written,  # both per group
    source_n, source_c, source_h, source_w,
    weight_group, weight_read, weight_written, weight_h, weight_w,
    target_n, target_c, target_h, target_w,
    source_step_h, source_step_w, tap_step_h, tap_step_w, kernel_step_h, kernel_step_w, target_step_h, target_step_w,
    mean, var, gain, residual, residual_n, residual_c, residual_h, residual_w, parts,
    RECTANGLES: tl.constexpr, GRADIENT: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    EPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M pixels, BLOCK_N channels] tile of the target; the grid is (tiles x column blocks, groups).

    ``*_n, _c, _h, _w`` are element strides; ``*_step`` count positions per target position, per tap, or per tap subset.
    RAGGED: the channels read or written do not fill their last block. WIDEN: multiply in float32. ``weight_blocks`` may stand in
    for the weight.
    """
    tile = tl.program_id(0) // column_blocks
    group = tl.program_id(1).to(tl.int64)
    entry, image, row, col, inside = tile_pixels(table, tile, rectangles, batch, RECTANGLES, BLOCK_M)
    taps_h = tl.load(entry + 3 * rectangles)
    taps_w = tl.load(entry + 4 * rectangles)
    source_row = (tl.load(entry + 5 * rectangles) + row * source_step_h).to(tl.int64)
    source_col = (tl.load(entry + 6 * rectangles) + col * source_step_w).to(tl.int64)
    kernel_row = tl.load(entry + 7 * rectangles)
    kernel_col = tl.load(entry + 8 * rectangles)
    target_row = (tl.load(entry + 9 * rectangles) + row * target_step_h).to(tl.int64)
    target_col = (tl.load(entry + 10 * rectangles) + col * target_step_w).to(tl.int64)

    read = tl.arange(0, BLOCK_K)
    first_written = (tl.program_id(0) % column_blocks) * BLOCK_N
    written = first_written + tl.arange(0, BLOCK_N)
    weight_row = tl.program_id(1) * channels_read if GRADIENT else tl.program_id(1) * channels_written + first_written
    source_pixels = source + image * source_n + source_row * source_h + source_col * source_w
    source_channels = (group * channels_read + read) * source_c
    weight_read_at = weight + group * weight_group + read.to(tl.int64) * weight_read
    weight_written_at = written.to(tl.int64) * weight_written

    total = accumulate(
        source_pixels, source_channels, source_c, source_h, source_w, tap_step_h, tap_step_w,
        weight_read_at, weight_written_at, weight_read, weight_h, weight_w, kernel_step_h, kernel_step_w,
        kernel_row, kernel_col, taps_h, taps_w, read, channels_read, written, channels_written,
        weight_blocks, weight_row, first_written, kernel_width,
        GRADIENT, RAGGED, PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    in_range = written < channels_written
    out_channel = group * channels_written + written
    total = finish(
        total, inside, image, target_row, target_col, out_channel, in_range,
        bias, mean, var, gain, residual, residual_n, residual_c, residual_h, residual_w, EPS, LOW, HIGH,
    )  # fmt: skip
    result = total.to(target.dtype.element_ty)
    target_pixels = target + image * target_n + target_row * target_h + target_col * target_w
    tl.store(
        target_pixels[:, None] + (out_channel * target_c)[None, :],
        result,
        mask=inside[:, None] & in_range[None, :],
    )
    if parts is not None:
        store_moments(parts, tile, channels_written * tl.num_programs(1), out_channel, in_range, result, inside)


def _correlation(
    source: Tensor, weight: Tensor, target: Tensor, axes: Axes, groups: int, gradient: bool, epilogue: Epilogue
) -> list[Launch]:
    """The launches that write ``target`` from ``source``: the output, or for ``gradient`` the input gradient."""
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    weight_out, weight_in, weight_h, weight_w = weight.stride()
    if gradient:
        read, written, weight_read, weight_written = out_channels, in_channels, weight_out, weight_in
    else:
        read, written, weight_read, weight_written = in_channels, out_channels, weight_in, weight_out
    batch = target.shape[0]
    pixels = batch * target.shape[2] * target.shape[3]
    block_m, block_n, block_k, num_warps, num_stages = tile_config((source, weight), pixels, written, read)
    if epilogue.is_heavy:
        num_warps = 8 if block_m * block_n >= 64 * 64 else num_warps
    if epilogue.residual is not None:
        # On sm_100 a thread has a row of sums, so the scale, the shift and the residual of every column beside it.
        block_n = min(block_n, 64)
    table, tiles = rectangle_table(axes, gradient, batch, block_m, target.device)
    column_blocks = -(-written // block_n)
    parts, merging = epilogue.parts(tiles, target.shape[1])
    ragged = read % block_k != 0 or written % block_n != 0
    blocks = None if ragged else _weight_blocks(weight, (block_k, block_n) if gradient else (block_n, block_k))
    arguments = {
        "source": source, "weight": weight, "target": target, "weight_blocks": blocks, "kernel_width": weight.shape[3],
        "table": table, "rectangles": table.shape[1], "batch": batch, "column_blocks": column_blocks,
        "channels_read": read, "channels_written": written,
        **strides("source", source), **strides("target", target),
        "weight_group": out_channels * weight_out, "weight_read": weight_read, "weight_written": weight_written,
        "weight_h": weight_h, "weight_w": weight_w, **steps(axes, gradient), **epilogue.arguments(), "parts": parts,
    }  # fmt: skip
    constants = {
        "RECTANGLES": power_of_two(table.shape[1], 1, 1 << 20),
        "GRADIENT": gradient, "RAGGED": ragged,
        **dot_constants(source.dtype), **epilogue.constants(),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    return [Launch(_correlate, (tiles * column_blocks, groups), arguments, constants, num_warps, num_stages), *merging]


def _weight_blocks(weight: Tensor, block: tuple[int, int]) -> Blocks | None:
    """A dense channels-last weight of 16 bits as a matrix of output channels by taps times input channels, where the device can
    load it so. Its rows begin at multiples of 16 bytes where its channels fill their blocks."""
    flat = weight.permute(0, 2, 3, 1)
    if weight.dtype.itemsize != 2 or weight.numel() == 0 or not flat.is_contiguous() or not copies_blocks(weight.device):
        return None
    if weight.data_ptr() % 16 != 0 or max(weight.shape[0], flat[0].numel()) >= 2**31:
        return None
    return Blocks(weight, (weight.shape[0], flat[0].numel()), block)


# Weight gradient ------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=["taps", "batch", "out_blocks", "in_blocks", "splits", "split_stride"])
def _correlate_weight(
    source, grad, target, table, taps, batch, out_blocks, in_blocks, splits, split_stride,
    out_channels, in_channels,  # both per group
    source_n, source_c, source_h, source_w,
    grad_n, grad_c, grad_h, grad_w,
    target_o, target_i, target_h, target_w,
    stride_h, stride_w,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M out channels, BLOCK_N in channels] of one tap, summed over one split of the pixels it is valid on.

    The grid is (taps x splits x out blocks x in blocks, groups): the longest programs first, those that read the same beside
    each other. ``target`` has one part per split, ``split_stride`` apart.
    """
    block = tl.program_id(0)
    split = block // (out_blocks * in_blocks) % splits
    entry = table + block // (out_blocks * in_blocks) // splits
    group = tl.program_id(1).to(tl.int64)
    out = (block // in_blocks % out_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_ = (block % in_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(entry + 2 * taps)
    cols = tl.load(entry + 3 * taps)
    grad_row = tl.load(entry + 4 * taps)
    grad_col = tl.load(entry + 5 * taps)
    source_row = tl.load(entry + 6 * taps)
    source_col = tl.load(entry + 7 * taps)
    grad_channels = grad + (group * out_channels + out) * grad_c
    source_channels = source + (group * in_channels + in_) * source_c

    area = rows * cols
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(batch * area, BLOCK_K)
    steps_per_split = tl.cdiv(steps, splits)
    first_step = split * steps_per_split
    for step in range(first_step, tl.minimum(first_step + steps_per_split, steps)):
        pixel = step * BLOCK_K + tl.arange(0, BLOCK_K)
        image = (pixel // area).to(tl.int64)
        row = pixel % area // cols
        col = pixel % cols  # area is a multiple of cols
        grad_at = image * grad_n + (grad_row + row).to(tl.int64) * grad_h + (grad_col + col).to(tl.int64) * grad_w
        source_at = image * source_n + (source_row + row * stride_h).to(tl.int64) * source_h
        source_at = source_at + (source_col + col * stride_w).to(tl.int64) * source_w
        a_exists = (image < batch)[None, :]
        b_exists = (image < batch)[:, None]
        if RAGGED:
            a_exists = a_exists & (out < out_channels)[:, None]
            b_exists = b_exists & (in_ < in_channels)[None, :]
        # Both sides are masked: a zero times whatever lies beyond the end could be NaN.
        a = tl.load(grad_channels[:, None] + grad_at[None, :], mask=a_exists, other=0.0)
        b = tl.load(source_channels[None, :] + source_at[:, None], mask=b_exists, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    tap_row = tl.load(entry).to(tl.int64)
    tap_col = tl.load(entry + taps).to(tl.int64)
    target_tap = target + split.to(tl.int64) * split_stride + tap_row * target_h + tap_col * target_w
    offsets = (group * out_channels + out)[:, None] * target_o + in_.to(tl.int64)[None, :] * target_i
    tl.store(
        target_tap + offsets,
        total.to(target.dtype.element_ty),
        mask=(out < out_channels)[:, None] & (in_ < in_channels)[None, :],
    )


def _weight_correlation(source: Tensor, grad: Tensor, target: Tensor, axes: Axes, groups: int) -> list[Launch]:
    """The launches that write the weight gradient ``target``."""
    out_channels, in_channels = target.shape[0] // groups, target.shape[1]
    batch = source.shape[0]
    pixels = batch * grad.shape[2] * grad.shape[3]
    block_m, block_n, block_k, num_warps, num_stages = tile_config((source, grad), out_channels, in_channels, pixels)
    table = tap_table(axes, source.device)
    taps = table.shape[1]
    out_blocks, in_blocks = -(-out_channels // block_m), -(-in_channels // block_n)
    programs = taps * out_blocks * in_blocks
    # A part is written and read in float32: about as many bytes as four steps of a square block load, the reading from farther.
    splits = split_count(axes, batch, block_k, out_blocks * in_blocks * groups, resident=1, adding=6)
    # The parts repeat the layout of the target, so that adding them is one pass over flat memory.
    parts = target if splits == 1 else target.new_empty((splits, target.numel()), dtype=torch.float32)
    target_o, target_i, target_h, target_w = target.stride()
    arguments = {
        "source": source, "grad": grad, "target": parts, "table": table, "taps": taps, "batch": batch,
        "out_blocks": out_blocks, "in_blocks": in_blocks, "splits": splits, "split_stride": target.numel(),
        "out_channels": out_channels, "in_channels": in_channels,
        **strides("source", source), **strides("grad", grad),
        "target_o": target_o, "target_i": target_i, "target_h": target_h, "target_w": target_w,
        "stride_h": axes[0][3], "stride_w": axes[1][3],
    }  # fmt: skip
    constants = {
        "RAGGED": out_channels % block_m != 0 or in_channels % block_n != 0,
        **dot_constants(source.dtype),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    launches = [Launch(_correlate_weight, (programs * splits, groups), arguments, constants, num_warps, num_stages)]
    if splits > 1:
        launches.append(sum_splits(parts, target))
    return launches


# Launching ------------------------------------------------------------------------------------------------------------


def tile_config(
    tensors: Sequence[Tensor], rows: int, cols: int, reduced: int, kind: str = "dense"
) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of a product [rows, reduced] x [reduced, cols]; ``kind`` of kernel.

    Where channels are neighbours in memory, loads are asynchronous 16-byte copies. Elsewhere every element needs an
    address and a register of its own, so tiles are smaller. A measured table goes before these rules.
    """
    vectors = all(tensor.stride(1) == 1 and tensor.shape[1] % 16 == 0 for tensor in tensors)
    dtype = tensors[0].dtype
    if dtype is torch.float32:
        # Exact products run on the scalar units and keep their operands in registers: a shallower block.
        rule = (64, 64, 32, 4, 3) if vectors and dot_precision(dtype) == "tf32" else (64, 64, 16, 4, 3)
    else:
        rule = (128, 128, 64, 8, 3) if vectors else (64, 64, 32, 4, 3)
    how = f"{dot_precision(dtype)} {'vectors' if vectors else 'elements'}"
    most_m, most_n, most_k, warps, stages = launch_table.choose(kind, tensors[0], how, (rows, cols, reduced), rule)
    # A matrix instruction needs 16 along every axis; more than the problem has would only be masked away.
    block_m, block_n = power_of_two(rows, 16, most_m), power_of_two(cols, 16, most_n)
    return block_m, block_n, power_of_two(reduced, 16, most_k), warps if block_m * block_n >= 64 * 64 else 4, stages


def dot_constants(dtype: torch.dtype) -> dict[str, object]:
    # The interpreter's dot takes bfloat16 for integers; in float32 the products are as exact as in a matrix instruction.
    return {"PRECISION": dot_precision(dtype), "WIDEN": interpreting() and dtype is torch.bfloat16}


def plan_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, list[Launch]]:
    """The unwritten result of :func:`conv2d` and the launches that write it."""
    return plan_finished(input, weight, Epilogue(bias), stride, padding, dilation, groups)


def plan_finished(
    input: Tensor, weight: Tensor, epilogue: Epilogue, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, list[Launch]]:
    """As :func:`plan_conv2d`, with more than a bias added to the sums."""
    taps = weight.shape[2:]
    out_size = [out_extent(*a) for a in zip(input.shape[2:], taps, stride, padding, dilation, strict=True)]
    axes = axis_numbers(input.shape[2:], out_size, taps, stride, padding, dilation)
    output = new_tensor((input.shape[0], weight.shape[0], *out_size), input, weight)
    correlation = depthwise.correlation if _is_depthwise(weight.shape) else _correlation
    return output, correlation(input, weight, output, axes, groups, False, epilogue)


def plan_conv2d_input(
    input_size: Ints, weight: Tensor, grad_output: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, list[Launch]]:
    """The unwritten result of :func:`conv2d_input` and the launches that write it."""
    axes = axis_numbers(input_size[2:], grad_output.shape[2:], weight.shape[2:], stride, padding, dilation)
    grad_input = new_tensor(input_size, grad_output, weight)
    correlation = depthwise.correlation if _is_depthwise(weight.shape) else _correlation
    return grad_input, correlation(grad_output, weight, grad_input, axes, groups, True, Epilogue())


def plan_conv2d_weight(
    input: Tensor, weight_size: Ints, grad_output: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, list[Launch]]:
    """The unwritten result of :func:`conv2d_weight` and the launches that write it."""
    axes = axis_numbers(input.shape[2:], grad_output.shape[2:], weight_size[2:], stride, padding, dilation)
    grad_weight = new_tensor(weight_size, input, grad_output)
    correlation = depthwise.weight_correlation if _is_depthwise(weight_size) else _weight_correlation
    return grad_weight, correlation(input, grad_output, grad_weight, axes, groups)


def _is_depthwise(weight_size: Ints) -> bool:
    # One channel in per channel out: no sum over channels, so nothing for a matrix instruction to do.
    return weight_size[1] == 1


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Input [N, C, H, W] and weight [O, C/groups, kh, kw] of one dtype (float32, bfloat16, float16) -> [N, O, H', W'].

    The result is channels-last if input or weight is. Arguments are those that the op has checked already.
    """
    output, launches = plan_conv2d(input, weight, bias, stride, padding, dilation, groups)
    run(launches, output.device)
    return output


def conv2d_input(
    input_size: Ints, weight: Tensor, grad_output: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Gradient with respect to the input: ``grad_output`` [N, O, H', W'] -> ``input_size``."""
    grad_input, launches = plan_conv2d_input(input_size, weight, grad_output, stride, padding, dilation, groups)
    run(launches, grad_input.device)
    return grad_input


def conv2d_weight(
    input: Tensor, weight_size: Ints, grad_output: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Gradient with respect to the weight: input [N, C, H, W] and ``grad_output`` [N, O, H', W'] -> ``weight_size``."""
    grad_weight, launches = plan_conv2d_weight(input, weight_size, grad_output, stride, padding, dilation, groups)
    run(launches, grad_weight.device)
    return grad_weight
