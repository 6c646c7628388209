"""``python -m benchmarks.profiling --output FILE``: the kernels of the convolution benchmarks, by PyTorch's profiler.

One call of every case and backend, channels-last, after a call that compiles. ``--once`` profiles nothing itself but marks these
calls for ``ncu --profile-from-start off``. ``--small``: one case, for a rehearsal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.bench_conv2d import BACKENDS, CASES, Case, call_of, operands, ours
from benchmarks.measure import DEVICE


def calls(cases: list[Case]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Per name a call that has run once."""
    for case in cases:
        x, w, g, _ = operands(case)
        x, w, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, w, g))
        for t in (x, w):
            t.requires_grad_(case.backward)
        for backend in (*BACKENDS, "torch"):
            call = call_of(case, F.conv2d if backend == "torch" else ours(backend), x, w, g)
            try:
                call()
            except RuntimeError as error:  # a backend that cannot run this says so
                print(f"{case}, {backend}: {error}")
                continue
            yield f"{case}, {backend}", call


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="the profiler's table")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not (options.output or options.once):
        parser.error("expected --output FILE or --once")
    cases = [Case("rehearsal", 1, 64, 64, 33, 2)] if options.small else CASES
    torch.backends.cudnn.benchmark = True
    if options.once:
        for name, call in calls(cases):
            with torch.cuda.nvtx.range(name):
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with options.output.open("w") as file:
        for name, call in calls(cases):
            with profile(activities=activities) as profiler, record_function(name):
                call()
            order = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
            file.write(f"# {name}\n{profiler.key_averages().table(sort_by=order, row_limit=8)}\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
