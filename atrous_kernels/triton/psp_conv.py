"""The pooled half of the convolution in PSPNet's head, added to its dense half in one launch.

What the pooled levels give to output ``(n, o, y, x)`` is ``sum_k rows[y, k] columns[x, k] products[n, k, o]``: ``k`` counts the
cells of all levels and the taps of the kernel, ``products`` are the levels times the taps at bin resolution, and ``rows`` and
``columns`` hold the weights of interpolation at the positions that the taps read. A tile is the product of a stretch of one row
by the terms, made in registers from the two matrices, and the terms by channels. No interpolated map is stored in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from atrous_kernels.triton import launch_table
from atrous_kernels.triton.conv2d import dot_constants
from atrous_kernels.triton.runtime import Launch, dot_precision, kernel, new_tensor, power_of_two, run, strides

if TYPE_CHECKING:
    import triton.language as tl


@kernel(do_not_specialize=["height", "width", "stretches", "terms"])
def _add_upsampled(
    input, products, rows, columns, output, height, width, stretches, terms, channels,
    input_n, input_c, input_h, input_w, output_n, output_c, output_h, output_w,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M positions of one row, BLOCK_N channels]; the grid is (images x rows x stretches, blocks of channels)."""
    block = tl.program_id(0)
    line = block // stretches
    image = (line // height).to(tl.int64)
    row = (line % height).to(tl.int64)
    column = (block % stretches) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < width)[:, None]
    in_range = (channel < channels)[None, :]
    column = column.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, terms, BLOCK_K):
        term = first + tl.arange(0, BLOCK_K)
        exists = term < terms
        down = tl.load(rows + row * terms + term, mask=exists, other=0.0)
        across = tl.load(columns + (column * terms)[:, None] + term[None, :], mask=inside & exists[None, :], other=0.0)
        # Both sides are masked: a zero times whatever lies beyond the end could be NaN.
        at = (image * terms + term)[:, None] * channels + channel[None, :]
        b = tl.load(products + at, mask=exists[:, None] & in_range, other=0.0)
        a = (across * down[None, :]).to(b.dtype)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    channel = channel.to(tl.int64)
    at = (input + image * input_n + row * input_h) + (column * input_w)[:, None] + (channel * input_c)[None, :]
    total += tl.load(at, mask=inside & in_range, other=0.0).to(tl.float32)
    at = (output + image * output_n + row * output_h) + (column * output_w)[:, None] + (channel * output_c)[None, :]
    tl.store(at, total.to(output.dtype.element_ty), mask=inside & in_range)


def plan_add_upsampled(input: Tensor, products: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, list[Launch]]:
    """The unwritten result of :func:`add_upsampled` and the launch that writes it."""
    batch, channels, height, width = input.shape
    terms = rows.shape[1]
    output = new_tensor(input.shape, input)
    # Exact products keep their operands in registers: smaller blocks.
    rule = (64, 64, 16, 4) if input.dtype.itemsize == 4 else (64, 128, 32, 4)
    how, sizes = dot_precision(input.dtype), (width, channels, terms)
    most_m, most_n, most_k, warps = launch_table.choose("psp_conv", input, how, sizes, rule)
    block_m, block_n = power_of_two(width, 16, most_m), power_of_two(channels, 16, most_n)
    stretches = -(-width // block_m)
    arguments = {
        "input": input, "products": products, "rows": rows, "columns": columns, "output": output,
        "height": height, "width": width, "stretches": stretches, "terms": terms, "channels": channels,
        **strides("input", input), **strides("output", output),
    }  # fmt: skip
    constants = {
        **dot_constants(input.dtype), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": power_of_two(terms, 16, most_k),
    }  # fmt: skip
    grid = (batch * height * stretches, -(-channels // block_n))
    return output, [Launch(_add_upsampled, grid, arguments, constants, warps)]


def add_upsampled(input: Tensor, products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Input [N, O, H, W] plus what ``products`` [N, K, O], of its dtype, give through ``rows`` [H, K] and ``columns`` [W, K].

    ``products``, ``rows`` and ``columns`` are contiguous, the last two float32.
    """
    output, launches = plan_add_upsampled(input, products, rows, columns)
    run(launches, input.device)
    return output
