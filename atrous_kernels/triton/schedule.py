"""The tables that tell a program which pixels it computes and which taps are valid there.

Tables are int32 tensors of shape [fields, entries], made once per geometry and device and kept for the life of the
process: a captured CUDA graph holds their addresses. Entries with the most work come first, so that the short ones fill
the last wave.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from heapq import heapreplace
from itertools import product
from math import gcd

import torch

from atrous_kernels.problem import Axis, InputGradAxis, forward_axis, input_grad_axis

# (n_in, n_out, kernel, stride, padding, dilation) of one axis: the arguments of forward_axis.
AxisNumbers = tuple[int, int, int, int, int, int]
Axes = tuple[AxisNumbers, AxisNumbers]


def axis_numbers(
    in_size: Sequence[int],
    out_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Axes:
    """The (height, width) axes of a convolution as hashable numbers."""
    height, width = zip(in_size, out_size, kernel, stride, padding, dilation, strict=True)
    return tuple(map(int, height)), tuple(map(int, width))  # type: ignore[return-value]


def _forward_strips(numbers: AxisNumbers) -> list[list[int]]:
    return _strips(InputGradAxis(forward_axis(*numbers), 0, 1), first_target=0, target_step=1)


def _input_strips(numbers: AxisNumbers) -> list[list[int]]:
    stride = numbers[3]
    return [
        strip
        for residue in range(min(stride, numbers[0]))
        for strip in _strips(input_grad_axis(*numbers, residue), first_target=residue, target_step=stride)
    ]


def _strips(part: InputGradAxis, first_target: int, target_step: int) -> list[list[int]]:
    """Per segment [positions, taps, first source position, first kernel tap, first target position]."""
    axis: Axis = part.axis
    strips = []
    for segment in axis.segments():
        source = segment.start * axis.src_step + axis.src_offset + segment.tap_start * axis.tap_step
        strips.append([
            segment.size,
            segment.taps,
            source if segment.taps else 0,
            part.first_tap + segment.tap_start * part.tap_stride if segment.taps else 0,
            first_target + segment.start * target_step,
        ])  # fmt: skip
    return strips


@cache
def rectangle_table(
    axes: Axes, gradient: bool, batch: int, block: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Rectangles of constant valid taps, each flattened across the batch and cut into tiles of ``block`` pixels.

    The written tensor is the output, or for ``gradient`` the input, one set of rectangles per residue of the stride.
    Returns the table and the number of tiles. Fields: first tile, rows, columns, valid taps along height and width,
    then (row, column) pairs: first source position, first kernel tap, first target position.
    """
    entries, tiles = [], 0
    for rectangle in sorted(_rectangles(axes, gradient, batch), key=_longest_first):
        entries.append([tiles, *rectangle])
        tiles += -(-batch * rectangle[0] * rectangle[1] // block)
    return _to_device(entries, 11, device), tiles


def _rectangles(axes: Axes, gradient: bool, batch: int) -> list[list[int]]:
    """The fields of :func:`rectangle_table` but the first, of every rectangle that has pixels."""
    strips = _input_strips if gradient else _forward_strips
    found = []
    for row, col in product(strips(axes[0]), strips(axes[1])):
        if row[0] * col[0] * batch > 0:
            taps = [row[1], col[1]] if row[1] * col[1] > 0 else [0, 1]
            found.append([row[0], col[0], *taps, *(x for pair in zip(row[2:], col[2:], strict=True) for x in pair)])
    return found


def _longest_first(rectangle: list[int]) -> int:
    return -rectangle[2] * rectangle[3]


@cache
def branch_table(
    branches: tuple[tuple[Axes, tuple[int, ...]], ...], batch: int, block: int, device: torch.device
) -> tuple[torch.Tensor, int, int]:
    """The rectangles of several forward convolutions of one input, the longest of all first.

    ``branches`` holds the axes of each and further fields to be repeated in all of its entries. Returns the table, the number of
    tiles, and that of the branch with most. Fields: those of :func:`rectangle_table`, the branch, the number of the entry's
    first tile among those of its branch, and the further fields.
    """
    found = [
        (rectangle, branch) for branch, (axes, _) in enumerate(branches) for rectangle in _rectangles(axes, False, batch)
    ]
    entries, tiles, of_branch = [], 0, [0] * len(branches)
    for rectangle, branch in sorted(found, key=lambda pair: _longest_first(pair[0])):
        entries.append([tiles, *rectangle, branch, of_branch[branch], *branches[branch][1]])
        count = -(-batch * rectangle[0] * rectangle[1] // block)
        tiles += count
        of_branch[branch] += count
    return _to_device(entries, 13 + len(branches[0][1]), device), tiles, max(of_branch)


def steps(axes: Axes, gradient: bool) -> dict[str, int]:
    """Per axis the positions moved in the source per target position and per tap, in the kernel per tap of the subset
    that is used, and in the target per position of a rectangle."""
    found: dict[str, int] = {}
    for axis, (*_, stride, _, dilation) in zip("hw", axes, strict=True):
        period = stride // gcd(stride, dilation)
        if gradient:
            source, tap, taps, target = 1, -(period * dilation // stride), period, stride
        else:
            source, tap, taps, target = stride, dilation, 1, 1
        found[f"source_step_{axis}"], found[f"tap_step_{axis}"] = source, tap
        found[f"kernel_step_{axis}"], found[f"target_step_{axis}"] = taps, target
    return found


@cache
def tap_table(axes: Axes, device: torch.device) -> torch.Tensor:
    """Per kernel tap the output rectangle on which it is valid: what the weight gradient of the tap sums over.

    Fields: (row, column) pairs of kernel tap, pixels, first output position, first input position.
    """
    return _to_device([[x for pair in zip(*pair, strict=True) for x in pair] for pair in _taps(axes)], 8, device)


@cache
def _taps(axes: Axes) -> list[tuple[list[int], list[int]]]:
    """(row, column) of each tap, that with most pixels first: [tap, pixels, first output position, first input position]."""
    strips = []
    for numbers in axes:
        axis = forward_axis(*numbers)
        ranges = [axis.tap_range(tap) for tap in range(axis.taps)]
        strips.append([
            [tap, last - first, first, first * axis.src_step + axis.src_offset + tap * axis.tap_step]
            if last > first else [tap, 0, 0, 0]
            for tap, (first, last) in enumerate(ranges)
        ])  # fmt: skip
    rows, cols = strips
    return sorted(product(rows, cols), key=lambda pair: -pair[0][1] * pair[1][1])


@cache
def split_count(axes: Axes, batch: int, block: int, programs: int, resident: int, adding: int) -> int:
    """Into how many parts the sums over a tap's pixels are cut, so that the programs of all taps fill a GPU evenly.

    A step is ``block`` pixels; each part of a tap has ``programs`` programs. Dealt out, longest first, to 132 multiprocessors
    that take ``resident`` at a time, they keep the busiest one for some number of steps, to which a part, where there are
    several, adds ``adding`` per program. Of 1, 2, 3, 4, 6, 8, 12 ... parts the fewest within 3 % of the best are taken. A fixed
    rule, blind to the chip: with the same blocks every bit of the result is the same everywhere.
    """
    steps = [-(-batch * row[1] * col[1] // block) for row, col in _taps(axes)]
    at_once, waves, least_steps, most_parts = 132 * resident, 8, 8, 64  # parts are added one after the other
    by_waves, by_steps = waves * at_once // max(programs * len(steps), 1), max(steps, default=0) // least_steps
    most = max(1, min(by_waves, by_steps, most_parts))
    candidates = sorted(parts for power in range(most.bit_length()) for parts in (2**power, 3 * 2**power) if parts <= most)
    costs = {}
    for parts in candidates:
        busy = [0] * at_once
        for length in steps:
            for _ in range(programs * parts):
                heapreplace(busy, busy[0] + -(-length // parts) + (adding if parts > 1 else 0))
        costs[parts] = max(busy)
    return next(parts for parts, cost in costs.items() if cost <= 1.03 * min(costs.values()))


def _to_device(entries: list[list[int]], fields: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.int32).reshape(-1, fields).t().contiguous().to(device)
