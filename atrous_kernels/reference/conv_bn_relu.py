"""The passes of a batch normalisation with activation, in plain PyTorch; sums in float32 at least.

With y = (x - mean) * scale + shift per channel, the output is y held between low and high, and y's gradient is zero where it
was held. Names and arguments are those of the compiled passes (``csrc/ops/conv_bn_relu.cpp``).
"""

from __future__ import annotations

import torch
from torch import Tensor

_SPACE = (0, 2, 3)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and per-channel parameters."""
    return torch.promote_types(dtype, torch.float32)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


def _y(input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (input.to(mean.dtype) - _column(mean)) * _column(scale) + _column(shift)


def _free(grad: Tensor, y: Tensor, low: float, high: float) -> Tensor:
    return grad.to(y.dtype).masked_fill((y <= low) | (y >= high), 0)


def batch_norm_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared distances from it, per channel; zeros where there is no element."""
    x = input.to(sum_type(input.dtype))
    mean = x.sum(_SPACE) / max(x.numel() // max(x.shape[1], 1), 1)
    return mean, (x - _column(mean)).square().sum(_SPACE)


def batch_norm_act(
    input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, low: float, high: float, residual: Tensor | None = None
) -> Tensor:
    y = _y(input, mean, scale, shift)
    return (y if residual is None else y + residual.to(y.dtype)).clamp(low, high).to(input.dtype)


def batch_norm_act_(input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, low: float, high: float) -> None:
    input.copy_(batch_norm_act(input, mean, scale, shift, low, high))


def conv_bn_act(
    output: Tensor,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    residual: Tensor | None,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    """The convolution's output normalised by constants (weight, bias, mean, var), plus the residual, held between the bounds."""
    wide = sum_type(output.dtype)
    weight, bias, mean, var = (None if t is None else t.to(wide) for t in norm)
    assert mean is not None
    assert var is not None
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    y = _y(output, mean, scale, torch.zeros_like(mean) if bias is None else bias)
    return (y if residual is None else y + residual.to(wide)).clamp(low, high).to(output.dtype)


def batch_norm_act_sums(
    grad: Tensor, input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Per channel the sums of y's gradient and of y's gradient times (x - mean)."""
    g = _free(grad, _y(input, mean, scale, shift), low, high)
    return g.sum(_SPACE), (g * (input.to(g.dtype) - _column(mean))).sum(_SPACE)


def batch_norm_act_input(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    offset: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """scale * y's gradient + slope * (x - mean) + offset."""
    g = _free(grad, _y(input, mean, scale, shift), low, high)
    return (g * _column(scale) + (input.to(g.dtype) - _column(mean)) * _column(slope) + _column(offset)).to(input.dtype)


def gradients(
    grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a training step in input, scale and shift, written so that they can be differentiated again."""
    x = input.to(sum_type(input.dtype))
    var, mean = torch.var_mean(x, _SPACE, correction=0)
    std = (var + eps).rsqrt()
    unit = (x - _column(mean)) * _column(std)
    scale = torch.ones_like(mean) if weight is None else weight.to(x.dtype)
    shift = torch.zeros_like(mean) if bias is None else bias.to(x.dtype)
    g = _free(grad, (unit * _column(scale) + _column(shift)).detach(), low, high)
    d_shift, d_scale = g.sum(_SPACE), (g * unit).sum(_SPACE)
    count = max(x.numel() // max(x.shape[1], 1), 1)
    d_input = _column(scale * std) * (g - _column(d_shift / count) - unit * _column(d_scale / count))
    return d_input.to(input.dtype), d_scale, d_shift
