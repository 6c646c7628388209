"""``python -m atrous_kernels.tune``: measures launch configurations of the Triton kernels on this GPU, for its table.

Writes ``atrous_kernels/tuned/gpu_<model>.json``, which the kernels follow (:mod:`atrous_kernels.triton.launch_table`). Calls
(:mod:`atrous_kernels.tune_calls`) that share an entry of the table are tuned together. Candidates are those that the model of
:mod:`atrous_kernels.simulate` puts near the best, of kernels whose programs it does not know a fixed few; each has to give the
reference's answer before it is timed, where sums of integers are exact bit for bit. Times are medians of
rounds in which every candidate runs once, in random order, with the L2 overwritten before each. The rule's own configuration is
always a candidate, and stays where nothing beats it by ``LEAST_GAIN``.

``--dry-run --output FILE`` needs no GPU: the same walk with modelled times and nothing executed. Such a file says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from itertools import product
from math import inf
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor

from atrous_kernels.gpus import GPU, GPUS, nearest_gpu
from atrous_kernels.simulate import simulate
from atrous_kernels.tables import FOLDER, commit
from atrous_kernels.triton.launch_table import RULE, Config, listen, use
from atrous_kernels.triton.runtime import run
from atrous_kernels.tune_calls import Call, calls

MOST_CANDIDATES = 8  # beside the rule's own
NEAR = 1.3  # times the best modelled time: no model is better than that
MOST_ALIKE = 3  # of the same tile
LEAST_GAIN = 0.03
ROUNDS = 15


@dataclass(frozen=True)
class Task:
    """One entry of the table, and the calls that ask for it."""

    kind: str
    key: str
    calls: tuple[Call, ...]


def tasks(found: Sequence[Call]) -> list[Task]:
    """The entries that these calls ask for, in the order in which they first do."""
    asked: dict[tuple[str, str], list[Call]] = {}
    for call in found:
        with listen() as heard:
            call.untouched()
        for entry in dict.fromkeys(heard):
            asked.setdefault(entry, []).append(call)
    return [Task(kind, key, tuple(calls)) for (kind, key), calls in asked.items()]


# Candidates -----------------------------------------------------------------------------------------------------------------


def candidates(task: Task, gpu: GPU) -> dict[Config, float]:
    """Configurations worth measuring, the rule's among them, with their modelled seconds."""
    found = {config: modelled(task, config, gpu) for config in (RULE, *_fitting(task, gpu))}
    limit = NEAR * min(found.values())
    kept = {RULE: found.pop(RULE)}
    # The model does not tell warps, stages and depths apart: a few of each tile, the deepest first.
    for config in sorted(found, key=lambda config: (found[config], *(-x for x in config))):
        alike = sum(other[:2] == config[:2] for other in kept)
        if found[config] <= limit and alike < MOST_ALIKE and len(kept) <= MOST_CANDIDATES:
            kept[config] = found[config]
    return kept


def modelled(task: Task, config: Config, gpu: GPU) -> float:
    """Seconds of all the task's calls, by the model."""
    with use(task.kind, config):
        return sum(simulate(launch, gpu).seconds for call in task.calls for launch in call.untouched())


def _fitting(task: Task, gpu: GPU) -> Iterable[Config]:
    """Blocks whose operands fit into shared memory and whose sums fit into registers.

    Of kernels whose programs the model does not know only a few: all of them are measured.
    """
    call = task.calls[0]
    size = call.dtype.itemsize
    if task.kind in ("dense", "aspp"):
        return _products(size, gpu)
    few: dict[str, Iterable[Config]] = {
        "depthwise": list(product((8, 16, 32, 64), (32, 64, 128), (4,)))
        if call.channels_last else [(pixels, 1, 4) for pixels in (128, 256, 512, 1024)],
        "psp_conv": [(64, n, 32 if size == 2 else 16, warps) for n in (64, 128) for warps in (4, 8)],
        "passes": [(16, 128, 4), (32, 128, 4), (64, 64, 4), (32, 64, 8), (16, 64, 4), (64, 64, 8)]
        if call.channels_last else [(256, 4, 4), (1024, 2, 4), (1024, 4, 8), (512, 8, 8)],
        "pooling": [(8, 64, 4), (16, 64, 4), (16, 128, 4), (16, 128, 8), (8, 256, 4)]
        if call.channels_last else [(64, 8, 4), (256, 4, 4), (256, 8, 4)],
        "upsample": [(512, 16), (1024, 8), (2048, 16), (512, 8)],
    }  # fmt: skip
    return few[task.kind]


def _products(size: int, gpu: GPU) -> Iterator[Config]:
    for m, n, k in product((64, 128, 256), (64, 128, 256), (16, 32, 64) if size == 4 else (32, 64, 128)):
        for warps, stages in ((4, 3), (8, 3), (8, 4)):
            sums_per_thread = m * n // (32 * warps)
            if (m + n) * k * size * stages <= gpu.shared_bytes and 16 <= sums_per_thread <= (64 if size == 4 else 128):
                yield m, n, k, warps, stages


# On a GPU -------------------------------------------------------------------------------------------------------------------


