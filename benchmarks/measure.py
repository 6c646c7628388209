"""Timing that can be trusted: interleaved rounds in one process, medians and percentiles, no garbage collection inside."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[[], Any]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(call: Call) -> float:
    """Wall time of one call; on a GPU, the time between two events around it."""
    if DEVICE == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(benchmark: Any, calls: dict[str, Call], ours: str, budget: float = 5.0) -> tuple[dict[str, list[float]], int]:
    """Times every call once per round, in a random order (nobody always follows the same one and finds its caches warm).

    Args:
        benchmark: the fixture of pytest-benchmark.
        calls: per name a call, already warm.
        ours: the key of ``calls`` that the plugin itself times.
        budget: seconds to spend; 5 rounds at least, 200 at most. ``BENCH_SECONDS`` in the environment replaces it.

    Returns:
        Per name the seconds of each round, and the number of rounds.
    """
    budget = float(os.environ.get("BENCH_SECONDS", budget))
    once = sum(seconds(call) for call in calls.values())
    rounds = min(max(int(budget / once), 5), 200)
    times: dict[str, list[float]] = {name: [] for name in calls}
    random = Random(0)

    def round_of_all() -> None:
        for name in random.sample(list(calls), len(calls)):
            times[name].append(seconds(calls[name]))

    gc.disable()
    try:
        # The plugin times ours once more, for its own table: alone, after its own bookkeeping, so it is not what we report.
        benchmark.pedantic(calls[ours], setup=round_of_all, rounds=rounds)
    finally:
        gc.enable()
    return times, rounds


def percentiles(times: list[float]) -> dict[str, float]:
    """Milliseconds at the 20th, 50th and 80th percentile."""
    return {f"p{q}_ms": torch.tensor(times).quantile(q / 100).item() * 1e3 for q in (20, 50, 80)}


def peak_growth(call: Call) -> int:
    """Bytes that one call adds to the resident memory of this process at its peak (Linux). Best in a fresh process."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    kept = call()
    growth = status("VmHWM") - before
    del kept
    return growth


@cache
def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """This machine, now, best of ten: FLOP/s of a large matrix product (the faster of two ways), bytes/s of a large copy.

    Bytes count read plus written.
    """
    side, elements = (2048, 2**25) if DEVICE == "cpu" else (8192, 2**30)
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    # The same product as a 1x1 convolution: on some processors the framework's convolution has the better library behind it.
    image = a.reshape(1, side // 32, 32, side).permute(0, 3, 1, 2)
    weight = b.reshape(side, side, 1, 1)
    source = torch.randn(elements, device=DEVICE)
    target = torch.empty_like(source)
    with torch.no_grad():
        products = [min(seconds(call) for _ in range(10)) for call in (lambda: a @ b, lambda: F.conv2d(image, weight))]
    product = min(products)
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * side**3 / product, 2 * source.nbytes / copy
