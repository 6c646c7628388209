"""A convolution as numbers: sizes, rate, dtype and layout -> valid taps, FLOPs, bytes and roofline time.

Everything here is plain integer arithmetic, shared by the dispatcher, the Triton launchers and the benchmarks. The C++
twin is ``csrc/include/problem.h``; ``tests/test_problem.py`` holds the two against each other and against brute force.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import gcd, prod, sqrt

import torch

Pair = tuple[int, int]


@dataclass(frozen=True)
class Axis:
    """One spatial axis seen from the tensor that is written.

    Position ``o`` reads source position ``o * src_step + src_offset + t * tap_step`` for taps ``t`` in ``[0, taps)``.
    """

    n_out: int
    n_src: int
    taps: int
    src_step: int
    src_offset: int
    tap_step: int

    def tap_range(self, tap: int) -> Pair:
        """Positions ``[first, last)`` at which ``tap`` reads inside the source."""
        offset = self.src_offset + tap * self.tap_step
        first = min(max(-(offset // self.src_step), 0), self.n_out)
        last = min(max(-((offset - self.n_src) // self.src_step), first), self.n_out)
        return first, last

    def segments(self) -> list[Segment]:
        """Cuts ``[0, n_out)`` where the set of valid taps changes (at most three pieces for three taps)."""
        ranges = [self.tap_range(tap) for tap in range(self.taps)]
        cuts = sorted({0, self.n_out, *(cut for pair in ranges for cut in pair)})
        pieces: list[Segment] = []
        for start, stop in pairwise(cuts):
            valid = [tap for tap, (first, last) in enumerate(ranges) if first <= start < last]
            taps = (valid[0], valid[-1] + 1) if valid else (0, 0)
            if pieces and (pieces[-1].tap_start, pieces[-1].tap_stop) == taps:
                pieces[-1] = replace(pieces[-1], stop=stop)
            else:
                pieces.append(Segment(start, stop, *taps))
        return pieces


@dataclass(frozen=True)
class Segment:
    """Positions ``[start, stop)`` of an axis whose valid taps are exactly ``[tap_start, tap_stop)``."""

    start: int
    stop: int
    tap_start: int
    tap_stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def taps(self) -> int:
        return self.tap_stop - self.tap_start


@dataclass(frozen=True)
class InputGradAxis:
    """Input positions ``stride * q + residue``: kernel tap ``first_tap + j * tap_stride`` is tap ``j`` of ``axis``."""

    axis: Axis
    first_tap: int
    tap_stride: int


def out_extent(n_in: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Number of output positions along one axis (0 or less where the kernel does not fit)."""
    return (n_in + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def forward_axis(n_in: int, n_out: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    """The axis of the forward pass."""
    return Axis(n_out, n_in, kernel, stride, -padding, dilation)


def input_grad_axis(
    n_in: int, n_out: int, kernel: int, stride: int, padding: int, dilation: int, residue: int
) -> InputGradAxis:
    """The input gradient at input positions congruent to ``residue`` modulo the stride: a stride-1 correlation.

    Input position ``i`` meets tap ``t`` at output position ``(i + padding - t * dilation) / stride`` where that divides.
    """
    positions = len(range(residue, n_in, stride))
    period = stride // gcd(stride, dilation)
    first = next((t for t in range(min(period, kernel)) if (residue + padding - t * dilation) % stride == 0), kernel)
    taps = len(range(first, kernel, period))
    offset = (residue + padding - first * dilation) // stride
    return InputGradAxis(Axis(positions, n_out, taps, 1, offset, -(period * dilation // stride)), first, period)


# What a core could compute while it moves a byte; part of the traffic stays in caches. Only ratios of costs are used.
FLOPS_PER_BYTE = 8


@dataclass(frozen=True)
class WinogradAxis:
    """How Winograd's algorithm cuts an axis of a 3x3 convolution of stride 1 (docs/kernels.md)."""

    points: int  # of a tile
    tiles: int
    products: int  # over all tiles, the points that each of them needs


def short_phases(axis: Axis) -> bool:
    """Whether every phase has at most two pixels, whose taps beyond each other fall outside the source."""
    rate, n_out = axis.tap_step, axis.n_out
    none_before = axis.src_offset + min(rate, n_out) <= 0
    none_behind = max(n_out - rate, 0) + axis.src_offset + 2 * rate >= axis.n_src
    return n_out <= 2 * rate and none_before and none_behind


@lru_cache(maxsize=4096)
def winograd_axis(axis: Axis, tile: int) -> WinogradAxis:
    """The axis in tiles of ``tile`` written pixels, or of whole phases where these are short."""
    written, points, shared = (2, 3, 1) if short_phases(axis) else (tile, tile + 2, tile + 1)
    tiles = products = 0
    length, longer = divmod(axis.n_out, axis.tap_step)
    for count, pixels in ((axis.tap_step - longer, length), (longer, length + 1)):
        each = -(-pixels // written)
        tiles += count * each
        products += count * (each * points - (points - shared if pixels % written else 0))
    return WinogradAxis(points, tiles, products)


@lru_cache(maxsize=4096)
def winograd_tile(problem: ConvProblem) -> int:
    """Written pixels along one side of the cheapest tile of Winograd's algorithm: 2, 3 or 4."""
    return min((4, 3, 2), key=problem.winograd_cost)


@dataclass(frozen=True)
class ConvProblem:
    """A 2-D convolution. Sizes are (height, width) pairs; ``weight`` is [out_channels, in_channels / groups, *kernel]."""

    batch: int
    in_channels: int
    out_channels: int
    in_size: Pair
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    channels_last: bool = False
    threads: int = 1

    @property
    def out_size(self) -> Pair:
        height, width = (out_extent(*axis) for axis in self._axes_args())
        return height, width

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of input, weight and output."""
        return (
            (self.batch, self.in_channels, *self.in_size),
            (self.out_channels, self.in_channels // self.groups, *self.kernel),
            (self.batch, self.out_channels, *self.out_size),
        )

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    def _axes_args(self) -> list[tuple[int, int, int, int, int]]:
        return list(zip(self.in_size, self.kernel, self.stride, self.padding, self.dilation, strict=True))

    def axes(self) -> tuple[Axis, Axis]:
        """The (height, width) axes of the forward pass."""
        (height, *rows), (width, *cols) = self._axes_args()
        return forward_axis(height, self.out_size[0], *rows), forward_axis(width, self.out_size[1], *cols)

    def rectangles(self) -> list[tuple[Segment, Segment]]:
        """The output cut into rectangles of constant valid taps: at most nine for a 3x3 kernel."""
        rows, cols = (axis.segments() for axis in self.axes())
        return [(row, col) for row in rows for col in cols]

    def _flops_per_tap(self) -> int:
        return 2 * self.batch * self.out_channels * (self.in_channels // self.groups)

    @property
    def dense_flops(self) -> int:
        """Floating-point operations when padding zeros are multiplied too."""
        height, width = self.out_size
        return self._flops_per_tap() * height * width * self.kernel[0] * self.kernel[1]

    @property
    def valid_flops(self) -> int:
        """Floating-point operations on real input alone; the two gradients need the same number each."""
        return self._flops_per_tap() * sum(r.size * r.taps * c.size * c.taps for r, c in self.rectangles())

    @property
    def valid_share(self) -> float:
        """Share of the dense multiplications that read real input."""
        return self.valid_flops / max(self.dense_flops, 1)

    @property
    def bytes(self) -> int:
        """Bytes moved when input and weight are read once and the output is written once."""
        height, width = self.out_size
        inputs = self.batch * self.in_channels * self.in_size[0] * self.in_size[1]
        outputs = self.batch * self.out_channels * height * width
        weights = self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]
        return (inputs + outputs + weights) * self.dtype.itemsize

    def direct_cost(self) -> float:
        """Work of a direct kernel in flops, on valid taps, with the packing of its weights."""
        weights = self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]
        return self.valid_flops + FLOPS_PER_BYTE * 2 * weights * self.dtype.itemsize

    def winograd_axes(self, tile: int, input_gradient: bool = False) -> tuple[WinogradAxis, WinogradAxis]:
        """The (height, width) axes as Winograd's algorithm cuts them."""
        axes: Iterable[Axis] = self.axes()
        if input_gradient:  # the taps from last to first
            axes = [replace(a, n_out=a.n_src, n_src=a.n_out, src_offset=-a.src_offset - 2 * a.tap_step) for a in axes]
        rows, columns = (winograd_axis(axis, tile) for axis in axes)
        return rows, columns

    def winograd_cost(self, tile: int) -> float:
        """Work of Winograd's algorithm in flops, with the transforms of weights, source and sums as memory traffic."""
        rows, columns = self.winograd_axes(tile)
        points = rows.points * columns.points
        weights = self.out_channels * (self.in_channels // self.groups) * (9 + 2 * points)
        images = points * self.batch * rows.tiles * columns.tiles * (self.in_channels + self.out_channels)
        return self._flops_per_tap() * rows.products * columns.products + FLOPS_PER_BYTE * 4 * (weights + images)

    def roofline_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The floor: the larger of valid arithmetic and compulsory traffic."""
        return max(self.valid_flops / flops_per_second, self.bytes / bytes_per_second)

    def cost(self) -> str:
        """One line for :func:`atrous_kernels.explain`."""
        return f"{self.valid_flops / 1e9:.3g} GFLOP on valid taps ({self.valid_share:.0%} of dense)"

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        pairs = " ".join(
            f"{name} {a}" if a == b else f"{name} {a}x{b}"
            for name, (a, b) in (("stride", self.stride), ("padding", self.padding), ("rate", self.dilation))
        )
        return (
            f"{self.batch}x{self.in_channels}->{self.out_channels} {self.in_size[0]}x{self.in_size[1]} "
            f"kernel {self.kernel[0]}x{self.kernel[1]} {pairs} groups {self.groups} "
            f"{str(self.dtype).removeprefix('torch.')} {layout} on {self.device_type}"
        )


@dataclass(frozen=True)
class UpsampleProblem:
    """Logits ``[batch, classes, *in_size]``, of which something is wanted at ``out_size``."""

    batch: int
    classes: int
    in_size: Pair
    out_size: Pair
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"

    @property
    def upsampled_bytes(self) -> int:
        """Size of the upsampled logits that the fused ops never write, in the type of the arithmetic."""
        width = 8 if self.dtype is torch.float64 else 4
        return self.batch * self.classes * self.out_size[0] * self.out_size[1] * width

    def cost(self) -> str:
        return f"{self.upsampled_bytes / 1e6:.3g} MB of upsampled logits, which the fused kernels never write"

    def __str__(self) -> str:
        return (
            f"{self.batch}x{self.classes} {self.in_size[0]}x{self.in_size[1]} to {self.out_size[0]}x{self.out_size[1]} "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device_type}"
        )


@dataclass(frozen=True)
class TransformProblem:
    """A domain transform of ``[N, C, H, W]``."""

    size: tuple[int, int, int, int]
    iterations: int
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"

    def cost(self) -> str:
        values = prod(self.size)
        moved = 4 * self.iterations * values * self.dtype.itemsize  # two passes an iteration, each reads and writes all
        return f"{12 * self.iterations * values / 1e6:.1f} MFLOP, {moved / 1e6:.1f} MB of memory traffic"

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.size))
        return f"{sizes}, {self.iterations} iterations, {str(self.dtype).removeprefix('torch.')} on {self.device_type}"


def transform_passes(sigma_s: float, sigma_r: float, iterations: int) -> Iterator[tuple[int, float, float]]:
    """Per pass its axis (0 along rows, 1 along columns), and the rate and slope of its weights ``exp(-rate - slope * edge)``.

    Each iteration is half as wide as the one before; together they are ``sigma_s`` wide.
    """
    largest = 1e30  # the weight is 0, and it is a number in float32
    for k in range(iterations):
        rate = sqrt(2 / 3 * (1 - 4.0**-iterations)) * 2.0 ** (k + 1) / sigma_s
        for axis in (0, 1):
            yield axis, min(rate, largest), min(rate * sigma_s / sigma_r, largest)
