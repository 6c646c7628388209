"""``python -m benchmarks.tune [--add] [--op OP ...]``: measures the implementations of conv2d, its gradients and conv_bn_act on
this machine, for automatic choice. The table of this instruction set is replaced; ``--add`` measures only the buckets that it
lacks, ``--op`` only those ops, whose kernels have changed.

Writes ``atrous_kernels/tuned/cpu_<instruction set>.json``. The problems are every convolution of the networks below, at the sizes
of their recipes, and some more: both layouts; fp32 and bf16 on all threads, fp32 on one. Medians of interleaved rounds. The
forward passes keep their prepared weights, as in inference; for the gradients the weights change, as in training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch.autograd.graph import increment_version

import atrous_kernels as ak
from atrous_kernels import dispatch, native
from atrous_kernels.ops.conv2d import conv2d, conv2d_input, conv2d_weight, problem_of
from atrous_kernels.ops.conv_bn_act import conv_bn_act
from atrous_kernels.tables import FOLDER, commit
from atrous_kernels.tuned import bucket
from benchmarks.measure import seconds
from segmodels import create_model
from segmodels.engine.build import keep_freed_memory
from segmodels.engine.report import machine, versions

# model, batch, side
NETWORKS = [
    ("deeplabv3_resnet50", 1, 513),
    ("deeplabv3_resnet50", 4, 257),
    ("deeplabv3plus_efficientnet_lite0", 8, 360),
    ("deeplabv3plus_efficientnet_lite0", 1, 480),
]
# batch, channels in, channels out, side, kernel, rate, stride, depthwise
MORE = [
    *((2, 144, 144, 33, 3, rate, 1, True) for rate in (2, 4, 6, 12)),
    *((1, 256, 256, 65, 3, rate, 1, True) for rate in (12, 36)),
    (1, 728, 728, 33, 3, 2, 1, True),
    (8, 32, 32, 160, 3, 1, 1, True),
    *((1, c, c, side, 3, rate, 1, False) for c, side, rate in product((256, 512), (33, 65), (1, 2, 4))),
    *((2, 512, 512, 33, 3, rate, 1, False) for rate in (2, 4)),
    *((1, 2048, 256, 65, 3, rate, 1, False) for rate in (12, 24, 36)),
    *((2, 2048, 256, 33, 3, rate, 1, False) for rate in (6, 12, 18)),
    (8, 16, 16, 64, 3, 1, 1, False),
    (4, 32, 32, 65, 3, 1, 1, False),
    (1, 512, 512, 9, 3, 1, 1, False),
    (1, 4096, 512, 60, 3, 1, 1, False),
    # Pooled maps: the levels of PSPNet, the image pooling of DeepLab.
    *((n, 2048, o, side, 1, 1, 1, False) for n, o, side in product((1, 2, 8), (256, 512), (1, 2, 3, 6))),
    *((n, c, 256, 1, 1, 1, 1, False) for n, c in product((1, 2, 8), (320, 1280))),
]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("winograd", "cpu", "torch")
OPS = ("conv2d", "conv2d_input", "conv2d_weight", "conv_bn_act")
SECONDS = 0.04  # per implementation, op and problem; three rounds at least

Shape = tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]  # input, weight, geometry


def shapes_of_networks() -> Iterable[Shape]:
    """Every convolution of the networks, by running them once."""
    found: list[Shape] = []

    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        found.append((tuple(inputs[0].shape), tuple(module.weight.shape), geometry))

    for name, batch, side in NETWORKS:
        model = create_model(name, num_classes=21).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and isinstance(module.padding, tuple):
                module.register_forward_hook(hook)
        with torch.no_grad(), ak.backend("torch"):
            model(torch.randn(batch, 3, side, side))
    return found


def shapes_listed() -> Iterable[Shape]:
    for n, c, o, side, k, rate, stride, depthwise in MORE:
        groups = c if depthwise else 1
        yield (n, c, side, side), (o, c // groups, k, k), ((stride,) * 2, (rate * (k - 1) // 2,) * 2, (rate,) * 2, groups)


def measure(shape: Shape, dtype: torch.dtype, layout: torch.memory_format, ops: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per op the milliseconds of every implementation that can run."""
    input_size, weight_size, geometry = shape
    x = torch.randn(input_size).to(dtype).contiguous(memory_format=layout)
    w = torch.randn(weight_size).to(dtype).contiguous(memory_format=layout)
    problem = problem_of(input_size, weight_size, geometry, x, layout is torch.channels_last)
    g = torch.randn_like(conv2d(x, w, None, *geometry, "torch"))
    norm = [torch.rand(weight_size[0]) + 0.5 for _ in range(4)]
    calls = {
        "conv_bn_act": lambda backend: conv_bn_act(x, w, *norm, None, 1e-5, "relu", *geometry, backend),
        "conv2d": lambda backend: conv2d(x, w, None, *geometry, backend),
        "conv2d_input": lambda backend: conv2d_input(x.shape, w, g, *geometry, backend),
        "conv2d_weight": lambda backend: conv2d_weight(x, w.shape, g, *geometry, backend),
    }
    found = {}
    for op, call in ((op, calls[op]) for op in ops):
        able = {choice.name for choice in dispatch.explain(op, problem).choices if not choice.reason.startswith("cannot run")}
        times: dict[str, list[float]] = {backend: [] for backend in BACKENDS if backend in able}
        for backend in times:
            call(backend)  # warm
        slowest = max(seconds(lambda call=call, backend=backend: call(backend)) for backend in times)
        for _ in range(min(max(int(SECONDS / slowest), 3), 15)):
            for backend, mine in times.items():
                if op in ("conv2d_input", "conv2d_weight"):
                    increment_version(w)
                mine.append(seconds(lambda call=call, backend=backend: call(backend)))
        found[op] = {backend: round(median(mine) * 1e3, 4) for backend, mine in times.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description="measures the table of automatic choice")
    parser.add_argument("--add", action="store_true", help="keep what the table has, measure what it lacks")
    parser.add_argument("--op", action="append", choices=OPS, help="measure this op only, keep the others; may be repeated")
    options = parser.parse_args()
    ops = options.op or list(OPS)
    keep_freed_memory()
    introspect = native.introspect()
    if introspect is None:
        raise SystemExit(f"nothing to tune: {native.cpu_missing()}")
    shapes = list(dict.fromkeys([*shapes_of_networks(), *shapes_listed()]))
    every = torch.get_num_threads()
    path = FOLDER / f"cpu_{introspect.selected_isa()}.json"
    table: dict[str, dict[str, dict[str, float]]] = {op: {} for op in OPS}
    if options.add or options.op:
        table = json.loads(path.read_text())["milliseconds"]
    if not options.add:
        table |= {op: {} for op in ops}
    for threads in sorted({1, every}, reverse=True):
        torch.set_num_threads(threads)
        for shape, dtype, layout in product(shapes, DTYPES if threads > 1 else DTYPES[:1], LAYOUTS):
            x = torch.empty(1, dtype=dtype)
            name = bucket(problem_of(shape[0], shape[1], shape[2], x, layout is torch.channels_last))
            missing = [op for op in ops if name not in table[op]]
            if not missing:
                continue
            with torch.no_grad():
                for op, times in measure(shape, dtype, layout, missing).items():
                    table[op][name] = times
                    print(f"{len(table[op])} {op} {name}: {times}", flush=True)
    head = {"machine": machine(), "versions": versions(), "commit": commit(), "threads": every}
    rows_of = ",\n".join(
        f'  "{op}": {{\n' + ",\n".join(f'    "{key}": {json.dumps(times)}' for key, times in sorted(rows.items())) + "\n  }"
        for op, rows in table.items()
    )
    FOLDER.mkdir(exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]},\n "milliseconds": {{\n{rows_of}\n }}\n}}\n')
    print(f"wrote {path}: {len(table['conv2d'])} buckets")


if __name__ == "__main__":
    main()
