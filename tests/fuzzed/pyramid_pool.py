"""pyramid_pool and its gradient."""

from __future__ import annotations

from random import Random

import torch

from atrous_kernels.reference import pyramid_pool as pyramid_reference
from tests.fuzzed.draws import LAYOUTS, NO_HALF, Problem, Results, integers, largest, pick, skewed


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
    tolerance = 0.0 if p["maximum"] else eps * largest(truth) + 3 * 81 * (len(p["bins"]) // 2) * 2**-24
    yield "pyramid_pool_input", ops.pyramid_pool_input(g, index, *rest, "cpu"), truth, tolerance
