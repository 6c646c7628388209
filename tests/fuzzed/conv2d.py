"""conv2d and its two gradients, by the direct kernels and by Winograd's algorithm."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from atrous_kernels.ops import conv2d as conv2d_ops
from atrous_kernels.problem import out_extent
from atrous_kernels.reference import conv2d as conv2d_reference
from tests.fuzzed.draws import DTYPES, LAYOUTS, Problem, Results, integers, pick, skewed


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
        for kernel, extent in zip(problem["kernel"], conv_out(problem), strict=True):
            products *= kernel * extent
        if products < (2e7 if rng.random() < 0.02 else 1.5e6):
            return problem


def conv_out(p: Problem) -> list[int]:
    return [out_extent(*a) for a in zip(p["size"], p["kernel"], p["stride"], p["padding"], p["dilation"], strict=True)]


def conv_operands(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Input, weight, output gradient and bias."""
    return (
        integers(p["seed"], [p["batch"], p["c_in"], *p["size"]], p["dtype"], p["layouts"][0]),
        integers(p["seed"] + 1, [p["c_out"], p["c_in"] // p["groups"], *p["kernel"]], p["dtype"], p["layouts"][1]),
        integers(p["seed"] + 2, [p["batch"], p["c_out"], *conv_out(p)], p["dtype"], p["layouts"][2]),
        integers(p["seed"] + 3, [p["c_out"]], p["dtype"], "contiguous") if p["bias"] else None,
    )


def run_conv2d(p: Problem) -> Results:
    x, w, g, b = conv_operands(p)
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
    x, w, g, b = conv_operands(p)
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
