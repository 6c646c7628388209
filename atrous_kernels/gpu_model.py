"""How long a GPU takes for a launch whose programs are known: a model, never a measurement.

Programs are given in launch order to whichever multiprocessor is free first, as the hardware does, one at a time on each. A
program takes as long as its arithmetic at the multiprocessor's share of the peak, block padding included, or as its traffic at
the share of the L2's bandwidth, whichever is longer. A launch takes as long as its last multiprocessor, or as moving each of its
tensors once through memory. Left out: launching, filling pipelines, misses of the L2, several programs that hide each other's
waiting, and that matrix instructions of an older architecture do not reach the peak of a newer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from typing import NamedTuple

import torch

from atrous_kernels.gpus import GPU


class Program(NamedTuple):
    """One program of a launch."""

    valid: int  # multiplications of real input
    executed: int  # multiplications in whole blocks
    loaded: int  # bytes, by way of the L2
    stored: int  # bytes


@dataclass(frozen=True)
class Work:
    """One launch as the model takes it. ``precision`` is that of matrix products, None where the scalar units multiply."""

    kernel: str
    blocks: tuple[int, ...]
    programs: list[Program]  # in launch order; none where only the bytes are modelled
    memory_bytes: int  # of its tensors
    dtype: torch.dtype
    precision: str | None = None


@dataclass(frozen=True)
class Simulation:
    """What the model says of one launch; times in seconds. Where ``programs`` is 0, only the bytes are modelled."""

    kernel: str
    blocks: tuple[int, ...]
    programs: int
    waves: float  # programs per multiprocessor
    valid_flops: int
    executed_flops: int
    makespan: float
    mean: float  # of the multiprocessors: what a perfect balance would take
    longest_first: float  # the makespan, were the longest programs launched first
    l2_bytes: int
    memory_bytes: int
    memory_seconds: float
    per_multiprocessor: list[float] = field(repr=False)

    @property
    def seconds(self) -> float:
        return max(self.makespan, self.memory_seconds)

    @property
    def balance(self) -> float:
        """Share of the makespan in which the average multiprocessor works."""
        return self.mean / self.makespan if self.makespan else 1.0


def schedule(times: Sequence[float], workers: int) -> list[float]:
    """Seconds that every worker is busy, where each takes the next piece as soon as it is free."""
    busy = [0.0] * workers  # a heap
    for time in times:
        heapreplace(busy, busy[0] + time)
    return busy


def estimate(work: Work, gpu: GPU) -> Simulation:
    """What the model says of ``work`` on ``gpu``."""
    flops = gpu.scalar_flops if work.precision is None else gpu.flops(work.dtype, work.precision)
    arithmetic, traffic = gpu.multiprocessors / flops, gpu.multiprocessors / gpu.l2_bytes_per_second
    each = work.programs
    times = [max(2 * p.executed * arithmetic, (p.loaded + p.stored) * traffic) for p in each]
    busy = schedule(times, gpu.multiprocessors)
    return Simulation(
        kernel=work.kernel,
        blocks=work.blocks,
        programs=len(each),
        waves=len(each) / gpu.multiprocessors,
        valid_flops=2 * sum(p.valid for p in each),
        executed_flops=2 * sum(p.executed for p in each),
        makespan=max(busy),
        mean=sum(times) / gpu.multiprocessors,
        longest_first=max(schedule(sorted(times, reverse=True), gpu.multiprocessors)),
        l2_bytes=sum(p.loaded + p.stored for p in each),
        memory_bytes=work.memory_bytes,
        memory_seconds=work.memory_bytes / gpu.bytes_per_second,
        per_multiprocessor=sorted(busy, reverse=True),
    )
