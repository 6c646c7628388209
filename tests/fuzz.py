"""Random problems with exact answers: ``python -m tests.fuzz --op conv2d --problems 10000 --seed 0``.

Inputs are small integers, so every product and every sum of a convolution is exact in the accumulator whatever its order,
and the result is that sum rounded once: any difference from the float64 reference is a bug. Other ops draw numbers that stay
exact through them (upsampling by 2 and 4, normalisation by powers of two) as often as others, which get a tolerance, with its
reason. Results and scratch start as NaN.
A mismatch prints the command that repeats it alone. Another op is one more entry in ``OPS``, and a file in ``tests/fuzzed``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

# Read once, by the thread pool and by the compiled library. Problems are small: spinning threads would only wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ATROUS_POISON", "1")

import torch
from torch import Tensor

from atrous_kernels import native
from tests.fuzzed.aspp import draw_aspp, run_aspp
from tests.fuzzed.conv2d import draw_conv2d, draw_winograd, run_conv2d, run_winograd
from tests.fuzzed.conv_bn_relu import draw_conv_bn_relu, run_conv_bn_relu
from tests.fuzzed.domain_transform import draw_transform, run_transform
from tests.fuzzed.draws import Op, Problem
from tests.fuzzed.permutohedral import draw_permutohedral, run_permutohedral
from tests.fuzzed.pyramid_pool import draw_pyramid, run_pyramid
from tests.fuzzed.upsample import draw_argmax, draw_cross_entropy, run_argmax, run_cross_entropy
from tests.fuzzed.upsample_concat import draw_concat, draw_psp_conv, run_concat, run_psp_conv

OPS = {
    "conv2d": Op(draw_conv2d, run_conv2d),
    "conv2d_winograd": Op(draw_winograd, run_winograd),
    "conv_bn_relu": Op(draw_conv_bn_relu, run_conv_bn_relu),
    "aspp": Op(draw_aspp, run_aspp),
    "pyramid_pool": Op(draw_pyramid, run_pyramid),
    "upsample_concat": Op(draw_concat, run_concat),
    "psp_conv": Op(draw_psp_conv, run_psp_conv),
    "upsample_cross_entropy": Op(draw_cross_entropy, run_cross_entropy),
    "upsample_argmax": Op(draw_argmax, run_argmax),
    "domain_transform": Op(draw_transform, run_transform),
    "permutohedral": Op(draw_permutohedral, run_permutohedral),
}


def difference(ours: Tensor, truth: Tensor, tolerance: float) -> str | None:
    """None where the two agree, else where and by how much they do not."""
    if ours.shape != truth.shape:
        return f"has sizes {list(ours.shape)}, expected {list(truth.shape)}"
    truth = truth.to(ours.dtype)
    wrong = ~((ours - truth).abs() <= tolerance) if tolerance else ours != truth  # NaN agrees with nothing
    if not wrong.any():
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    where = f"{int(wrong.sum())} of {wrong.numel()} elements, first at {list(at)}"
    return f"differs in {where}: {ours[at]} instead of {truth[at]}"


def problem_at(op: str, seed: int, index: int) -> Problem:
    """Problem number ``index`` of a run, without drawing those before it."""
    return OPS[op].draw(Random(f"{op} {seed} {index}"))


def fuzz(op: str, problems: int, seed: int, first: int = 0) -> list[str]:
    """Runs problems ``first`` to ``first + problems``; per mismatch a line with the command that repeats it."""
    lines = []
    threads = torch.get_num_threads()
    poisoned = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for index in range(first, first + problems):
            problem = problem_at(op, seed, index)
            torch.set_num_threads(problem["threads"])
            repeat = f"python -m tests.fuzz --op {op} --seed {seed} --first {index} --problems 1  # {problem}"
            try:
                for name, ours, truth, tolerance in OPS[op].run(problem):
                    wrong = difference(ours, truth, tolerance)
                    if wrong:
                        lines.append(f"{name} {wrong}: {repeat}")
            except RuntimeError as error:
                lines.append(f"{op} raised {error}: {repeat}")
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(poisoned[0])
        torch.utils.deterministic.fill_uninitialized_memory = poisoned[1]
    return lines


def _outcome(op: str, problems: int, seed: int, mismatches: int, seconds: float) -> dict[str, Any]:
    introspect = native.introspect()
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "op": op,
        "isa": introspect.selected_isa() if introspect else "unknown",
        "problems": problems,
        "mismatches": mismatches,
        "seed": seed,
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": subprocess.run(head, capture_output=True, text=True).stdout.strip() or None,
    }


def _record(path: Path, outcome: dict[str, Any], first: int) -> None:
    """Adds an outcome to the file: to the problems before ``first``, else in place of an earlier one of its op and machine."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    earlier = [run for run in runs if (run["op"], run["isa"]) == (outcome["op"], outcome["isa"])]
    if first:
        same = ("seed", "python", "torch", "commit")
        if not earlier or earlier[0]["problems"] != first or any(earlier[0][key] != outcome[key] for key in same):
            what = f"{first} problems of {outcome['op']} with this seed, these versions and this commit"
            raise SystemExit(f"--first {first}: expected {path} to hold {what}, to go on from there")
        outcome = outcome | {key: earlier[0][key] + outcome[key] for key in ("problems", "mismatches")}
        outcome["seconds"] = round(earlier[0]["seconds"] + outcome["seconds"], 1)
    runs = [run for run in runs if run not in earlier]
    path.write_text(json.dumps({"runs": sorted([*runs, outcome], key=lambda run: (run["op"], run["isa"]))}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", choices=[*OPS, "all"], default="all")
    parser.add_argument("--problems", type=int, default=1000, help="per op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first problem; a recorded run can go on from there")
    parser.add_argument("--json", type=Path, help="file to which the outcome is added")
    args = parser.parse_args(arguments)
    if native.cpu_missing():
        print(f"nothing to fuzz: {native.cpu_missing()}", file=sys.stderr)
        return 2
    failed = False
    for op in OPS if args.op == "all" else [args.op]:
        start = time.perf_counter()
        lines = fuzz(op, args.problems, args.seed, args.first)
        seconds = time.perf_counter() - start
        print(*lines, f"{op}: {args.problems} problems, {len(lines)} mismatches, {seconds:.0f} s", sep="\n", flush=True)
        failed |= bool(lines)
        if args.json:
            _record(args.json, _outcome(op, args.problems, args.seed, len(lines), seconds), args.first)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
