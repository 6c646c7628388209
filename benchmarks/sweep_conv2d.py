"""``python -m benchmarks.sweep_conv2d``: each of the three ops of conv2d, our CPU kernels against the framework's.

Writes benchmarks/results/conv2d_cpu_sweep.json, from which the rules of automatic choice in ``atrous_kernels/ops/conv2d.py`` are
drawn. Medians of five interleaved rounds, on one thread and on all.
"""

from __future__ import annotations

import json
import subprocess
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd.graph import increment_version

from atrous_kernels.ops.conv2d import conv2d, conv2d_input, conv2d_weight, problem_of
from atrous_kernels.ops.winograd import can_run
from benchmarks.measure import seconds
from segmodels.engine.build import keep_freed_memory
from segmodels.engine.report import machine, versions

RESULT = Path(__file__).parent / "results" / "conv2d_cpu_sweep.json"

# batch, channels in, channels out, side, kernel, rate, stride, depthwise
DEPTHWISE = [
    *((8, 144, 144, 80, k, 1, s, True) for k, s in product((3, 5), (1, 2))),
    *((2, 144, 144, 33, 3, rate, 1, True) for rate in (2, 4, 6, 12)),
    (2, 144, 144, 33, 5, 2, 1, True),
    (8, 32, 32, 160, 3, 1, 1, True),
    (8, 672, 672, 20, 5, 1, 1, True),
    (1, 728, 728, 33, 3, 2, 1, True),
]
DENSE = [
    (8, 3, 32, 320, 3, 1, 2, False),
    (8, 3, 16, 256, 7, 1, 2, False),
    (8, 16, 16, 64, 3, 1, 1, False),
    (8, 64, 64, 32, 3, 1, 1, False),
    (2, 256, 256, 33, 3, 2, 1, False),
    (2, 512, 512, 33, 3, 4, 1, False),
    (1, 64, 64, 129, 3, 1, 1, False),
    (1, 128, 128, 65, 3, 1, 1, False),
    (4, 32, 32, 65, 3, 1, 1, False),
    (1, 512, 512, 9, 3, 1, 1, False),
    (1, 2048, 256, 33, 3, 12, 1, False),
    (1, 2048, 256, 33, 3, 6, 1, False),
    (1, 2048, 256, 33, 3, 18, 1, False),
    (8, 32, 16, 160, 1, 1, 1, False),
    (8, 144, 24, 80, 1, 1, 1, False),
    (8, 320, 256, 20, 1, 1, 1, False),
    (8, 304, 256, 80, 1, 1, 1, False),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def measure(shape: tuple[Any, ...], dtype: torch.dtype, layout: str) -> dict[str, dict[str, float]]:
    """Per op the milliseconds of both."""
    n, c, o, side, k, rate, stride, depthwise = shape
    groups = c if depthwise else 1
    form = LAYOUTS[layout]
    x = torch.randn(n, c, side, side).to(dtype).contiguous(memory_format=form)
    w = torch.randn(o, c // groups, k, k).to(dtype).contiguous(memory_format=form)
    geometry = ([stride] * 2, [rate * (k - 1) // 2] * 2, [rate] * 2, groups)
    g = torch.randn_like(conv2d(x, w, None, *geometry, "torch"))
    calls = {
        "conv2d": lambda backend: conv2d(x, w, None, *geometry, backend),
        "conv2d_input": lambda backend: conv2d_input(x.shape, w, g, *geometry, backend),
        "conv2d_weight": lambda backend: conv2d_weight(x, w.shape, g, *geometry, backend),
    }
    found = {}
    for op, call in calls.items():
        ours = ["cpu"] if can_run(problem_of(x.shape, w.shape, geometry, x, False)) else ["winograd", "cpu"]
        times: dict[str, list[float]] = {backend: [] for backend in (*ours, "torch")}
        for round_ in range(6):
            for backend, mine in times.items():
                increment_version(w)  # no candidate may keep prepared weights, as in training
                took = seconds(lambda call=call, backend=backend: call(backend))
                if round_:  # the first warms up
                    mine.append(took)
        found[op] = {backend: median(mine) * 1e3 for backend, mine in times.items()}
    return found


def main() -> None:
    keep_freed_memory()
    rows = []
    every = torch.get_num_threads()
    for threads in sorted({1, every}):
        torch.set_num_threads(threads)
        for shape, dtype, layout in product(DEPTHWISE + DENSE, (torch.float32, torch.bfloat16), LAYOUTS):
            with torch.no_grad():
                ops = measure(shape, dtype, layout)
            rows.append({"threads": threads, "shape": shape, "dtype": str(dtype), "layout": layout, "milliseconds": ops})
            ratios = {
                op: {name: f"{ms['torch'] / own:.2f}" for name, own in ms.items() if name != "torch"} for op, ms in ops.items()
            }
            print(f"{threads} threads {shape} {dtype} {layout}: {ratios}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"machine": machine(), "versions": versions(), "commit": commit})[1:-1]
    RESULT.write_text(
        f'{{{head}, "columns": "n, c_in, c_out, side, kernel, rate, stride, depthwise", "rows": [\n  {lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
