"""``torch.ops.atrous.conv2d_statistics``: a convolution that takes the statistics of its output while it writes it.

The statistics are functions of the output and carry no gradient: whoever normalises with them (see
:mod:`atrous_kernels.ops.conv_bn_relu`) accounts for them in the gradient of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch, native
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops import winograd
from atrous_kernels.ops.conv_bn_act import NATIVE_DTYPES, always, cpu_can_run, last_resort
from atrous_kernels.problem import ConvProblem
from atrous_kernels.reference import conv2d as reference_conv2d
from atrous_kernels.reference import conv_bn_relu as reference
from atrous_kernels.triton import conv_bn_relu as triton
from atrous_kernels.triton.runtime import can_run as triton_can_run

Ints = Sequence[int]

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define(
    "conv2d_statistics(Tensor input, Tensor weight, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
    "str backend) -> (Tensor output, Tensor mean, Tensor moment)"
)


def conv2d_statistics_kernel(
    input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op runs."""
    layout = conv.layout_of(input, weight)
    geometry = (stride, padding, dilation, groups)
    last = layout is torch.channels_last
    chosen = conv.pick("conv2d_statistics", backend, input.shape, weight.shape, geometry, input, last)
    output, mean, moment = chosen.run(conv.dense(input), conv.dense(weight), *geometry)
    return output.contiguous(memory_format=layout), mean, moment


for _key in ("CPU", "CUDA"):
    _library.impl("conv2d_statistics", conv2d_statistics_kernel, _key)


@torch.library.register_fake("atrous::conv2d_statistics", lib=_library)
def _fake(input, weight, stride, padding, dilation, groups, backend):
    mean, moment = (input.new_empty(weight.shape[0], dtype=reference.sum_type(input.dtype)) for _ in range(2))
    return conv.empty_output(input, weight, stride, padding, dilation), mean, moment


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    return *conv.gradients(ctx, grad, input, weight, ctx.geometry), *(None,) * 5


torch.library.register_autograd("atrous::conv2d_statistics", _backward, setup_context=_save, lib=_library)
conv2d_statistics = torch.ops.atrous.conv2d_statistics.default


def _native(input: Tensor, weight: Tensor, ready: Tensor | None, geometry: tuple[Any, ...], tile: int) -> Any:
    return torch.ops.atrous_native.conv2d_statistics(input, weight, ready, *geometry, tile)


def _cpu(input: Tensor, weight: Tensor, *geometry: Any) -> Any:
    if geometry[3] == input.shape[1] == weight.shape[0] > 1:  # depthwise: its kernels take no statistics
        output = torch.ops.atrous_native.conv2d(input, weight, None, *geometry)
        return output, *torch.ops.atrous_native.batch_norm_statistics(output)
    return _native(input, weight, conv.packed_weight(weight, geometry[3]), geometry, 0)


def _winograd(input: Tensor, weight: Tensor, *geometry: Any) -> Any:
    tile, ready = winograd.plan(input.shape, weight, geometry, False)
    return _native(input, weight, ready, geometry, tile)


def _framework(input: Tensor, weight: Tensor, *geometry: Any) -> Any:
    output = conv.framework_conv2d(input, weight, None, *geometry)
    native_pass = output.is_cpu and output.dtype in NATIVE_DTYPES and native.cpu_missing() is None
    return output, *(torch.ops.atrous_native if native_pass else reference).batch_norm_statistics(output)


def _reference(input: Tensor, weight: Tensor, *geometry: Any) -> tuple[Tensor, Tensor, Tensor]:
    output = reference_conv2d.conv2d(input, weight, None, *geometry)
    return output, *reference.batch_norm_statistics(output)


def _loses_as_conv2d(name: str) -> Callable[[ConvProblem], str | None]:
    return next(i.loses for i in dispatch.implementations("conv2d") if i.name == name)


dispatch.register(
    "conv2d_statistics",
    [
        Implementation("winograd", _winograd, winograd.can_run, _loses_as_conv2d("winograd")),
        Implementation("cpu", _cpu, cpu_can_run, _loses_as_conv2d("cpu")),
        Implementation("triton", triton.conv2d_statistics, triton_can_run, conv.gpu_unmeasured),
        Implementation("torch", _framework, always, always),
        Implementation("reference", _reference, always, last_resort),
    ],
)
