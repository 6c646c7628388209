"""Launch plans judged without a GPU: ``python -m atrous_kernels plan``. A model, never a measurement.

The launches are those that the Triton launchers make (:mod:`atrous_kernels.triton.conv2d` and its neighbours), on tensors whose
memory nobody touches; the pixels and taps of a program come from the very tables that the kernel reads. Those of the CUDA kernels
for tensor cores come from :mod:`atrous_kernels.tensor_core_plan`. What a GPU makes of them: :mod:`atrous_kernels.gpu_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import tensor_core_plan
from atrous_kernels.gpu_model import Program, Simulation, Work, estimate
from atrous_kernels.gpus import GPU
from atrous_kernels.problem import ConvProblem
from atrous_kernels.triton import aspp, conv2d, depthwise_conv2d
from atrous_kernels.triton.epilogue import Epilogue
from atrous_kernels.triton.runtime import Kernel, Launch, dot_precision

OPS = tensor_core_plan.OPS


# What every program does, in launch order ---------------------------------------------------------------------------------


def _tiles(launch: Launch, block: int) -> Iterable[tuple[int, int]]:
    """(pixels, valid taps) of every tile of a rectangle table."""
    _, rows, cols, taps_h, taps_w, *_ = launch.arguments["table"].tolist()
    batch = launch.arguments["batch"]
    for height, width, taps in zip(rows, cols, map(mul, taps_h, taps_w), strict=True):
        for pixels in _cuts(batch * height * width, block):
            yield pixels, taps


def _cuts(length: int, block: int) -> list[int]:
    """Lengths of the blocks that cover ``length``."""
    return [min(block, length - start) for start in range(0, length, block)]


def _correlate(launch: Launch) -> Iterable[Program]:
    given, (m, n, k) = launch.arguments, _blocks(launch)
    read, size = given["channels_read"], given["source"].itemsize
    columns = _cuts(given["channels_written"], n)
    for _ in range(launch.grid[1]):
        for pixels, taps in _tiles(launch, m):
            for width in columns:
                depth, executed = taps * read, taps * -(-read // k) * k
                yield Program(pixels * width * depth, m * n * executed, (m + width) * depth * size, pixels * width * size)


def _branches(launch: Launch) -> Iterable[Program]:
    given, (m, n, k) = launch.arguments, _blocks(launch)
    read, size = given["channels_read"], given["source"].itemsize
    _, rows, cols, taps_h, taps_w, *rest = given["table"].tolist()
    widths = rest[11]  # channels of the entry's branch
    for height, width, taps, written in zip(rows, cols, map(mul, taps_h, taps_w), widths, strict=True):
        depth, executed = taps * read, taps * -(-read // k) * k
        for pixels in _cuts(given["batch"] * height * width, m):
            for first in range(0, given["column_blocks"] * n, n):
                columns = max(min(n, written - first), 0)
                yield Program(pixels * columns * depth, m * n * executed, (m + columns) * depth * size, pixels * columns * size)


def _correlate_weight(launch: Launch) -> Iterable[Program]:
    given, (m, n, k) = launch.arguments, _blocks(launch)
    size, target = given["source"].itemsize, given["target"].itemsize
    _, _, rows, cols, *_ = given["table"].tolist()
    outs, ins = _cuts(given["out_channels"], m), _cuts(given["in_channels"], n)
    splits = given["splits"]
    for _ in range(launch.grid[1]):
        for height, width in zip(rows, cols, strict=True):
            for split in range(splits):
                pixels, steps = _split(given["batch"] * height * width, k, split, splits)
                for out in outs:
                    for in_ in ins:
                        yield Program(out * in_ * pixels, m * n * k * steps, (out + in_) * pixels * size, out * in_ * target)


def _correlate_depthwise(launch: Launch) -> Iterable[Program]:
    given, (p, c) = launch.arguments, _blocks(launch)
    size, channels = given["source"].itemsize, _cuts(given["channels"], c)
    for pixels, taps in _tiles(launch, p):
        for width in channels:
            depth = taps * given["summed"]
            yield Program(pixels * width * depth, p * c * depth, (p + 1) * width * depth * size, pixels * width * size)


def _correlate_depthwise_weight(launch: Launch) -> Iterable[Program]:
    given, (p, c) = launch.arguments, _blocks(launch)
    size, target = given["source"].itemsize, given["target"].itemsize
    _, _, rows, cols, *_ = given["table"].tolist()
    splits, channels = given["splits"], _cuts(given["channels"], c)
    for height, width in zip(rows, cols, strict=True):
        for split in range(splits):
            pixels, steps = _split(given["batch"] * height * width, p, split, splits)
            for count in channels:
                yield Program(pixels * count, p * c * steps, 2 * pixels * count * size, count * target)


def _split(pixels: int, block: int, split: int, splits: int) -> tuple[int, int]:
    """(pixels, steps) of one split of a sum over pixels."""
    steps = -(-pixels // block)
    each = -(-steps // splits)
    first, last = min(split * each, steps), min((split + 1) * each, steps)
    return min(last * block, pixels) - min(first * block, pixels), last - first


def _blocks(launch: Launch) -> tuple[int, ...]:
    return tuple(value for name, value in launch.constants.items() if name.startswith("BLOCK"))


_READERS: dict[Kernel, Callable[[Launch], Iterable[Program]]] = {
    conv2d._correlate: _correlate,
    conv2d._correlate_weight: _correlate_weight,
    aspp._branches: _branches,
    depthwise_conv2d._correlate: _correlate_depthwise,
    depthwise_conv2d._correlate_weight: _correlate_depthwise_weight,
}


def programs(launch: Launch) -> list[Program]:
    """The programs of a launch, in launch order; none where only the bytes of its kernel are modelled."""
    return list(_READERS[launch.kernel](launch)) if launch.kernel in _READERS else []


def work(launch: Launch) -> Work:
    """A launch of the Triton backend as the model takes it."""
    tensors = [value for name, value in launch.arguments.items() if isinstance(value, Tensor) and name != "table"]
    return Work(
        kernel=f"{launch.kernel.function.__module__.rpartition('.')[2]}.{launch.kernel.name}",
        blocks=_blocks(launch),
        programs=programs(launch),
        memory_bytes=sum(tensor.numel() * tensor.itemsize for tensor in tensors),
        dtype=next((t.dtype for name, t in launch.arguments.items() if name == "source"), torch.float32),
        precision=launch.constants.get("PRECISION"),
    )


def simulate(launch: Launch | Work, gpu: GPU) -> Simulation:
    """What the model says of ``launch`` on ``gpu``."""
    return estimate(launch if isinstance(launch, Work) else work(launch), gpu)


# Plans of an op ----------------------------------------------------------------------------------------------------------------


def arguments(op: str, problem: ConvProblem, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Any, ...]:
    """What ``op`` takes, in the Triton files and in the reference: of input, weight and output gradient those that it reads."""
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    read = {"conv2d": (x, weight, None), "conv2d_input": (x.shape, weight, grad), "conv2d_weight": (x, weight.shape, grad)}
    if op not in read:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(OPS)}")
    return *read[op], *geometry


def plan(op: str, *operands: Any) -> tuple[Tensor, list[Launch]]:
    """The unwritten result of ``op`` on the operands of :func:`arguments`, and what the Triton backend launches to write it."""
    planned: tuple[Tensor, list[Launch]] = getattr(conv2d, f"plan_{op}")(*arguments(op, *operands))
    return planned


def launches(op: str, problem: ConvProblem) -> list[Launch]:
    """What the Triton backend launches for ``op``, on CPU tensors that nobody touches: their pages never become memory."""
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    tensors = [torch.empty(size, dtype=problem.dtype, memory_format=layout) for size in problem.sizes]
    return plan(op, problem, *tensors)[1]


def pyramid(base: ConvProblem, rates: Sequence[int]) -> list[ConvProblem]:
    """The branches of an atrous spatial pyramid: a 1x1 convolution, and ``base`` at each rate; sizes stay."""
    branches = [replace(base, kernel=(1, 1), padding=(0, 0), dilation=(1, 1))]
    for rate in rates:
        height, width = (rate * (k // 2) for k in base.kernel)
        branches.append(replace(base, padding=(height, width), dilation=(rate, rate)))
    return branches


def branch_launches(branches: Sequence[ConvProblem]) -> list[Launch]:
    """What the Triton backend launches for all branches of a pyramid together; otherwise as :func:`launches`."""
    layout = torch.channels_last if branches[0].channels_last else torch.contiguous_format
    sizes = [branches[0].sizes[0], *(branch.sizes[1] for branch in branches)]
    x, *weights = (torch.empty(size, dtype=branches[0].dtype, memory_format=layout) for size in sizes)
    return aspp.plan_aspp_branches(x, weights, [branch.dilation for branch in branches], Epilogue())[1]


def floor(gpu: GPU, problem: ConvProblem, *others: ConvProblem) -> float:
    """Seconds below which ``gpu`` computes no op of the problem: valid arithmetic or compulsory traffic.

    With ``others``, all of them on one input, which is read once.
    """
    flops = gpu.scalar_flops if problem.is_depthwise else gpu.flops(problem.dtype, dot_precision(problem.dtype))
    read = prod(problem.sizes[0]) * problem.dtype.itemsize
    moved = problem.bytes + sum(other.bytes - read for other in others)
    return max(sum(one.valid_flops for one in (problem, *others)) / flops, moved / gpu.bytes_per_second)


def describe(op: str, problem: ConvProblem, gpu: GPU, rates: Sequence[int] = (), backend: str = "triton") -> str:
    """The model's page on one op: every launch, and the whole beside the floor. ``aspp`` has rates.

    ``backend`` is "triton" or "tensor_core". Raises ValueError where that has no launch for such a problem.
    """
    branches = pyramid(problem, rates) if op == "aspp" else [problem]
    planned: Sequence[Launch | Work]
    if backend == "tensor_core":
        planned = tensor_core_plan.works(op, problem)
    else:
        planned = branch_launches(branches) if op == "aspp" else launches(op, problem)
    found = [simulate(launch, gpu) for launch in planned]
    lines = [
        *(f"{op} {branch}" for branch in branches),
        f"modelled for {gpu.name} ({gpu.multiprocessors} multiprocessors, {gpu.matrix_flops / 1e12:.0f} TFLOP/s bf16, "
        f"{gpu.bytes_per_second / 1e12:.2f} TB/s); nothing was measured",
    ]
    for one in found:
        lines.append(one.kernel + (f", blocks {'x'.join(map(str, one.blocks))}" if one.blocks else ""))
        if one.programs:
            least, most = one.per_multiprocessor[-1], one.per_multiprocessor[0]
            lines += [
                f"  {one.programs} programs, {one.waves:.2f} waves; {one.valid_flops / 1e9:.4g} GFLOP on valid taps, "
                f"{one.valid_flops / max(one.executed_flops, 1):.1%} of what whole blocks execute",
                f"  a multiprocessor works {least * 1e6:.1f} to {most * 1e6:.1f} us, {one.mean * 1e6:.1f} on average: balance "
                f"{one.balance:.1%}; longest programs first: {one.longest_first * 1e6:.1f} us",
                f"  L2 traffic {one.l2_bytes / 1e9:.3g} GB",
            ]
        lines.append(f"  memory traffic {one.memory_bytes / 1e6:.4g} MB, {one.memory_seconds * 1e6:.1f} us")
    total, least = sum(one.seconds for one in found), floor(gpu, *branches)
    lines.append(f"in all {total * 1e6:.1f} us, floor {least * 1e6:.1f} us ({least / total:.0%})" if total else "nothing to do")
    return "\n".join(lines)
