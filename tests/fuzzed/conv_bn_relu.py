"""conv_bn_relu, and the normalisation that aspp shares with it."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels.ops import winograd
from atrous_kernels.ops.conv2d import problem_of
from atrous_kernels.ops.conv_bn_act import conv_bn_act
from tests.fuzzed.conv2d import conv_operands, conv_out, draw_conv2d
from tests.fuzzed.draws import NO_HALF, Problem, Results, in_float64, integers, largest, pick, with_gradients


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
        values = problem["batch"] * conv_out(problem)[0] * conv_out(problem)[1]
        if values > 1:  # of a single value per channel there are no statistics
            changes = dict(bias=False, activation=rng.choice(["relu", "relu6", "none"]), running=rng.random() < 0.8)
            return problem | changes | dict(residual=rng.random() < 0.3) | draw_norm(rng)


def run_conv_bn_relu(p: Problem) -> Results:
    x, w, g, _ = conv_operands(p)
    operands = [x, w]
    if p["residual"]:
        operands.append(integers(p["seed"] + 5, list(g.shape), p["dtype"], p["layouts"][0]))
    norm = norm_of(p, p["seed"] + 4, p["c_out"])
    if p["training"] and not p["running"]:
        norm[2:] = None, None
    eps = 0.0 if p["exact"] else 1e-5
    geometry = {name: tuple(p[name]) if name != "groups" else p[name] for name in ("stride", "padding", "dilation", "groups")}
    ours_norm, true_norm = to_dtype(norm, x.dtype), to_dtype(norm, torch.float64)
    between: list[Tensor] = []

    def ours(x: Tensor, w: Tensor, residual: Tensor | None = None) -> Tensor:
        options = dict(training=p["training"], activation=p["activation"], eps=eps, residual=residual, backend="cpu")
        return ak.conv_bn_relu(x, w, *ours_norm, **geometry, **options)

    def framework(true_x: Tensor, true_w: Tensor, residual: Tensor | None = None) -> Tensor:
        z = F.conv2d(true_x, true_w, None, **geometry)
        between.append(z.detach())
        y = normalised(z, true_norm, p["training"], eps)
        if residual is not None:  # bf16 adds it to the rounded result
            y = y.to(x.dtype).double() + residual
        return {"relu": y.relu(), "relu6": F.relu6(y), "none": y}[p["activation"]]

    if p["gradients"]:
        results, truths = with_gradients(ours, operands, g), in_float64(framework, operands, g)
    else:
        with torch.no_grad():
            results, truths = [ours(*operands)], [framework(*(each.double() for each in operands))]
    problem = problem_of(x.shape, w.shape, tuple(geometry.values()), x, False)
    if not p["training"] and not p["gradients"] and winograd.can_run(problem) is None:
        residual = operands[2] if p["residual"] else None
        finished = conv_bn_act(x, w, *ours_norm, residual, eps, p["activation"], *geometry.values(), "winograd")
        # As conv2d_winograd, times a scale of 4 at most.
        yield "output by Winograd's algorithm", finished, truths[0], 4e-5 * 9 * 9 * p["c_in"]
    names = ("output", "grad_input", "grad_weight", "grad_residual")
    if p["exact"]:
        for name, mine, truth in zip(names, results, truths, strict=False):
            yield name, mine, truth, 0.0
        return
    size = 4 + largest(between[0])
    rounding = 32 * torch.finfo(x.dtype).eps * size * (1 + (inverse_deviation(between[0]) if p["training"] else 1.5))
    yield "output", results[0], truths[0], rounding
    for name, at, tolerance in (("running_mean", 2, rounding), ("running_var", 3, rounding * size)):
        if ours_norm[at] is not None:
            yield name, ours_norm[at], true_norm[at], tolerance if p["training"] else 0.0
    # A value that rounds across the activation's edge takes its whole gradient with it: in fp32, and where an integer equals the
    # mean, on which the edge lies without a shift.
    on_edge = p["training"] and not p["affine"] and p["activation"] != "none"
    if x.dtype is torch.float64 and not on_edge:
        for name, mine, truth in zip(names[1:], results[1:], truths[1:], strict=False):
            yield name, mine, truth, 1e-8 * (1 + largest(truth))
