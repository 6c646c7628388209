"""The recursive domain transform and its gradients, position by position."""

from __future__ import annotations

import torch
from torch import Tensor

from atrous_kernels.problem import transform_passes
from atrous_kernels.reference.upsample_cross_entropy import accumulator


def domain_transform(input: Tensor, edge: Tensor, sigma_s: float, sigma_r: float, iterations: int) -> Tensor:
    """[N, C, H, W] filtered along rows and columns by turns; edge [N, 2, H, W] as in the public function."""
    dtype = accumulator(input.dtype)
    x, edge = input.to(dtype), edge.to(dtype)
    for axis, rate, slope in transform_passes(sigma_s, sigma_r, iterations):
        x = _pass(x, torch.exp(-rate - slope * edge[:, axis : axis + 1]), 3 - axis)
    return x.to(input.dtype)


def domain_transform_backward(
    grad: Tensor, input: Tensor, edge: Tensor, sigma_s: float, sigma_r: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The gradients of input and edge. Differentiable itself: that is the op's second derivative."""
    dtype = accumulator(input.dtype)
    x, g, edge_ = input.to(dtype), grad.to(dtype), edge.to(dtype)
    done = []
    for axis, rate, slope in transform_passes(sigma_s, sigma_r, iterations):
        weight = torch.exp(-rate - slope * edge_[:, axis : axis + 1])
        done.append((x, weight, axis, slope))
        x = _pass(x, weight, 3 - axis)
    of_edge = [torch.zeros_like(edge_[:, 0]) for _ in range(2)]
    for x, weight, axis, slope in reversed(done):
        g, of_weight = _pass_backward(g, x, weight, 3 - axis)
        of_edge[axis] = of_edge[axis] - (slope * weight * of_weight).sum(1)
    return g.to(input.dtype), torch.stack(of_edge, 1).to(edge.dtype)


def _pass(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Forwards, ``y[i] = x[i] + w[i] (y[i - 1] - x[i])``, then backwards, ``z[i] = y[i] + w[i + 1] (z[i + 1] - y[i])``."""
    z, w = list(x.unbind(dim)), weight.unbind(dim)
    for i in range(1, len(z)):
        z[i] = z[i] + w[i] * (z[i - 1] - z[i])
    for i in reversed(range(len(z) - 1)):
        z[i] = z[i] + w[i + 1] * (z[i + 1] - z[i])
    return torch.stack(z, dim)


def _pass_backward(grad: Tensor, input: Tensor, weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of input and, per channel, of weight."""
    x, w, g = input.unbind(dim), weight.unbind(dim), list(grad.unbind(dim))
    n = len(x)
    y = list(x)
    for i in range(1, n):
        y[i] = x[i] + w[i] * (y[i - 1] - x[i])
    z = list(y)
    for i in reversed(range(n - 1)):
        z[i] = y[i] + w[i + 1] * (z[i + 1] - y[i])
    of_weight = [torch.zeros_like(x[0]) for _ in x]
    for i in range(n - 1):  # the backward recurrence, undone from its end
        g[i + 1] = g[i + 1] + w[i + 1] * g[i]
        of_weight[i + 1] = g[i] * (z[i + 1] - y[i])
        g[i] = g[i] - w[i + 1] * g[i]
    for i in reversed(range(1, n)):
        g[i - 1] = g[i - 1] + w[i] * g[i]
        of_weight[i] = of_weight[i] + g[i] * (y[i - 1] - x[i])
        g[i] = g[i] - w[i] * g[i]
    return torch.stack(g, dim), torch.stack(of_weight, dim)