def wrong(call: Call, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """None where the configuration in use gives ``expected``, within the call's tolerance, else what it does instead."""
    results, planned = call.plan(*tensors)
    for result in results:
        result.fill_(float("nan") if result.is_floating_point() else -1)
    try:
        run(planned, tensors[0].device)
        differences = [_difference(*pair, call.tolerance) for pair in zip(results, expected, strict=True)]
    except Exception as error:  # Triton has no type for what does not fit: a configuration that fails is only left out
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return next((difference for difference in differences if difference), None)


def _difference(result: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if tolerance == 0:
        far = result != expected
    else:
        far = ~((result.double() - expected.double()).abs() <= tolerance * expected.double().abs().max())  # NaN is far
    different = int(far.sum())
    return f"{different} of {expected.numel()} values differ from the reference" if different else None


class Stopwatch:
    """Times launches on one GPU, with its L2 full of something else."""

    def __init__(self, device: torch.device) -> None:
        # Writing this also keeps the GPU busy while the launch is prepared, so that the events enclose the kernels alone.
        self.other = torch.empty(512 * 2**20, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], None]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.zero_()
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3


def measured(
    task: Task, configs: Sequence[Config], device: torch.device
) -> tuple[dict[Config, float], dict[str, str]]:
    """Seconds of all the task's calls under each configuration that answers rightly; and why the others were left out."""
    watch, random = Stopwatch(device), Random(0)
    totals: dict[Config, float] = dict.fromkeys(configs, 0.0)
    rejected: dict[str, str] = {}
    for call in task.calls:
        tensors = call.filled(device)
        expected = call.truth(*tensors)
        prepared = {}
        for config in list(totals):
            with use(task.kind, config):
                reason = wrong(call, tensors, expected)
                if reason is not None:
                    rejected["the rule" if config == RULE else str(list(config))] = f"{call}: {reason}"
                    del totals[config]
                else:
                    prepared[config] = partial(run, call.plan(*tensors)[1], device)
        times: dict[Config, list[float]] = {config: [] for config in prepared}
        for _ in range(ROUNDS):
            for config in random.sample(list(prepared), len(prepared)):
                times[config].append(watch.seconds(prepared[config]))
        for config, mine in times.items():
            totals[config] += median(mine)
    return totals, rejected


# The table ------------------------------------------------------------------------------------------------------------------


def entry(task: Task, totals: dict[Config, float]) -> dict[str, Any] | None:
    """The row of the table, or None where the rule is as good as anything."""
    rule, config = totals.get(RULE, inf), min((config for config in totals if config != RULE), key=totals.__getitem__)
    best = totals[config]
    if best > (1 - LEAST_GAIN) * rule:
        return None
    return {
        "config": list(config), "microseconds": round(best * 1e6, 2), "rule_microseconds": round(rule * 1e6, 2),
        "calls": len(task.calls), "candidates": len(totals),
    }  # fmt: skip


def tune(
    gpu: GPU, device: torch.device | None, found: Sequence[Call], seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The table's kernels, what was rejected, and how many entries there was no time for. Without a device: modelled."""
    started = time.monotonic()
    kernels: dict[str, dict[str, Any]] = {}
    rejected: dict[str, dict[str, str]] = {}
    wanted = tasks(found)
    for done, task in enumerate(wanted):
        if time.monotonic() - started > seconds:
            say(f"time is up: {len(wanted) - done} of {len(wanted)} entries are left to the rule")
            return {"kernels": kernels, "rejected": rejected, "not_reached": len(wanted) - done}
        totals = candidates(task, gpu)
        if device is not None:
            totals, reasons = measured(task, list(totals), device)
            if reasons:
                rejected[f"{task.kind} {task.key}"] = reasons
        row = entry(task, totals) if len(totals) > (RULE in totals) else None
        if row is not None:
            kernels.setdefault(task.kind, {})[task.key] = row
        verdict = "the rule stays" if row is None else "{config}: {microseconds} us, the rule {rule_microseconds}".format(**row)
        say(f"{done + 1}/{len(wanted)} {task.kind} {task.key} ({len(totals)} candidates): {verdict}")
    return {"kernels": kernels, "rejected": rejected, "not_reached": 0}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m atrous_kernels.tune", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="instead of the package's table for this GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no further entry after so many; default 8")
    parser.add_argument("--dry-run", action="store_true", help="model instead of measuring; needs --output, and no GPU")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200", help="what a dry run models")
    parser.add_argument("--calls", type=int, help="only the first so many calls")
    options = parser.parse_args(argv)
    if options.dry_run:
        if options.output is None or options.output.resolve().parent == FOLDER:
            parser.error("--dry-run needs --output, outside the package's tables: a model is not a measurement")
        gpu, device = GPUS[options.gpu], None
    else:
        if not torch.cuda.is_available() or util.find_spec("triton") is None:
            parser.error("nothing to measure on: this needs Triton and a GPU that the framework sees (--dry-run models one)")
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        gpu = nearest_gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
    found = tune(gpu, device, calls()[: options.calls], options.minutes * 60, lambda line: print(line, flush=True))
    head = {
        "gpu": {"name": gpu.name, "capability": list(gpu.capability), "multiprocessors": gpu.multiprocessors},
        "times": "modelled, not measured" if device is None else "measured",
        "versions": {
            "torch": str(torch.__version__), "cuda": torch.version.cuda,
            "triton": metadata.version("triton") if util.find_spec("triton") else None,
        },
        "commit": commit(),
    }  # fmt: skip
    path = options.output or FOLDER / f"gpu_{gpu.name.lower().replace(' ', '_').replace('/', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **found}, indent=1) + "\n")
    print(f"wrote {path}: {sum(map(len, found['kernels'].values()))} entries")
    broken = [name for name, reasons in found["rejected"].items() if "the rule" in reasons]
    if broken:
        print(f"the rule itself fails for {'; '.join(broken)}: see {path}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
