"""What a convolution does to its sums before it writes them, and the statistics that it takes of them on the way.

``y = clamp((sum - mean) * gain / sqrt(var + eps) + bias + residual, low, high)``, every part of which may be absent: an absent
part is not in the compiled kernel.

Statistics are a count, a mean and a sum of squared distances from that mean per tile and channel, united in a fixed order.
Nothing is squared before a mean is taken off, so no digits are lost where a channel's mean exceeds its deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atrous_kernels.triton.runtime import Launch, kernel, power_of_two, strides

if TYPE_CHECKING:
    import triton.language as tl


@kernel()
def hold(values, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The values between the bounds; a bound of None is none, and NaN stays NaN."""
    if LOW is not None:
        values = tl.where(values < LOW, LOW, values)
    if HIGH is not None:
        values = tl.where(values > HIGH, HIGH, values)
    return values


@kernel()
def finish(
    total, inside, image, row, col, channel, exists,
    bias, mean, var, gain, residual, residual_n, residual_c, residual_h, residual_w,
    EPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """The sums ``total`` [pixels, channels] as they are written."""
    if mean is not None:
        scale = tl.rsqrt(tl.load(var + channel, mask=exists, other=1.0).to(tl.float32) + EPS)
        if gain is not None:
            scale *= tl.load(gain + channel, mask=exists, other=0.0).to(tl.float32)
        shift = -scale * tl.load(mean + channel, mask=exists, other=0.0).to(tl.float32)
        if bias is not None:
            shift += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
        # Two vectors, not four, for a thread may hold one value of each for every value of the tile.
        total = total * scale[None, :] + shift[None, :]
    elif bias is not None:
        total += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        pixels = residual + image * residual_n + row * residual_h + col * residual_w
        mask = inside[:, None] & exists[None, :]
        total += tl.load(pixels[:, None] + (channel * residual_c)[None, :], mask=mask, other=0.0).to(tl.float32)
    return hold(total, LOW, HIGH)


@kernel()
def store_moments(parts, part, channels, channel, exists, values, inside):
    """Count, mean and moment of a tile's ``values`` [pixels, channels] into ``parts`` [parts, 3, channels]."""
    values = values.to(tl.float32)
    count = tl.sum(inside.to(tl.float32), axis=0)
    mean = tl.sum(tl.where(inside[:, None], values, 0.0), axis=0) / count
    distance = tl.where(inside[:, None], values - mean[None, :], 0.0)
    # What rounding left of the mean: without it the moment would err by its square.
    rest = tl.sum(distance, axis=0) / count
    at = parts + tl.cast(part, tl.int64) * 3 * channels + channel
    tl.store(at, tl.zeros_like(mean) + count, mask=exists)
    tl.store(at + channels, mean + rest, mask=exists)
    tl.store(at + 2 * channels, tl.sum(distance * distance, axis=0) - count * rest * rest, mask=exists)


@kernel(do_not_specialize=["rows", "channels"])
def _merge_moments(parts, mean, moment, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and moment of the whole: the parts' means about that of the first part, then the moments about the mean."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    index = tl.arange(0, BLOCK_R)
    # A condition on a scalar alone would be no mask: the interpreter of Triton 3.9 refuses what it becomes as a block.
    pivot = tl.load(parts + channels + channel, mask=channel < tl.where(rows > 0, channels, 0), other=0.0)
    counts = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    shares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + index
        mask = (row < rows)[:, None] & exists[None, :]
        at = parts + (row.to(tl.int64) * 3 * channels)[:, None] + channel[None, :]
        count = tl.load(at, mask=mask, other=0.0)
        counts += count
        shares += count * (tl.load(at + channels, mask=mask, other=0.0) - pivot[None, :])
    total = tl.maximum(tl.sum(counts, axis=0), 1.0)
    whole = pivot + tl.sum(shares, axis=0) / total
    moments = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + index
        mask = (row < rows)[:, None] & exists[None, :]
        at = parts + (row.to(tl.int64) * 3 * channels)[:, None] + channel[None, :]
        distance = tl.load(at + channels, mask=mask, other=0.0) - whole[None, :]
        moments += tl.load(at + 2 * channels, mask=mask, other=0.0)
        moments += tl.load(at, mask=mask, other=0.0) * distance * distance
    tl.store(mean + channel, whole, mask=exists)
    tl.store(moment + channel, tl.sum(moments, axis=0), mask=exists)


def merge_moments(parts: Tensor, mean: Tensor, moment: Tensor) -> Launch:
    """Unites float32 ``parts`` [parts, 3, C] (count, mean, moment) into ``mean`` and ``moment`` [C]."""
    rows, _, channels = parts.shape
    arguments = {"parts": parts, "mean": mean, "moment": moment, "rows": rows, "channels": channels}
    return Launch(_merge_moments, (-(-channels // 16),), arguments, {"BLOCK_R": power_of_two(rows, 1, 64), "BLOCK_C": 16})


def new_statistics(channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten float32 mean and moment, of storage of their own: an op gives both back."""
    mean = like.new_empty(channels, dtype=torch.float32)
    return mean, torch.empty_like(mean)


@dataclass(frozen=True)
class Epilogue:
    """What a convolution does to its sums. Vectors are per output channel and contiguous, of any floating dtype.

    ``mean`` and ``var`` come together. ``residual`` has the target's sizes and any strides. ``statistics`` are two float32
    vectors to be written: the mean of what is written to the target, and the sum of squared distances from it.
    """

    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    gain: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    low: float | None = None
    high: float | None = None
    statistics: tuple[Tensor, Tensor] | None = None

    @property
    def is_heavy(self) -> bool:
        """Whether it needs registers beside those of the sums."""
        return self.mean is not None or self.residual is not None

    def arguments(self) -> dict[str, Tensor | int | None]:
        """Arguments of a kernel that calls :func:`finish`."""
        by_name = {f"residual_{axis}": None for axis in "nchw"} if self.residual is None else strides("residual", self.residual)
        vectors = {"bias": self.bias, "mean": self.mean, "var": self.var, "gain": self.gain}
        return {**vectors, "residual": self.residual, **by_name}

    def constants(self) -> dict[str, float | None]:
        """Compile-time arguments of such a kernel."""
        return {"EPS": self.eps, "LOW": self.low, "HIGH": self.high}

    def parts(self, tiles: int, channels: int) -> tuple[Tensor | None, list[Launch]]:
        """Where the statistics of ``tiles`` tiles go, and the launch that unites them."""
        if self.statistics is None:
            return None, []
        parts = self.statistics[0].new_empty((tiles, 3, channels))
        return parts, [merge_moments(parts, *self.statistics)]


def bounds(low: float, high: float) -> tuple[float | None, float | None]:
    """The bounds of an activation, None where there is none."""
    return None if low == -torch.inf else low, None if high == torch.inf else high
