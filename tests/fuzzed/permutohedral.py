"""permutohedral_lattice, permutohedral_filter with its gradients, and mean_field."""

from __future__ import annotations

from random import Random

import torch

import atrous_kernels as ak
from tests.fuzzed.draws import LAYOUTS, Problem, Results, integers, largest, pick, skewed


def draw_permutohedral(rng: Random) -> Problem:
    batch, height, width = pick(rng, {0: 1, 1: 10, 2: 6}), skewed(rng, 1, 24), skewed(rng, 1, 24)
    return dict(
        features=[batch, rng.randint(1, 6), height, width],
        values=[batch, skewed(rng, 1, 70), height, width],
        spread=rng.choice([0.02, 0.3, 3.0]),
        dtype=pick(rng, {"float32": 3, "float64": 1}),
        layouts=[pick(rng, LAYOUTS) for _ in range(3)],
        normalization=rng.choice(["symmetric", "before", "after", "none"]),
        full=rng.random() < 0.5,
        iterations=rng.randint(0, 3),
        threads=rng.randint(1, 3),
        seed=rng.getrandbits(31),
    )


def run_permutohedral(p: Problem) -> Results:
    # Integers times a factor: many points lie in the same place, and some on the border of two simplices.
    features = integers(p["seed"], p["features"], p["dtype"], p["layouts"][0]) * p["spread"]
    values = integers(p["seed"] + 1, p["values"], p["dtype"], p["layouts"][1])
    grad = integers(p["seed"] + 2, p["values"], p["dtype"], p["layouts"][2])
    eps = torch.finfo(features.dtype).eps
    ours, truth = (ak.permutohedral_lattice(features, backend=backend) for backend in ("cpu", "reference"))
    for name, a, b in zip(ours._fields, ours, truth, strict=True):
        # The integers agree exactly; a weight is a difference of coordinates, each 12 times the features at most.
        yield f"lattice {name}", a, b, 400 * p["spread"] * eps if a.is_floating_point() else 0.0

    def with_gradients(backend: str) -> list[torch.Tensor]:
        x, f = values.detach().requires_grad_(), features.detach().requires_grad_()
        out = ak.permutohedral_filter(x, f, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, [x, f], grad)]

    # Every term is rounded a few times, and its weight as above; sums are of at most 600 points and 64 channels.
    for name, a, b in zip(
        ("output", "of values", "of features"), with_gradients("cpu"), with_gradients("reference"), strict=True
    ):
        yield name, a, b, (100 + 400 * p["spread"]) * eps * max(largest(b), 64.0) * 16

    channels = values.shape[1]
    factors = integers(p["seed"] + 3, [channels, channels], p["dtype"], "contiguous")
    # Without the responses the sums are in the hundreds, and a softmax of such differences passes any error on.
    weight = 0.1 / max(values[0, 0].numel() if len(values) else 1, 1) if p["normalization"] in ("none", "before") else 0.1
    compatibility = weight * (factors + factors.T if p["full"] else factors.diagonal().clone())
    marginals = [
        ak.mean_field(values, [lattice], [compatibility], p["iterations"], normalization=p["normalization"], backend=backend)
        for lattice, backend in ((ours, "cpu"), (ours, "reference"))
    ]
    yield "mean_field", *marginals, (100 + 400 * p["spread"]) * eps * 16
