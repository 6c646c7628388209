"""Winograd's algorithm as one more implementation of ``conv2d`` and its gradients on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch, native
from atrous_kernels.ops.prepared_weights import prepared
from atrous_kernels.problem import ConvProblem, winograd_tile

Ints = Sequence[int]


def can_run(problem: ConvProblem) -> str | None:
    """None, or the reason why Winograd's algorithm cannot compute this problem."""
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    if problem.dtype is not torch.float32:
        return f"is for float32, not for {problem.dtype}"
    if problem.kernel != (3, 3) or problem.stride != (1, 1):
        return "is for 3x3 kernels of stride 1"
    if problem.is_depthwise:
        return "is for dense convolution: its products are between channels"
    if min(problem.in_channels, problem.out_channels) == 0:
        return "needs channels"
    if dispatch.precision_mode() == "ieee":
        return 'is off: its rounding errors are larger, and precision("ieee") is set'
    return native.cpu_missing()


def loses(problem: ConvProblem) -> str | None:
    """None, or the reason why automatic choice passes it over: a cost model (docs/kernels.md), checked by benchmarks."""
    if min(problem.in_channels, problem.out_channels) // problem.groups < 32:
        return "transforms cost too much below 32 channels per group"
    cost, direct = problem.winograd_cost(winograd_tile(problem)), problem.direct_cost()
    return None if cost < 0.9 * direct else f"would need {cost / direct:.0%} of the direct kernel's work"


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """As the native ``conv2d``, by Winograd's algorithm."""
    tile, ready = plan(input.shape, weight, geometry, False)
    return torch.ops.atrous_native.conv2d_winograd(input, weight, ready, bias, *geometry, tile)


def conv2d_input(input_size: Ints, weight: Tensor, grad_output: Tensor, *geometry: Any) -> Tensor:
    """As the native ``conv2d_input``, by Winograd's algorithm."""
    tile, ready = plan(input_size, weight, geometry, True)
    return torch.ops.atrous_native.conv2d_input_winograd(input_size, weight, ready, grad_output, *geometry, tile)


def conv2d_weight(input: Tensor, weight_size: Ints, grad_output: Tensor, *geometry: Any) -> Tensor:
    """As the native ``conv2d_weight``, by the transpose of Winograd's algorithm."""
    tile = winograd_tile(_problem(input.shape, weight_size[0], geometry))
    return torch.ops.atrous_native.conv2d_weight_winograd(input, weight_size, grad_output, *geometry, tile)


def plan(input_size: Ints, weight: Tensor, geometry: tuple[Any, ...], input_gradient: bool) -> tuple[int, Tensor | None]:
    """The tile, and the transformed weight where it is kept."""
    problem = _problem(input_size, weight.shape[0], geometry)
    tile = winograd_tile(problem)
    points = tuple(axis.points for axis in problem.winograd_axes(tile, input_gradient))
    transform = partial(torch.ops.atrous_native.winograd_weight, weight, input_size, *geometry, tile, input_gradient)
    return tile, prepared(weight, ("winograd", points, problem.groups, input_gradient), transform)


@lru_cache(maxsize=4096)
def _problem_of(sizes: tuple[int, ...], padding: tuple[int, int], rate: tuple[int, int], groups: int) -> ConvProblem:
    batch, channels, height, width, out_channels = sizes
    return ConvProblem(
        batch, channels, out_channels, (height, width), kernel=(3, 3), padding=padding, dilation=rate, groups=groups
    )


def _problem(input_size: Ints, out_channels: int, geometry: tuple[Any, ...]) -> ConvProblem:
    _, padding, rate, groups = geometry
    return _problem_of((*input_size, out_channels), tuple(padding), tuple(rate), groups)
