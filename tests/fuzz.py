"""Random problems with exact answers: ``python -m tests.fuzz --op conv2d --problems 10000 --seed 0``.

Inputs are small integers, so every product and every sum of a convolution is exact in the accumulator whatever its order,
and the result is that sum rounded once: any difference from the float64 reference is a bug. Other ops draw numbers that stay
exact through them (upsampling by 2 and 4, normalisation by powers of two) as often as others, which get a tolerance, with its
reason. Results and scratch start as NaN.
A mismatch prints the command that repeats it alone. Another op is one more entry in ``OPS``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
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


def largest(tensor: Tensor) -> float:
    """The largest absolute value, 0 of an empty tensor."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def integers(seed: int, sizes: list[int], dtype: str, layout: str) -> Tensor:
    """Integers in [-3, 3] laid out as asked; elements around a view are NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, sizes, generator=generator).to(getattr(torch, dtype))
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
    tolerance = 0.0 if p["maximum"] else eps * largest(truth) + 3 * 81 * (len(p["bins"]) // 2) * 2**-24
    yield "pyramid_pool_input", ops.pyramid_pool_input(g, index, *rest, "cpu"), truth, tolerance


# Upsampling -------------------------------------------------------------------------------------------------------------


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


# upsample_concat and psp_conv -------------------------------------------------------------------------------------------


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


def with_gradients(call: Callable[..., Tensor], operands: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result of ``call`` and its gradients in all operands."""
    leaves = [each.detach().requires_grad_() for each in operands]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def in_float64(call: Callable[..., Tensor], operands: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The same of the framework, whose convolution has no gradients for some strides."""
    return with_gradients(call, [each.double().contiguous() for each in operands], grad.double().contiguous())


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


# conv_bn_relu and aspp --------------------------------------------------------------------------------------------------


def draw_norm(rng: Random) -> Problem:
    """Exact: inference by powers of two, eps 0, so that integers stay exact through it."""
    exact = rng.random() < 0.4
    training = not exact and rng.random() < 0.7
    return dict(
        exact=exact,
        training=training,
        gradients=rng.random() < 0.7,  # without them inference normalises in place; with them it folds the weights
        affine=rng.random() < 0.8,
        dtype=pick(rng, NO_HALF) if exact else rng.choice(["float32", "float64"]),
    )


def norm_of(p: Problem, seed: int, channels: int) -> list[Tensor | None]:
    """Scale, shift, running mean and variance in float64."""
    generator = torch.Generator().manual_seed(seed)
    if p["exact"]:
        shift, mean = (torch.randint(-3, 4, (channels,), generator=generator).double() for _ in range(2))
        scale, var = (4.0 ** torch.randint(-1, 2, (channels,), generator=generator).double() for _ in range(2))
        scale = scale.sqrt() * torch.where(shift > 1, -1, 1)
    else:
        scale, shift, mean, var = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5 for _ in range(4))
        shift, mean = shift - 1, 9 * mean - 9
    return [scale, shift, mean, var] if p["affine"] else [None, None, mean, var]


def to_dtype(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if each is None else each.to(dtype, copy=True) for each in tensors]


def normalised(z: Tensor, norm: list[Tensor | None], training: bool, eps: float) -> Tensor:
    """Batch normalisation in plain operations; training moves the running statistics by a tenth.

    The framework's own gives variances of long float64 sums to 13 digits only, and for some strides wrong gradients.
    """
    scale, shift, mean, var = norm
    if training:
        running, count = (mean, var), z.numel() // z.shape[1]
        mean = z.mean((0, 2, 3))
        var = (z - mean[:, None, None]).square().mean((0, 2, 3))
        for old, new in zip(running, (mean, var * (count / (count - 1))), strict=True):
            if old is not None:
                old.lerp_(new.detach(), 0.1)
    y = (z - mean[:, None, None]) * (var + eps).rsqrt()[:, None, None]
    return y if scale is None else y * scale[:, None, None] + shift[:, None, None]


def inverse_deviation(z: Tensor) -> float:
    """The largest over channels: rounding of a mean is magnified by it, by 1e-5**-0.5 = 316 where a channel is constant."""
    return (z.var((0, 2, 3), correction=0).min() + 1e-5).rsqrt().item()


def draw_conv_bn_relu(rng: Random) -> Problem:
    while True:
        problem = draw_conv2d(rng)
        values = problem["batch"] * _conv_out(problem)[0] * _conv_out(problem)[1]
        if values > 1:  # of a single value per channel there are no statistics
            changes = dict(bias=False, activation=rng.choice(["relu", "relu6", "none"]), running=rng.random() < 0.8)
            return problem | changes | draw_norm(rng)


def run_conv_bn_relu(p: Problem) -> Results:
    x, w, g, _ = _conv_operands(p)
    norm = norm_of(p, p["seed"] + 4, p["c_out"])
    if p["training"] and not p["running"]:
        norm[2:] = None, None
    eps = 0.0 if p["exact"] else 1e-5
    geometry = {name: tuple(p[name]) if name != "groups" else p[name] for name in ("stride", "padding", "dilation", "groups")}
    ours_norm, true_norm = to_dtype(norm, x.dtype), to_dtype(norm, torch.float64)
    between: list[Tensor] = []

    def ours(x: Tensor, w: Tensor) -> Tensor:
        options = dict(training=p["training"], activation=p["activation"], eps=eps, backend="cpu")
        return ak.conv_bn_relu(x, w, *ours_norm, **geometry, **options)

    def framework(true_x: Tensor, true_w: Tensor) -> Tensor:
        z = F.conv2d(true_x, true_w, None, **geometry)
        between.append(z.detach())
        if not p["gradients"]:  # the convolution's output is a tensor of the type
            z = z.to(x.dtype).double()
        out = normalised(z, true_norm, p["training"], eps)
        return {"relu": out.relu(), "relu6": F.relu6(out), "none": out}[p["activation"]]

    if p["gradients"]:
        results = with_gradients(ours, [x, w], g)
        truths = in_float64(framework, [x, w], g)
    else:
        with torch.no_grad():
            results, truths = [ours(x, w)], [framework(x.double(), w.double())]
    if p["exact"]:
        for name, mine, truth in zip(("output", "grad_input", "grad_weight"), results, truths, strict=False):
            yield name, mine, truth, 0.0
        return
    size = 1 + largest(between[0])
    rounding = 32 * torch.finfo(x.dtype).eps * size * (1 + (inverse_deviation(between[0]) if p["training"] else 1.5))
    yield "output", results[0], truths[0], rounding
    for name, at, tolerance in (("running_mean", 2, rounding), ("running_var", 3, rounding * size)):
        if ours_norm[at] is not None:
            yield name, ours_norm[at], true_norm[at], tolerance if p["training"] else 0.0
    # A value that rounds across the activation's edge takes its whole gradient with it: in fp32, and where an integer equals the
    # mean, on which the edge lies without a shift.
    on_edge = p["training"] and not p["affine"] and p["activation"] != "none"
    if x.dtype is torch.float64 and not on_edge:
        for name, mine, truth in zip(("grad_input", "grad_weight"), results[1:], truths[1:], strict=False):
            yield name, mine, truth, 1e-8 * (1 + largest(truth))


def draw_aspp(rng: Random) -> Problem:
    def layer(kernel: tuple[int, int], rate: int = 1) -> Problem:
        return dict(width=skewed(rng, 1, 12), kernel=kernel, dilation=(rate, rate))

    kernels = {(1, 1): 2, (3, 3): 4, (5, 3): 1}
    layers = [layer(pick(rng, kernels), skewed(rng, 1, 12)) for _ in range(skewed(rng, 1, 4))]
    pooling = rng.random() < 0.5
    problem = draw_norm(rng) | dict(
        size=[pick(rng, {0: 1, 1: 6, 2: 10, 3: 3}), skewed(rng, 1, 16), skewed(rng, 1, 16), skewed(rng, 1, 16)],
        layers=[*layers, *([layer((1, 1))] if pooling else []), layer((1, 1))],  # the last is the projection
        pooling=pooling,
        affine=True,  # without shifts, a channel that is constant lies on the edge of its ReLU
        layouts=[pick(rng, LAYOUTS) for _ in range(3)],
        threads=rng.randint(1, 3),
        seed=rng.getrandbits(31),
    )
    if problem["dtype"] == "bfloat16":  # which would round the sum after every branch
        problem["dtype"] = "float32"
    if problem["exact"]:  # so that the mean of an image is exact as well
        problem["size"][2:] = [2 ** rng.randint(0, 3), 2 ** rng.randint(0, 3)]
    if problem["training"]:  # a single value per channel has no statistics
        problem["size"][0] = max(problem["size"][0], 2)
    return problem


def run_aspp(p: Problem) -> Results:
    *branches, last = p["layers"]
    width = sum(branch["width"] for branch in branches)
    x = integers(p["seed"], p["size"], p["dtype"], p["layouts"][0])
    g = integers(p["seed"] + 1, [p["size"][0], last["width"], *p["size"][2:]], p["dtype"], p["layouts"][1])
    shapes = [*([one["width"], x.shape[1], *one["kernel"]] for one in branches), [last["width"], width, 1, 1]]
    weights = [integers(p["seed"] + 2 + i, shape, p["dtype"], p["layouts"][2]) for i, shape in enumerate(shapes)]
    norms = [norm_of(p, p["seed"] + 10 + i, one["width"]) for i, one in enumerate(p["layers"])]
    ours_norms, true_norms = ([to_dtype(norm, dtype) for norm in norms] for dtype in (x.dtype, torch.float64))
    eps = 0.0 if p["exact"] else 1e-5
    between: list[Tensor] = []

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        *parallel, projection = (
            ak.ConvBN(weight, *norm, dilation=one["dilation"], training=p["training"], eps=eps)
            for weight, norm, one in zip(weights, ours_norms, p["layers"], strict=True)
        )
        pooling = parallel.pop() if p["pooling"] else None
        return ak.aspp(x, parallel, projection, pooling, backend="cpu")

    def layer(x: Tensor, weight: Tensor, norm: list[Tensor | None], one: Problem) -> Tensor:
        padding = [rate * (size // 2) for rate, size in zip(one["dilation"], one["kernel"], strict=True)]
        z = F.conv2d(x, weight, None, 1, padding, one["dilation"])
        between.append(z.detach())
        return normalised(z, norm, p["training"], eps).relu()

    def framework(x: Tensor, *weights: Tensor) -> Tensor:
        sources = [x] * len(branches)
        if p["pooling"]:
            sources[-1] = x.mean((2, 3), keepdim=True)
        maps = [layer(*one).expand(-1, -1, *x.shape[2:]) for one in zip(sources, weights, true_norms, branches, strict=False)]
        return layer(torch.cat(maps, 1), weights[-1], true_norms[-1], last)

    operands = [x, *weights]
    if p["gradients"]:
        results, truths = with_gradients(ours, operands, g), in_float64(framework, operands, g)
    else:
        with torch.no_grad():
            results, truths = [ours(*operands)], [framework(*(each.double() for each in operands))]
    names = ["output", "grad_input", *(f"grad_weight {i}" for i in range(len(weights)))]
    if p["exact"]:
        for name, mine, truth in zip(names, results, truths, strict=False):
            yield name, mine, truth, 0.0
        return
    # As conv_bn_relu, twice: errors of the branches' channels add up through weights of at most 3.
    *inside, outside = (1 + largest(z) for z in between)
    *first, second = (1 + (inverse_deviation(z) if p["training"] else 1.5) for z in between)
    rounding = 4 * torch.finfo(x.dtype).eps * (max(inside) * max(first) * 3 * width + outside) * second
    yield "output", results[0], truths[0], rounding
    for index, (mine, truth) in enumerate(zip(ours_norms, true_norms, strict=True)):
        yield f"running_mean {index}", mine[2], truth[2], rounding if p["training"] else 0.0
        yield f"running_var {index}", mine[3], truth[3], rounding * max(*inside, outside) if p["training"] else 0.0
    if x.dtype is torch.float64:  # in fp32 a value may round across a ReLU's edge, and its whole gradient with it
        for name, mine, truth in zip(names[1:], results[1:], truths[1:], strict=False):
            yield name, mine, truth, 1e-8 * (1 + largest(truth))


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
