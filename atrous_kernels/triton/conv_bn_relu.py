"""The passes of a training step of convolution, batch normalisation and activation.

The convolution takes the statistics of its output while it writes it; normalisation and activation are one further pass, and the
backward pass is one pass for the two sums per channel and one for the gradient of the convolution's output. Names, arguments
and results are those of :mod:`atrous_kernels.reference.conv_bn_relu`.

A dense NHWC tensor is a matrix of pixels by channels, a dense NCHW tensor one such matrix per image, seen through its strides.
Sums go through a fixed number of parts, so the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atrous_kernels.triton import launch_table
from atrous_kernels.triton.conv2d import plan_finished
from atrous_kernels.triton.epilogue import Epilogue, bounds, hold, merge_moments, new_statistics
from atrous_kernels.triton.runtime import Launch, kernel, power_of_two, run

if TYPE_CHECKING:
    import triton.language as tl

Ints = Sequence[int]


# Device functions -----------------------------------------------------------------------------------------------------


@kernel()
def _block(matrix, first, pixels, channels, stride_m, stride_p, stride_c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets and mask of a block of [pixels, channels] from pixel ``first`` on, and its channels and which of them exist."""
    pixel = first + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    at = matrix * stride_m + (pixel * stride_p)[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
    return at, (pixel < pixels)[:, None] & exists[None, :], channel, exists


@kernel()
def _vector(values, channel, exists):
    """One value per channel, as a row."""
    return tl.load(values + channel, mask=exists, other=0.0)[None, :]


@kernel()
def _free(gradient, y, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The gradient where the activation did not hold ``y``."""
    if LOW is not None:
        gradient = tl.where(y <= LOW, 0.0, gradient)
    if HIGH is not None:
        gradient = tl.where(y >= HIGH, 0.0, gradient)
    return gradient


# Kernels: the grid is (matrices x stretches of pixels, blocks of channels) ------------------------------------------------


@kernel(do_not_specialize=["pixels", "channels", "stretches", "blocks"])
def _statistics(
    input, parts, pixels, channels, stretches, blocks, stride_m, stride_p, stride_c,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count, mean and moment of ``blocks`` blocks of pixels: Welford's update in every lane, then the lanes united."""
    matrix = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches).to(tl.int64) * blocks * BLOCK_P
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    moment = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(blocks):
        begin = first + step * BLOCK_P
        at, inside, _, _ = _block(matrix, begin, pixels, channels, stride_m, stride_p, stride_c, BLOCK_P, BLOCK_C)
        x = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, x - mean, 0.0)
        mean += distance * (1.0 / (step + 1))
        moment += tl.where(inside, distance * (x - mean), 0.0)
    # A lane has seen its pixels of the first blocks without a gap: all blocks, or all but the last ones.
    left = tl.maximum(pixels - first - tl.arange(0, BLOCK_P), 0)
    counts = tl.minimum((left + BLOCK_P - 1) // BLOCK_P, blocks).to(tl.float32)[:, None]
    count = tl.sum(counts, axis=0)
    pivot = tl.sum(tl.where(tl.arange(0, BLOCK_P)[:, None] == 0, mean, 0.0), axis=0)
    whole = pivot + tl.sum(counts * (mean - pivot[None, :]), axis=0) / count
    distance = mean - whole[None, :]
    moments = tl.sum(moment + counts * distance * distance, axis=0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    to = parts + tl.program_id(0).to(tl.int64) * 3 * channels + channel
    tl.store(to, tl.zeros_like(whole) + count, mask=channel < channels)
    tl.store(to + channels, whole, mask=channel < channels)
    tl.store(to + 2 * channels, moments, mask=channel < channels)


@kernel(do_not_specialize=["pixels", "channels", "stretches"])
def _apply(
    input, mean, scale, shift, output, pixels, channels, stretches, stride_m, stride_p, stride_c,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    matrix = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches).to(tl.int64) * BLOCK_P
    at, inside, channel, exists = _block(matrix, first, pixels, channels, stride_m, stride_p, stride_c, BLOCK_P, BLOCK_C)
    x = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
    y = (x - _vector(mean, channel, exists)) * _vector(scale, channel, exists) + _vector(shift, channel, exists)
    tl.store(output + at, hold(y, LOW, HIGH).to(output.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["pixels", "channels", "stretches", "blocks"])
def _sums(
    grad, input, mean, scale, shift, parts, pixels, channels, stretches, blocks, stride_m, stride_p, stride_c,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of y's gradient, and of its product with (x - mean), of ``blocks`` blocks: ``parts`` [parts, 2, channels]."""
    matrix = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches).to(tl.int64) * blocks * BLOCK_P
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    center, factor = _vector(mean, channel, exists), _vector(scale, channel, exists)
    offset = _vector(shift, channel, exists)
    for step in range(blocks):
        begin = first + step * BLOCK_P
        at, inside, _, _ = _block(matrix, begin, pixels, channels, stride_m, stride_p, stride_c, BLOCK_P, BLOCK_C)
        distance = tl.load(input + at, mask=inside, other=0.0).to(tl.float32) - center
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        g = _free(g, distance * factor + offset, LOW, HIGH)
        total += g
        product += tl.where(inside, g * distance, 0.0)
    to = parts + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(to, tl.sum(total, axis=0), mask=exists)
    tl.store(to + channels, tl.sum(product, axis=0), mask=exists)


@kernel(do_not_specialize=["rows", "elements"])
def _add_parts(parts, target, rows, elements, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows of ``parts`` [rows, elements] added up."""
    element = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = element < elements
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        at = parts + (row.to(tl.int64) * elements)[:, None] + element[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & exists[None, :], other=0.0)
    tl.store(target + element, tl.sum(total, axis=0), mask=exists)


@kernel(do_not_specialize=["pixels", "channels", "stretches"])
def _input_gradient(
    grad, input, mean, scale, shift, slope, offset, output, pixels, channels, stretches, stride_m, stride_p, stride_c,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    matrix = (tl.program_id(0) // stretches).to(tl.int64)
    first = (tl.program_id(0) % stretches).to(tl.int64) * BLOCK_P
    at, inside, channel, exists = _block(matrix, first, pixels, channels, stride_m, stride_p, stride_c, BLOCK_P, BLOCK_C)
    distance = tl.load(input + at, mask=inside, other=0.0).to(tl.float32) - _vector(mean, channel, exists)
    factor = _vector(scale, channel, exists)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = _free(g, distance * factor + _vector(shift, channel, exists), LOW, HIGH)
    d_input = g * factor + distance * _vector(slope, channel, exists) + _vector(offset, channel, exists)
    tl.store(output + at, d_input.to(output.dtype.element_ty), mask=inside)


# Launching ------------------------------------------------------------------------------------------------------------


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    axes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.shape == b.shape and (a.numel() == 0 or all(size == 1 or of_a == of_b for size, of_a, of_b in axes))


class _Cover:
    """How a dense [N, C, H, W] tensor is cut into matrices [pixels, channels], and these into blocks.

    A measured table goes before the rule; ``reduced``: to sums over pixels.
    """

    def __init__(self, tensor: Tensor, reduced: bool) -> None:
        batch, self.channels, height, width = tensor.shape
        if tensor.is_contiguous(memory_format=torch.channels_last):
            matrices, self.pixels = 1, batch * height * width
            self.strides = {"stride_m": 0, "stride_p": self.channels, "stride_c": 1}
            layout, rule = "vectors", (32, 64, 4)
        elif tensor.is_contiguous():
            matrices, self.pixels = batch, height * width
            self.strides = {"stride_m": self.channels * self.pixels, "stride_p": 1, "stride_c": self.pixels}
            layout, rule = "planes", (512, 4, 4)
        else:
            raise ValueError(f"expected dense NCHW or NHWC memory, but got strides {tensor.stride()} of {list(tensor.shape)}")
        how = f"{'sums' if reduced else 'maps'} {layout}"
        most_p, most_c, self.warps = launch_table.choose("passes", tensor, how, (self.pixels, self.channels), rule)
        block_p, block_c = power_of_two(self.pixels, 1, most_p), power_of_two(self.channels, 1, most_c)
        self.blocks = 1
        channel_blocks = -(-self.channels // block_c)
        all_blocks = -(-self.pixels // block_p)
        if reduced:  # few parts: four programs for each of 132 multiprocessors, if every program has four blocks at least
            wanted = max(1, 528 // max(channel_blocks * matrices, 1))
            self.blocks = max(-(-all_blocks // wanted), 4)
        self.stretches = -(-all_blocks // self.blocks)
        self.grid = (matrices * self.stretches, channel_blocks)
        self.constants = {"BLOCK_P": block_p, "BLOCK_C": block_c}

    def launch(self, kernel: Any, tensors: dict[str, Tensor], **constants: float | None) -> Launch:
        """Of a kernel over ``tensors``; of these, ``grad`` has to lie as ``input`` does."""
        input, grad = tensors["input"], tensors.get("grad")
        if grad is not None and not _lie_alike(grad, input):
            raise ValueError(
                f"grad: expected the sizes and strides of input, {list(input.shape)} and {input.stride()}, "
                f"but got {list(grad.shape)} and {grad.stride()}"
            )
        sizes = {"pixels": self.pixels, "channels": self.channels, "stretches": self.stretches}
        if "blocks" in kernel.do_not_specialize:
            sizes["blocks"] = self.blocks
        return Launch(kernel, self.grid, {**tensors, **sizes, **self.strides}, {**constants, **self.constants}, self.warps)


def plan_batch_norm_statistics(input: Tensor) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The unwritten results of :func:`batch_norm_statistics` and the launches that write them."""
    cover = _Cover(input, reduced=True)
    mean, moment = new_statistics(cover.channels, input)
    parts = mean.new_empty((cover.grid[0], 3, cover.channels))
    return (mean, moment), [cover.launch(_statistics, {"input": input, "parts": parts}), merge_moments(parts, mean, moment)]


def plan_batch_norm_act_sums(
    grad: Tensor, input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, low: float, high: float
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The unwritten results of :func:`batch_norm_act_sums` and the launches that write them."""
    cover = _Cover(input, reduced=True)
    sums = mean.new_empty((2, cover.channels))
    parts = mean.new_empty((cover.grid[0], 2, cover.channels))
    tensors = {"grad": grad, "input": input, "mean": mean, "scale": scale, "shift": shift, "parts": parts}
    rows = parts.shape[0]
    adding = {"parts": parts, "target": sums, "rows": rows, "elements": sums.numel()}
    blocks = {"BLOCK_R": power_of_two(rows, 1, 64), "BLOCK_C": 16}
    total, product = sums.unbind()
    return (total, product), [
        cover.launch(_sums, tensors, **_held(low, high)),
        Launch(_add_parts, (-(-sums.numel() // 16),), adding, blocks),
    ]


def plan_batch_norm_act(
    input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, low: float, high: float, output: Tensor
) -> list[Launch]:
    """The launch that writes ``output``, which lies as ``input`` does or is ``input``."""
    tensors = {"input": input, "mean": mean, "scale": scale, "shift": shift, "output": output}
    return [_Cover(input, reduced=False).launch(_apply, tensors, **_held(low, high))]


def plan_batch_norm_act_input(
    grad: Tensor, input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, offset: Tensor,
    low: float, high: float,
) -> tuple[Tensor, list[Launch]]:  # fmt: skip
    """The unwritten result of :func:`batch_norm_act_input` and the launch that writes it."""
    output = torch.empty_like(input)
    tensors = {
        "grad": grad, "input": input, "mean": mean, "scale": scale, "shift": shift, "slope": slope, "offset": offset,
        "output": output,
    }  # fmt: skip
    return output, [_Cover(input, reduced=False).launch(_input_gradient, tensors, **_held(low, high))]


def _held(low: float, high: float) -> dict[str, float | None]:
    return dict(zip(("LOW", "HIGH"), bounds(low, high), strict=True))


def batch_norm_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared distances from it, per channel, float32; zeros where there is no element."""
    statistics, launches = plan_batch_norm_statistics(input)
    run(launches, input.device)
    return statistics


def batch_norm_act(input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, low: float, high: float) -> Tensor:
    """``clamp((input - mean) * scale + shift, low, high)``; the vectors [C] are float32."""
    output = torch.empty_like(input)
    run(plan_batch_norm_act(input, mean, scale, shift, low, high, output), input.device)
    return output


def batch_norm_act_(input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, low: float, high: float) -> None:
    """:func:`batch_norm_act` in place."""
    run(plan_batch_norm_act(input, mean, scale, shift, low, high, input), input.device)


def batch_norm_act_sums(grad: Tensor, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Per channel the sums of y's gradient and of y's gradient times (x - mean)."""
    sums, launches = plan_batch_norm_act_sums(grad, input, *arguments)
    run(launches, input.device)
    return sums


def batch_norm_act_input(grad: Tensor, input: Tensor, *arguments: Any) -> Tensor:
    """``scale * y's gradient + slope * (x - mean) + offset``."""
    output, launches = plan_batch_norm_act_input(grad, input, *arguments)
    run(launches, input.device)
    return output


def plan_conv2d_statistics(
    input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The unwritten results of :func:`conv2d_statistics` and the launches that write them."""
    mean, moment = new_statistics(weight.shape[0], input)
    epilogue = Epilogue(statistics=(mean, moment))
    output, launches = plan_finished(input, weight, epilogue, stride, padding, dilation, groups)
    return (output, mean, moment), launches


def conv2d_statistics(
    input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution without bias, and :func:`batch_norm_statistics` of its output, which is not read for them."""
    results, launches = plan_conv2d_statistics(input, weight, stride, padding, dilation, groups)
    run(launches, input.device)
    return results
