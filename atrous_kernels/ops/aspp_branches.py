"""``torch.ops.atrous.aspp_branches`` and ``aspp_branches_act``: the convolutions of an ASPP in one launch, side by side in the
channels of one tensor; with the statistics of their outputs for training, normalised and activated for inference.

As in :mod:`atrous_kernels.ops.conv2d_statistics`, the statistics carry no gradient of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops.conv_bn_act import BOUNDS
from atrous_kernels.reference.conv_bn_relu import sum_type
from atrous_kernels.triton import aspp as triton

Ints = Sequence[int]

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define("aspp_branches(Tensor input, Tensor[] weights, int[] dilations) -> (Tensor output, Tensor mean, Tensor moment)")
_library.define(
    "aspp_branches_act(Tensor input, Tensor[] weights, int[] dilations, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, "
    "Tensor var, float eps, str activation) -> Tensor"
)


def _pairs(dilations: Ints) -> list[tuple[int, int]]:
    return list(zip(dilations[::2], dilations[1::2], strict=True))


def _branches(input: Tensor, weights: Sequence[Tensor], dilations: Ints) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, moment = triton.aspp_branches(conv.dense(input), [conv.dense(w) for w in weights], _pairs(dilations))
    return output.contiguous(memory_format=conv.layout_of(input, *weights)), mean, moment


def _branches_act(
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Ints,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
) -> Tensor:
    arguments = conv.dense(input), [conv.dense(w) for w in weights], _pairs(dilations)
    output = triton.aspp_branches_act(*arguments, (bn_weight, bn_bias, mean, var), eps, *BOUNDS[activation])
    return output.contiguous(memory_format=conv.layout_of(input, *weights))


for _name, _kernel in (("aspp_branches", _branches), ("aspp_branches_act", _branches_act)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)


def _empty(input: Tensor, weights: Sequence[Tensor]) -> Tensor:
    size = (input.shape[0], sum(weight.shape[0] for weight in weights), *input.shape[2:])
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=conv.layout_of(input, *weights))


@torch.library.register_fake("atrous::aspp_branches", lib=_library)
def _branches_fake(input, weights, dilations):
    output = _empty(input, weights)
    mean, moment = (input.new_empty(output.shape[1], dtype=sum_type(input.dtype)) for _ in range(2))
    return output, mean, moment


@torch.library.register_fake("atrous::aspp_branches_act", lib=_library)
def _branches_act_fake(input, weights, dilations, bn_weight, bn_bias, mean, var, eps, activation):
    return _empty(input, weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weights, ctx.dilations = inputs
    ctx.save_for_backward(input, *weights)
    ctx.mark_non_differentiable(*output[1:])


def _shares(grad: Tensor, weights: Sequence[Tensor], dilations: Ints) -> Iterator[tuple[Tensor, Tensor, tuple[Any, ...]]]:
    """Per branch its weight, its slice of the gradient and the rest of the arguments of a convolution."""
    slices = grad.split([weight.shape[0] for weight in weights], dim=1)
    for weight, mine, rate in zip(weights, slices, _pairs(dilations), strict=True):
        padding = [r * (k // 2) for r, k in zip(rate, weight.shape[2:], strict=True)]
        yield weight, mine, ((1, 1), padding, rate, 1, "triton")


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    input, *weights = ctx.saved_tensors
    needs_input, needs_weights, _ = ctx.needs_input_grad
    grad_input: Tensor | None = None
    grad_weights: list[Tensor | None] = []
    for needs_weight, (weight, mine, geometry) in zip(needs_weights, _shares(grad, weights, ctx.dilations), strict=True):
        if needs_input:
            share = conv.conv2d_input(input.shape, weight, mine, *geometry)
            grad_input = share if grad_input is None else grad_input + share
        grad_weight = conv.conv2d_weight(input, weight.shape, mine, *geometry) if needs_weight else None
        grad_weights.append(grad_weight)
    return grad_input, grad_weights, None


torch.library.register_autograd("atrous::aspp_branches", _backward, setup_context=_save, lib=_library)
aspp_branches = torch.ops.atrous.aspp_branches.default
aspp_branches_act = torch.ops.atrous.aspp_branches_act.default
