"""upsample_concat and psp_conv."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from tests.fuzzed.draws import (
    LAYOUTS,
    NO_HALF,
    Problem,
    Results,
    in_float64,
    integers,
    largest,
    pick,
    skewed,
    with_gradients,
)
from tests.fuzzed.upsample import draw_extents


def draw_concat(rng: Random) -> Problem:
    dyadic, align_corners, levels = rng.random() < 0.5, rng.random() < 0.5, skewed(rng, 0, 4)
    (height, rows), (width, columns) = (draw_extents(rng, levels, align_corners, dyadic) for _ in range(2))
    return dict(
        size=[pick(rng, {0: 1, 1: 10, 2: 10}), skewed(rng, 1, 40), height, width],
        levels=[[skewed(rng, 1, 20), *grid] for grid in zip(rows, columns, strict=True)],
        align_corners=align_corners,
        dyadic=dyadic,
        dtype=pick(rng, NO_HALF),
        layouts=[pick(rng, LAYOUTS) for _ in range(4)],
        threads=rng.randint(1, 3),
        seed=rng.getrandbits(31),
    )


def draw_psp_conv(rng: Random) -> Problem:
    return draw_concat(rng) | dict(
        out_channels=skewed(rng, 1, 12), kernel=[rng.choice([1, 3, 5]), rng.choice([1, 3, 3, 5])], bias=rng.random() < 0.5
    )


def _concat_operands(p: Problem) -> list[Tensor]:
    """The map and its levels."""
    sizes = [p["size"], *([p["size"][0], *level] for level in p["levels"])]
    return [integers(p["seed"] + i, size, p["dtype"], p["layouts"][min(i, 1)]) for i, size in enumerate(sizes)]


def _framework_concat(p: Problem, x: Tensor, *levels: Tensor) -> Tensor:
    up = [F.interpolate(level, p["size"][2:], mode="bilinear", align_corners=p["align_corners"]) for level in levels]
    return torch.cat([x, *up], 1)


def against_float64(p: Problem, ours: Callable[..., Tensor], framework: Callable[..., Tensor], operands: list[Tensor]) -> Results:
    """Result and gradients of linear maps beside the framework's in float64: to the bit where nothing rounds in between."""
    with torch.no_grad():
        shape = framework(*operands).shape
    g = integers(p["seed"] + 9, list(shape), p["dtype"], p["layouts"][3])
    results, truth = with_gradients(ours, operands, g), in_float64(framework, operands, g)
    # Of absolute values nothing cancels: every rounding, of interpolation weights, of a map between two steps, of the result, is
    # relative to sums no larger than these. Sums of fp32 are long; those of bf16 are made in fp32 and rounded a few times.
    sums = in_float64(framework, [each.abs() for each in operands], g.abs())
    rounded = 64 if p["dtype"] != "bfloat16" else 4
    for index, (mine, exact, size) in enumerate(zip(results, truth, sums, strict=True)):
        once = p["dyadic"] and p["dtype"] != "bfloat16"
        tolerance = 0.0 if once else rounded * torch.finfo(mine.dtype).eps * largest(size)
        yield f"gradient {index - 1}" if index else "result", mine, exact, tolerance


def run_concat(p: Problem) -> Results:
    def ours(x: Tensor, *levels: Tensor) -> Tensor:
        return ak.upsample_concat(x, levels, align_corners=p["align_corners"], backend="cpu")

    yield from against_float64(p, ours, partial(_framework_concat, p), _concat_operands(p))


def run_psp_conv(p: Problem) -> Results:
    maps = _concat_operands(p)
    channels = sum(each.shape[1] for each in maps)
    weight = integers(p["seed"] + 6, [p["out_channels"], channels, *p["kernel"]], p["dtype"], p["layouts"][2])
    bias = [integers(p["seed"] + 7, [p["out_channels"]], p["dtype"], "contiguous")] if p["bias"] else []

    def ours(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        split = len(bias)
        return ak.psp_conv(x, rest[split:], weight, *rest[:split], align_corners=p["align_corners"], backend="cpu")

    def framework(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        split = len(bias)
        whole = _framework_concat(p, x, *rest[split:])
        return F.conv2d(whole, weight, *rest[:split], padding=[size // 2 for size in p["kernel"]])

    yield from against_float64(p, ours, framework, [maps[0], weight, *bias, *maps[1:]])
