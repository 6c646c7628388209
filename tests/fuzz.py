"""Random problems with exact answers: ``python -m tests.fuzz --op conv2d --problems 10000 --seed 0``.

Inputs are small integers, so every product and every sum of a convolution is exact in the accumulator whatever its order,
and the result is that sum rounded once: any difference from the float64 reference is a bug. Ops that divide or take
exponentials get a tolerance, with its reason. Results and scratch start as NaN.
A mismatch prints the command that repeats it alone. Another op is one more entry in ``OPS``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

# Read once, by the thread pool and by the compiled library. Problems are small: spinning threads would only wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ATROUS_POISON", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops import conv2d as conv2d_ops
from atrous_kernels.problem import out_extent
from atrous_kernels.reference import conv2d as conv2d_reference
from atrous_kernels.reference import pyramid_pool as pyramid_reference

Problem = dict[str, Any]
Results = Iterator[tuple[str, Tensor, Tensor, float]]


class Op(NamedTuple):
    """How to fuzz one op: ``draw`` gives a legal problem as plain values, ``run`` its results (name, ours, truth, tolerance).

    The truth is float64 and is rounded to the type of ours before the two are compared; 0 asks for the same bits.
    """

    draw: Callable[[Random], Problem]
    run: Callable[[Problem], Results]


# What any op may draw ---------------------------------------------------------------------------------------------------

DTYPES = {"float32": 4, "bfloat16": 3, "float64": 1, "float16": 1}
NO_HALF = {"float32": 4, "bfloat16": 3, "float64": 1}
LAYOUTS = {"contiguous": 3, "channels_last": 3, "sliced": 1, "turned": 1, "expanded": 1}


def pick(rng: Random, weights: dict[Any, int]) -> Any:
    """A key, as often as its weight says."""
    return rng.choices(list(weights), list(weights.values()))[0]


def skewed(rng: Random, low: int, high: int) -> int:
    """Small values often, large ones sometimes."""
    return rng.randint(low, rng.randint(low, high))


def integers(seed: int, sizes: list[int], dtype: str, layout: str, largest: int = 3) -> Tensor:
    """Integers in [-largest, largest] laid out as asked; elements around a view are NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-largest, largest + 1, sizes, generator=generator).to(getattr(torch, dtype))
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = values.new_full([size + 2 for size in sizes[:-1]] + [2 * sizes[-1] + 1], torch.nan)
        view = wide[(*(slice(1, 1 + size) for size in sizes[:-1]), slice(1, 1 + 2 * sizes[-1], 2))]
        return view.copy_(values)
    if layout == "turned":
        return values.permute(*reversed(range(values.dim()))).contiguous().permute(*reversed(range(values.dim())))
    if layout == "expanded":
        return values[..., :1].expand(sizes)
    return values


# conv2d -----------------------------------------------------------------------------------------------------------------


