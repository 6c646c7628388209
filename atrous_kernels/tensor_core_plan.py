"""The launches of the CUDA tensor-core convolutions, for the model of :mod:`atrous_kernels.gpu_model`.

The twin of ``csrc/cuda/plan.h`` and of the choice of tiles in ``csrc/cuda/conv2d_tensor_core.h``; a test holds every block's
pixels and taps against the C++.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from atrous_kernels.gpu_model import Program, Work
from atrous_kernels.problem import Axis, ConvProblem, Segment, forward_axis, input_grad_axis

OPS = ("conv2d", "conv2d_input", "conv2d_weight")
_MAX_SEGMENTS = 16  # of one axis in one launch
_ENOUGH_TILES = 128  # wide ones
_WANTED_BLOCKS = 5 * 132  # of a weight gradient
_SLICE_BYTES = 64  # of the summed dimension in one stage


@dataclass(frozen=True)
class Block:
    """One block of a launch: its rows and columns that exist, and what it sums over."""

    rows: int
    columns: int
    taps: int  # valid ones, each over the channels read; of a weight gradient 1
    depth: int  # summed per tap


def works(op: str, problem: ConvProblem) -> list[Work]:
    """What ``op`` (conv2d, conv2d_input or conv2d_weight) launches. float32 is multiplied in TF32.

    Raises ValueError where there is no launch for such a problem.
    """
    if op not in OPS or problem.groups != 1 or not problem.channels_last or problem.dtype.itemsize > 4:
        raise ValueError(
            f"tensor_core: expected one of {', '.join(OPS)} on channels-last tensors of 16 or 32 bits in one group, "
            f"but got {op} of {problem}"
        )
    size, slice_depth = problem.dtype.itemsize, _SLICE_BYTES // problem.dtype.itemsize
    read = {"conv2d": (0, 1), "conv2d_input": (1, 2), "conv2d_weight": (0, 2)}[op]
    read_bytes = sum(prod(problem.sizes[index]) for index in read) * size
    weight_gradient = op == "conv2d_weight"
    written_index = {"conv2d": 2, "conv2d_input": 0, "conv2d_weight": 1}[op]
    written = prod(problem.sizes[written_index])
    parts = weight_tiles(problem)[1] * written * 4  # bytes
    found = []
    launches = list(planned(op, problem))
    for side, blocks in launches:
        programs = []
        for block in blocks:
            slices = block.taps * -(-block.depth // slice_depth)
            loaded = (block.rows + block.columns) * block.taps * block.depth * size
            stored = block.rows * block.columns * (4 if weight_gradient else size)
            valid = block.rows * block.columns * block.taps * block.depth
            programs.append(Program(valid, side * side * slices * slice_depth, loaded, stored))
        moved = (read_bytes + (parts if weight_gradient else written * size)) // len(launches)
        name = "correlate_weight_tiles" if weight_gradient else "correlate_tiles"
        found.append(Work(f"tensor_core.{name}", (side, side, slice_depth), programs, moved, problem.dtype, "tf32"))
    if weight_gradient and written:
        found.append(Work("tensor_core.sum_splits", (), [], parts + written * size, problem.dtype))
    return found


def planned(op: str, problem: ConvProblem) -> Iterator[tuple[int, list[Block]]]:
    """The side of the tiles and the blocks in order, of each launch of ``op``."""
    return _weight_launches(problem) if op == "conv2d_weight" else _correlations(op, problem)


def _correlations(op: str, problem: ConvProblem) -> Iterator[tuple[int, list[Block]]]:
    read, written = problem.in_channels, problem.out_channels
    if op == "conv2d_input":
        read, written = written, read
    if problem.batch * written == 0:
        return
    for rows, cols in _axes(op, problem):
        for heights, widths in product(_runs(_most_taps_first(rows)), _runs(_most_taps_first(cols))):
            rectangles = [(problem.batch * h.size * w.size, h.taps * w.taps) for h, w in product(heights, widths)]
            side = 128 if _wants_wide(sum(-(-pixels // 128) for pixels, _ in rectangles), written) else 64
            blocks = [
                Block(tile, columns, taps, read)
                for pixels, taps in rectangles
                for tile in _cuts(pixels, side)
                for columns in _cuts(written, side)
            ]
            if blocks:
                yield side, blocks


def _axes(op: str, problem: ConvProblem) -> Iterator[tuple[Axis, Axis]]:
    """The (height, width) axes of each launch: of the input gradient one pair per residue of the stride."""
    geometry = list(zip(problem.kernel, problem.stride, problem.padding, problem.dilation, strict=True))
    sizes = list(zip(problem.in_size, problem.out_size, strict=True))
    if op == "conv2d":
        yield forward_axis(*sizes[0], *geometry[0]), forward_axis(*sizes[1], *geometry[1])
        return
    residues = [range(min(stride, size)) for stride, size in zip(problem.stride, problem.in_size, strict=True)]
    for pair in product(*residues):
        rows, cols = (input_grad_axis(*sizes[i], *geometry[i], pair[i]).axis for i in (0, 1))
        yield rows, cols


def weight_tiles(problem: ConvProblem) -> tuple[int, int]:
    """The side of a weight gradient's tiles, and the parts that its pixels are cut into."""
    side = 128 if min(problem.out_channels, problem.in_channels) > 64 else 64
    blocks = -(-problem.out_channels // side) * -(-problem.in_channels // side) * prod(problem.kernel)
    by_blocks = -(-_WANTED_BLOCKS // max(blocks, 1))
    return side, min(max(min(by_blocks, -(-problem.batch * prod(problem.out_size) // 512)), 1), 1024)


def _weight_launches(problem: ConvProblem) -> Iterator[tuple[int, list[Block]]]:
    side, splits = weight_tiles(problem)
    slice_depth = _SLICE_BYTES // problem.dtype.itemsize
    heights, widths = (
        _runs(sorted((last - first for first, last in map(axis.tap_range, range(axis.taps))), reverse=True))
        for axis in problem.axes()
    )
    for rows, cols in product(heights, widths):
        blocks = []
        for height, width, split in product(rows, cols, range(splits)):
            pixels = problem.batch * height * width
            run = -(-pixels // (splits * slice_depth)) * slice_depth
            depth = max(min(run, pixels - split * run), 0)
            tiles = product(_cuts(problem.in_channels, side), _cuts(problem.out_channels, side))
            blocks += [Block(out, in_, 1, depth) for in_, out in tiles]
        if blocks:
            yield side, blocks


def _wants_wide(tiles_down: int, columns: int) -> bool:
    return columns > 64 and tiles_down * -(-columns // 128) >= _ENOUGH_TILES


def _most_taps_first(axis: Axis) -> list[Segment]:
    return sorted(axis.segments(), key=lambda segment: -segment.taps)


def _runs(pieces: Sequence) -> list[Sequence]:
    return [pieces[first : first + _MAX_SEGMENTS] for first in range(0, len(pieces), _MAX_SEGMENTS)]


def _cuts(length: int, block: int) -> list[int]:
    """Lengths of the blocks that cover ``length``."""
    return [min(block, length - start) for start in range(0, length, block)]
