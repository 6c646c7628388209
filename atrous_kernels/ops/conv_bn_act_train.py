"""Convolution, batch statistics, normalisation and activation as one node of an eager graph.

The ops :mod:`atrous_kernels.ops.conv2d_statistics` and :mod:`atrous_kernels.ops.batch_norm_act` do the same where somebody
watches: a trace, a transform, a mode. Each of them costs the dispatcher more than a small layer takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops.batch_norm_act import (
    PASSES,
    count_of,
    dense,
    gradient_inside,
    of_parameter,
    train_gradients,
    train_pass,
)
from atrous_kernels.ops.conv2d_statistics import conv2d_statistics_kernel
from atrous_kernels.ops.conv_bn_act import BOUNDS
from atrous_kernels.reference import conv_bn_relu as reference


class ConvBnActTrain(torch.autograd.Function):
    """``apply`` gives output, batch mean and moment; differentiable any number of times."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        residual: Tensor | None,
        geometry: tuple[Any, Any, Any, int],
        inner: str,
        eps: float,
        activation: str,
        passes: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        before, mean, moment = conv2d_statistics_kernel(input, weight, *geometry, inner)
        before = dense(before)
        output = train_pass(
            PASSES[passes], before, bn_weight, bn_bias, eps, activation, known=(mean, moment), residual=residual
        )[0]
        # With a residual, the output says where the activation held it.
        held = () if residual is None else (output,)
        ctx.save_for_backward(input, weight, bn_weight, bn_bias, before, mean, moment, *held)
        ctx.mark_non_differentiable(mean, moment)
        ctx.geometry, ctx.rest = (*geometry, inner), (eps, activation, passes)
        return output, mean, moment

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        input, weight, bn_weight, bn_bias, before, mean, moment, *held = ctx.saved_tensors
        eps, activation, passes = ctx.rest
        d_residual = None
        if held:
            grad = d_residual = gradient_inside(grad, held[0], activation)
            activation = "none"
        if torch.is_grad_enabled():  # the convolution's output again, this time as a part of the graph
            before = conv.conv2d(input, weight, None, *ctx.geometry)
            grad, d_weight, d_bias = reference.gradients(grad, before, bn_weight, bn_bias, eps, *BOUNDS[activation])
        else:
            grad, d_weight, d_bias = train_gradients(
                PASSES[passes], grad, before, bn_weight, bn_bias, mean, moment, count_of(before), eps, activation
            )
        of_convolution = conv.gradients(ctx, grad, input, weight, ctx.geometry)
        parameters = of_parameter(d_weight, bn_weight), of_parameter(d_bias, bn_bias)
        return *of_convolution, *parameters, d_residual, *(None,) * 5
