"""upsample_argmax and upsample_cross_entropy."""

from __future__ import annotations

import math
from random import Random

import torch
import torch.nn.functional as F

import atrous_kernels as ak
from tests.fuzzed.draws import DTYPES, LAYOUTS, Problem, Results, integers, largest, pick, skewed


def draw_extents(rng: Random, levels: int, align_corners: bool, dyadic: bool) -> tuple[int, list[int]]:
    """Along one axis, the extent of the large map and those of the small ones.

    Dyadic: large by 1, 2 or 4 times, so that interpolation weights are multiples of 1/8 and integers interpolate exactly.
    """
    if not dyadic:
        return skewed(rng, 1, 40), [skewed(rng, 1, 12) for _ in range(levels)]
    steps = 4 * skewed(rng, 1, 8)
    return steps + align_corners, [steps // rng.choice([1, 2, 4]) + align_corners for _ in range(levels)]


def draw_upsample(rng: Random, dyadic: bool) -> Problem:
    align_corners = rng.random() < 0.5
    (height, (rows,)), (width, (columns,)) = (draw_extents(rng, 1, align_corners, dyadic) for _ in range(2))
    return dict(
        size=[pick(rng, {0: 1, 1: 10, 2: 10}), skewed(rng, 1, 40), rows, columns],
        to=[height, width],
        align_corners=align_corners,
        dtype=pick(rng, DTYPES),
        layouts=[pick(rng, LAYOUTS)],
        threads=rng.randint(1, 3),
        seed=rng.getrandbits(31),
    )


def accumulator_eps(dtype: torch.dtype) -> float:
    """Rounding inside an op that reads ``dtype``: 16-bit types are computed in fp32."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps


# Positions round to eps times the small map's extent, and interpolate between neighbours at most 6 apart.
INTERPOLATION = 64


# upsample_argmax --------------------------------------------------------------------------------------------------------


def draw_argmax(rng: Random) -> Problem:
    dyadic = rng.random() < 0.5
    return draw_upsample(rng, dyadic) | dict(dyadic=dyadic)


def run_argmax(p: Problem) -> Results:
    logits = integers(p["seed"], p["size"], p["dtype"], p["layouts"][0])
    z = F.interpolate(logits.double(), size=p["to"], mode="bilinear", align_corners=p["align_corners"])
    best = ak.upsample_argmax(logits, tuple(p["to"]), align_corners=p["align_corners"], backend="cpu")
    if p["dyadic"]:  # nothing rounds: of equal logits, and small integers give many, it must be the first
        yield "upsample_argmax", best, z.argmax(1), 0.0
    yield "upsample_argmax", z.gather(1, best[:, None])[:, 0], z.amax(1), INTERPOLATION * accumulator_eps(logits.dtype)


# upsample_cross_entropy -------------------------------------------------------------------------------------------------


def draw_cross_entropy(rng: Random) -> Problem:
    problem = draw_upsample(rng, dyadic=rng.random() < 0.3) | dict(
        weighted=rng.random() < 0.5,
        reduction=rng.choice(["mean", "sum", "none"]),
        label_smoothing=rng.choice([0.0, 0.0, 0.1]),
        ignored=rng.choice([0.0, 0.2, 1.0]),
        labels=rng.choice(["int64", "int32", "uint8"]),
        hard_fraction=1.0,
    )
    if rng.random() < 0.25:  # of pixels with equal losses, which are kept shows in a weighted mean
        problem |= dict(hard_fraction=rng.choice([0.25, 0.5]), reduction=rng.choice(["mean", "sum"]))
        problem["weighted"] &= problem["reduction"] == "sum"
    return problem


def run_cross_entropy(p: Problem) -> Results:
    logits = integers(p["seed"], p["size"], p["dtype"], p["layouts"][0])
    true_logits = logits.double().requires_grad_()
    z = F.interpolate(true_logits, size=p["to"], mode="bilinear", align_corners=p["align_corners"])
    rounding = INTERPOLATION * accumulator_eps(logits.dtype)
    generator = torch.Generator().manual_seed(p["seed"] + 1)
    target = torch.randint(p["size"][1], (p["size"][0], *p["to"]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < p["ignored"]] = 255
    weight = torch.rand(p["size"][1], generator=generator, dtype=torch.float64) + 0.5 if p["weighted"] else None
    options = dict(ignore_index=255, label_smoothing=p["label_smoothing"])
    ours_logits = logits.requires_grad_()
    ours = ak.upsample_cross_entropy(
        ours_logits,
        target.to(getattr(torch, p["labels"])),
        weight=None if weight is None else weight.to(torch.float64 if logits.dtype is torch.float64 else torch.float32),
        reduction=p["reduction"],
        hard_fraction=p["hard_fraction"],
        align_corners=p["align_corners"],
        backend="cpu",
        **options,
    )
    if p["reduction"] == "mean" and bool((target == 255).all()):  # nan on both sides, equal to nothing
        yield "loss", ours.isnan().double(), torch.ones((), dtype=torch.float64), 0.0
        return
    if p["hard_fraction"] < 1:
        losses = F.cross_entropy(z, target, weight, reduction="none", **options)[target != 255]
        hardest = losses.topk(math.ceil(p["hard_fraction"] * len(losses))).values
        truth = hardest.mean() if p["reduction"] == "mean" else hardest.sum()
    else:
        truth = F.cross_entropy(z, target, weight, reduction=p["reduction"], **options)
    pixels = 1 if p["reduction"] != "sum" else max(target.numel(), 1)  # errors of up to one rounding each add up
    yield "loss", ours.detach(), truth.detach(), 8 * rounding * pixels
    if p["hard_fraction"] == 1:  # the kept pixels of a tie have the same loss but not the same gradient
        (grad,), (true_grad,) = torch.autograd.grad(ours.sum(), ours_logits), torch.autograd.grad(truth.sum(), true_logits)
        # Per small pixel the errors of those large ones that it is interpolated to.
        extents = zip(p["size"][2:], p["to"], strict=True)
        pixels = math.prod(min(large, 2 * large // max(small - 1, 1) + 2) for small, large in extents)
        inside = 8 * rounding * (1 if p["reduction"] == "mean" else pixels)
        yield "gradient", grad, true_grad, inside + torch.finfo(grad.dtype).eps * largest(true_grad)
