"""domain_transform and its gradient."""

from __future__ import annotations

from random import Random

import torch

from atrous_kernels.reference import domain_transform as reference
from tests.fuzzed.draws import LAYOUTS, Problem, Results, integers, largest, pick, skewed


def draw_transform(rng: Random) -> Problem:
    return dict(
        size=[pick(rng, {0: 1, 1: 10, 2: 10}), skewed(rng, 1, 40), skewed(rng, 1, 60), skewed(rng, 1, 90)],
        dtype=pick(rng, {"float32": 4, "float64": 1, "bfloat16": 1, "float16": 1}),
        layouts=[pick(rng, LAYOUTS) for _ in range(3)],
        numbers=[rng.choice([0.5, 3.0, 20.0, 60.0]), rng.choice([0.5, 3.0, 20.0]), skewed(rng, 1, 4)],
        threads=rng.randint(1, 3),
        seed=rng.getrandbits(31),
    )


def run_transform(p: Problem) -> Results:
    n, _, h, w = p["size"]
    x, grad = (integers(p["seed"] + i, p["size"], p["dtype"], p["layouts"][i]) for i in range(2))
    exact = "float64" if p["dtype"] == "float64" else "float32"
    edge = integers(p["seed"] + 2, [n, 2, h, w], exact, p["layouts"][2]).abs()
    out = torch.ops.atrous.domain_transform(x, edge, *p["numbers"], "cpu")
    truth = reference.domain_transform(x.double(), edge.double(), *p["numbers"])
    # A recursion forgets a rounding error of a value of up to 3 after some 30 positions; the result is rounded once more.
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(edge.dtype).eps
    yield "domain_transform", out, truth, 3 * (eps + 100 * tiny)
    ours = torch.ops.atrous.domain_transform_backward(grad, x, edge, *p["numbers"], "cpu")
    truths = reference.domain_transform_backward(grad.double(), x.double(), edge.double(), *p["numbers"])
    for name, a, b, rounding in zip(("input", "edge"), ours, truths, (eps, tiny), strict=True):
        yield f"domain_transform gradient of {name}", a, b, max(largest(b), 3.0) * (rounding + 100 * tiny)
