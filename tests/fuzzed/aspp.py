"""aspp."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from tests.fuzzed.conv_bn_relu import draw_norm, inverse_deviation, norm_of, normalised, to_dtype
from tests.fuzzed.draws import LAYOUTS, Problem, Results, in_float64, integers, largest, pick, skewed, with_gradients


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