def draw_conv2d(rng: Random) -> Problem:
    while True:
        kind = pick(rng, {"dense": 5, "pointwise": 2, "grouped": 1, "depthwise": 3})
        groups = {"grouped": rng.randint(2, 5), "depthwise": skewed(rng, 1, 70)}.get(kind, 1)
        wide = 1 if kind == "depthwise" else 20 if kind == "grouped" else 140
        multiplier = pick(rng, {1: 4, 2: 1, 3: 1})
        problem = dict(
            batch=pick(rng, {0: 1, 1: 10, 2: 10, 3: 4, 5: 1}),
            c_in=groups * skewed(rng, 1, wide),
            c_out=groups * (multiplier if kind == "depthwise" else skewed(rng, 1, wide)),
            size=[skewed(rng, 1, 40), skewed(rng, 1, 40)],
            kernel=[1, 1] if kind == "pointwise" else pick(rng, {(3, 3): 6, (5, 5): 2, (7, 7): 1, (2, 4): 1, (1, 5): 1}),
            stride=pick(rng, {(1, 1): 6, (2, 2): 3, (1, 3): 1, (4, 2): 1}),
            dilation=pick(rng, {(1, 1): 4, (2, 2): 4}) if rng.random() < 0.5 else [skewed(rng, 1, 24), skewed(rng, 1, 24)],
            padding=[skewed(rng, 0, 24), skewed(rng, 0, 24)],
            groups=groups,
            bias=rng.random() < 0.5,
            dtype=pick(rng, DTYPES),
            layouts=[pick(rng, LAYOUTS) for _ in range(3)],
            threads=rng.randint(1, 3),
            native=rng.random() < 0.5,  # the compiled op itself, or the Python op above it, which copies odd strides
            seed=rng.getrandbits(31),
        )
        if rng.random() < 0.4:  # as networks do: the output has the size of the input
            problem["padding"] = [d * (k // 2) for d, k in zip(problem["dilation"], problem["kernel"], strict=True)]
        spread = [d * (k - 1) + 1 for d, k in zip(problem["dilation"], problem["kernel"], strict=True)]
        fits = zip(problem["padding"], spread, problem["size"], strict=True)
        problem["padding"] = [max(p, (need - size + 1) // 2) for p, need, size in fits]
        products = problem["batch"] * problem["c_out"] * problem["c_in"] // groups
        for kernel, extent in zip(problem["kernel"], _conv_out(problem), strict=True):
            products *= kernel * extent
        if products < (2e7 if rng.random() < 0.02 else 1.5e6):
            return problem


def _conv_out(p: Problem) -> list[int]:
    return [out_extent(*a) for a in zip(p["size"], p["kernel"], p["stride"], p["padding"], p["dilation"], strict=True)]


def _conv_operands(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Input, weight, output gradient and bias."""
    return (
        integers(p["seed"], [p["batch"], p["c_in"], *p["size"]], p["dtype"], p["layouts"][0]),
        integers(p["seed"] + 1, [p["c_out"], p["c_in"] // p["groups"], *p["kernel"]], p["dtype"], p["layouts"][1]),
        integers(p["seed"] + 2, [p["batch"], p["c_out"], *_conv_out(p)], p["dtype"], p["layouts"][2]),
        integers(p["seed"] + 3, [p["c_out"]], p["dtype"], "contiguous") if p["bias"] else None,
    )


def run_conv2d(p: Problem) -> Results:
    x, w, g, b = _conv_operands(p)
    geometry = (p["stride"], p["padding"], p["dilation"], p["groups"])
    ops, backend = (torch.ops.atrous_native, ()) if p["native"] else (conv2d_ops, ("cpu",))
    true_x, true_w, true_g = x.double(), w.double(), g.double()
    yield (
        "conv2d",
        ops.conv2d(x, w, b, *geometry, *backend),
        conv2d_reference.conv2d(true_x, true_w, None if b is None else b.double(), *geometry),
        0.0,
    )
    yield (
        "conv2d_input",
        ops.conv2d_input(x.shape, w, g, *geometry, *backend),
        conv2d_reference.conv2d_input(x.shape, true_w, true_g, *geometry),
        0.0,
    )
    yield (
        "conv2d_weight",
        ops.conv2d_weight(x, w.shape, g, *geometry, *backend),
        conv2d_reference.conv2d_weight(true_x, w.shape, true_g, *geometry),
        0.0,
    )


# Winograd's algorithm ---------------------------------------------------------------------------------------------------


def draw_winograd(rng: Random) -> Problem:
    while True:
        problem = draw_conv2d(rng)
        if problem["kernel"] == (3, 3) and problem["stride"] == (1, 1):
            return problem | dict(dtype="float32", tile=rng.choice([2, 3, 4]))


def run_winograd(p: Problem) -> Results:
    x, w, g, b = _conv_operands(p)
    geometry = (p["stride"], p["padding"], p["dilation"], p["groups"])
    ops = torch.ops.atrous_native
    results = (
        ops.conv2d_winograd(x, w, None, b, *geometry, p["tile"]),
        ops.conv2d_input_winograd(x.shape, w, None, g, *geometry, p["tile"]),
        ops.conv2d_weight_winograd(x, w.shape, g, *geometry, p["tile"]),
    )
    # The transforms divide by 2 to 24, so sums round. Against sums of products of 9 at most, some ten units in the last place
    # (2**-24 each) times the norm of the transforms, which is below 20. One product too few or too many is at least 1.
    products = (9 * x.shape[1], 9 * w.shape[0], g.numel() // max(g.shape[1], 1))
    for (name, _, truth, _), ours, terms in zip(run_conv2d(p), results, products, strict=True):
        yield f"{name}_winograd", ours, truth, 1e-5 * 9 * max(terms, 1)


# pyramid_pool -----------------------------------------------------------------------------------------------------------


def draw_pyramid(rng: Random) -> Problem:
    levels = [[skewed(rng, 1, 9), skewed(rng, 1, 9)] for _ in range(skewed(rng, 1, 5))]
    return dict(
        size=[pick(rng, {0: 1, 1: 10, 2: 10}), skewed(rng, 1, 90), skewed(rng, 1, 40), skewed(rng, 1, 40)],
        bins=[size for level in levels for size in level] if rng.random() < 0.7 else [1, 1, 2, 2, 3, 3, 6, 6],
        maximum=rng.random() < 0.4,
        dtype=pick(rng, NO_HALF),
        layouts=[pick(rng, LAYOUTS), rng.choice(["contiguous", "sliced", "turned"])],
        channels_last=rng.random() < 0.5,
        threads=rng.randint(1, 3),
        seed=rng.getrandbits(31),
    )


def run_pyramid(p: Problem) -> Results:
    x = integers(p["seed"], p["size"], p["dtype"], p["layouts"][0])
    cells = sum(rows * columns for rows, columns in zip(p["bins"][::2], p["bins"][1::2], strict=True))
    g = integers(p["seed"] + 1, [x.shape[0], cells, x.shape[1]], p["dtype"], p["layouts"][1])
    ops = torch.ops.atrous
    pooled, index = ops.pyramid_pool(x, p["bins"], p["maximum"], "cpu")
    true_pooled, true_index = pyramid_reference.pyramid_pool(x.double(), p["bins"], p["maximum"])
    eps = torch.finfo(x.dtype).eps
    # An average is an exact sum, once divided: one unit in the last place of at most 3 from either rounding.
    yield "pyramid_pool", pooled, true_pooled, 0.0 if p["maximum"] else 6 * eps
    if p["maximum"]:
        yield "pyramid_pool index", index, true_index, 0.0
    rest = (list(x.shape), p["bins"], p["maximum"], p["channels_last"])
    truth = pyramid_reference.pyramid_pool_input(g.double(), true_index, *rest)
    # A pixel sums its shares, at most 3 each, of the bins over it (81 of a level at most), and rounds once to its own type.
    largest = truth.abs().max().item() if truth.numel() else 0.0
    tolerance = 0.0 if p["maximum"] else eps * largest + 3 * 81 * (len(p["bins"]) // 2) * 2**-24
    yield "pyramid_pool_input", ops.pyramid_pool_input(g, index, *rest, "cpu"), truth, tolerance


# upsample_cross_entropy and upsample_argmax -------------------------------------------------------------------------------


def draw_upsample(rng: Random) -> Problem:
    return dict(
        size=[pick(rng, {0: 1, 1: 10, 2: 10}), skewed(rng, 1, 40), skewed(rng, 1, 12), skewed(rng, 1, 12)],
        to=[skewed(rng, 1, 60), skewed(rng, 1, 60)],
        align_corners=rng.random() < 0.5,
        weighted=rng.random() < 0.5,
        reduction=rng.choice(["mean", "sum", "none"]),
        label_smoothing=rng.choice([0.0, 0.0, 0.1]),
        ignored=rng.choice([0.0, 0.2, 1.0]),
        dtype=rng.choice(["float32", "float64"]),
        layouts=[pick(rng, LAYOUTS)],
        threads=rng.randint(1, 3),
        seed=rng.getrandbits(31),
    )


def run_upsample(p: Problem) -> Results:
    logits = integers(p["seed"], p["size"], p["dtype"], p["layouts"][0])
    true_logits = logits.double().requires_grad_()
    z = F.interpolate(true_logits, size=p["to"], mode="bilinear", align_corners=p["align_corners"])
    # Positions round to 2**-24 of the map's size, and interpolate between neighbours at most 6 apart.
    eps = torch.finfo(logits.dtype).eps
    rounding = 64 * eps
    best = ak.upsample_argmax(logits, tuple(p["to"]), align_corners=p["align_corners"], backend="cpu")
    yield "upsample_argmax", z.detach().gather(1, best[:, None])[:, 0], z.detach().amax(1), rounding
    generator = torch.Generator().manual_seed(p["seed"] + 1)
    target = torch.randint(p["size"][1], (p["size"][0], *p["to"]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < p["ignored"]] = 255
    weight = torch.rand(p["size"][1], generator=generator, dtype=torch.float64) + 0.5 if p["weighted"] else None
    options = dict(ignore_index=255, reduction=p["reduction"], label_smoothing=p["label_smoothing"])
    ours_logits = logits.requires_grad_()
    ours = ak.upsample_cross_entropy(
        ours_logits,
        target,
        weight=None if weight is None else weight.to(logits.dtype),
        align_corners=p["align_corners"],
        backend="cpu",
        **options,
    )
    truth = F.cross_entropy(z, target, weight, **options)
    if p["reduction"] == "mean" and bool((target == 255).all()):  # nan on both sides, equal to nothing
        yield "loss", ours.isnan().double(), torch.ones((), dtype=torch.float64), 0.0
        return
    pixels = 1 if p["reduction"] != "sum" else max(target.numel(), 1)  # errors of up to one rounding each add up
    yield "loss", ours.detach(), truth.detach(), 8 * rounding * pixels
    (grad,), (true_grad,) = torch.autograd.grad(ours.sum(), ours_logits), torch.autograd.grad(truth.sum(), true_logits)
    yield "gradient", grad, true_grad, 8 * rounding * (1 if p["reduction"] == "mean" else max(target[:1].numel(), 1))


# conv_bn_relu -----------------------------------------------------------------------------------------------------------


def draw_conv_bn_relu(rng: Random) -> Problem:
    while True:
        problem = draw_conv2d(rng)
        values = problem["batch"] * _conv_out(problem)[0] * _conv_out(problem)[1]
        if values > 1:  # of a single value per channel there are no statistics
            changes = dict(dtype=rng.choice(["float32", "float64"]), bias=False, training=rng.random() < 0.6)
            return problem | changes | dict(activation=rng.choice(["relu", "relu6", "none"]), affine=rng.random() < 0.8)


def run_conv_bn_relu(p: Problem) -> Results:
    x, w, g, _ = _conv_operands(p)
    generator = torch.Generator().manual_seed(p["seed"] + 4)
    scale, shift, mean, var = (torch.rand(p["c_out"], generator=generator, dtype=torch.float64) + 0.5 for _ in range(4))
    norm = [scale, shift - 1, 9 * mean - 9, var] if p["affine"] else [None, None, 9 * mean - 9, var]
    names = ("stride", "padding", "dilation", "groups")
    geometry = {name: tuple(p[name]) if name != "groups" else p[name] for name in names}
    results = []
    for dtype in (x.dtype, torch.float64):
        leaves = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        rest = [None if each is None else each.to(dtype, copy=True) for each in norm]
        if dtype is torch.float64 and results:
            conv = F.conv2d(*leaves, None, **geometry)
            out = F.batch_norm(conv, rest[2], rest[3], *rest[:2], p["training"])
            out = {"relu": out.relu(), "relu6": F.relu6(out), "none": out}[p["activation"]]
        else:
            options = dict(training=p["training"], activation=p["activation"], backend="cpu")
            out = ak.conv_bn_relu(*leaves, *rest, **geometry, **options)
        results.append([out.detach(), rest[2], rest[3], *torch.autograd.grad(out, leaves, g.to(dtype))])
    ours, truth = results
    # Rounding of the mean is magnified by the inverse deviation, which is at most eps**-0.5 = 316 where a channel is constant.
    inverse = (conv.var((0, 2, 3), correction=0).min() + 1e-5).rsqrt().item() if p["training"] else 1.5
    rounding = 32 * torch.finfo(x.dtype).eps * (1 + conv.abs().max().item()) * (1 + inverse)
    yield "output", ours[0], truth[0], rounding
    yield "running_mean", ours[1], truth[1], rounding
    yield "running_var", ours[2], truth[2], rounding * (1 + conv.abs().max().item())
    if x.dtype is torch.float64:  # in fp32 a value may round across the activation's edge, and its whole gradient with it
        for name, at in (("grad_input", 3), ("grad_weight", 4)):
            yield name, ours[at], truth[at], 1e-8 * (1 + truth[at].abs().max().item())


OPS = {
    "conv2d": Op(draw_conv2d, run_conv2d),
    "conv2d_winograd": Op(draw_winograd, run_winograd),
    "conv_bn_relu": Op(draw_conv_bn_relu, run_conv_bn_relu),
    "pyramid_pool": Op(draw_pyramid, run_pyramid),
    "upsample": Op(draw_upsample, run_upsample),
}


# Running ----------------------------------------------------------------------------------------------------------------


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


def _record(path: Path, outcome: dict[str, Any]) -> None:
    """Adds an outcome to the file, in place of an earlier one of the same op and instruction set."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [run for run in runs if (run["op"], run["isa"]) != (outcome["op"], outcome["isa"])]
    path.write_text(json.dumps({"runs": sorted([*runs, outcome], key=lambda run: (run["op"], run["isa"]))}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", choices=[*OPS, "all"], default="all")
    parser.add_argument("--problems", type=int, default=1000, help="per op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first problem")
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
            _record(args.json, _outcome(op, args.problems, args.seed, len(lines), seconds))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
