"""``torch.ops.atrous.conv_bn_act``: convolution, constant normalisation, residual and activation, for inference.

The compiled kernels finish every sum before they write it, so nothing is read or written twice. Gradients are the business of
:mod:`atrous_kernels.ops.conv_bn_relu`, which calls this op where none is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch, native, tuned
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops import winograd
from atrous_kernels.problem import ConvProblem
from atrous_kernels.reference import conv2d as reference_conv2d
from atrous_kernels.reference import conv_bn_relu as reference
from atrous_kernels.triton import conv_bn_act as triton
from atrous_kernels.triton.runtime import can_run as triton_can_run

Ints = Sequence[int]
#: bn_weight, bn_bias, mean, var
Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor]

#: Where each activation holds its output.
BOUNDS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0), "none": (float("-inf"), float("inf"))}

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define(
    "conv_bn_act(Tensor input, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, Tensor var, Tensor? residual, "
    "float eps, str activation, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str backend) -> Tensor"
)


def conv_bn_act_kernel(
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str,
) -> Tensor:
    """What the op runs."""
    call = Call(input, weight, activation, (stride, padding, dilation, groups), backend)
    return call(conv.dense(input), conv.dense(weight), (bn_weight, bn_bias, mean, var), residual, eps)


class Call:
    """A choice for tensors with the sizes, strides and dtype of these, to be called with dense ones."""

    __slots__ = ("arguments", "layout", "run")

    def __init__(
        self, input: Tensor, weight: Tensor, activation: str, geometry: tuple[Ints, Ints, Ints, int], backend: str
    ) -> None:
        self.arguments, self.layout = (activation, *geometry), conv.layout_of(input, weight)
        last = self.layout is torch.channels_last
        self.run = conv.pick("conv_bn_act", backend, input.shape, weight.shape, geometry, input, last).run

    def __call__(self, input: Tensor, weight: Tensor, norm: Norm, residual: Tensor | None, eps: float) -> Tensor:
        out: Tensor = self.run(input, weight, norm, residual, eps, *self.arguments)
        return out.contiguous(memory_format=self.layout)


def activate_(tensor: Tensor, activation: str) -> Tensor:
    """The activation by itself, in place."""
    if activation == "none":
        return tensor
    return torch.relu_(tensor) if activation == "relu" else torch.nn.functional.relu6(tensor, inplace=True)


for _key in ("CPU", "CUDA"):
    _library.impl("conv_bn_act", conv_bn_act_kernel, _key)


@torch.library.register_fake("atrous::conv_bn_act", lib=_library)
def _fake(input, weight, bn_weight, bn_bias, mean, var, residual, eps, activation, stride, padding, dilation, groups, backend):
    return conv.empty_output(input, weight, stride, padding, dilation)


conv_bn_act = torch.ops.atrous.conv_bn_act.default


# Implementations ------------------------------------------------------------------------------------------------------


def _sums(norm: Norm, dtype: torch.dtype) -> list[Tensor | None]:
    """The constants in the type of the kernels' sums."""
    wide = reference.sum_type(dtype)
    return [t if t is None or (t.dtype is wide and t.is_contiguous()) else t.to(wide).contiguous() for t in norm]


def _native(
    input: Tensor,
    weight: Tensor,
    ready: Tensor | None,
    norm: Norm,
    residual: Tensor | None,
    eps: float,
    activation: str,
    geometry: tuple[Any, ...],
    tile: int,
) -> Tensor:
    # A direct kernel adds the residual where both lie alike, in whole vectors of channels (of 16 values at most).
    beside = (
        residual is not None
        and tile == 0
        and residual.dtype is input.dtype
        and input.dtype in (torch.float32, torch.float64)
        and geometry[3] == 1
        and weight.shape[0] % 16 == 0
        and conv.is_channels_last(residual)
        and residual.is_contiguous(memory_format=torch.channels_last)  # which a subsampled shortcut is not
        and conv.layout_of(input, weight) is torch.channels_last
    )
    bounds = BOUNDS[activation if residual is None or beside else "none"]
    out = torch.ops.atrous_native.conv_bn_act(
        input, weight, ready, *_sums(norm, input.dtype), eps, residual if beside else None, *geometry, *bounds, tile
    )
    return out if residual is None or beside else activate_(out.add_(residual), activation)


def _cpu(
    input: Tensor, weight: Tensor, norm: Norm, residual: Tensor | None, eps: float, activation: str, *geometry: Any
) -> Tensor:
    ready = conv.packed_weight(weight, geometry[3])
    return _native(input, weight, ready, norm, residual, eps, activation, geometry, 0)


def _winograd(
    input: Tensor, weight: Tensor, norm: Norm, residual: Tensor | None, eps: float, activation: str, *geometry: Any
) -> Tensor:
    tile, ready = winograd.plan(input.shape, weight, geometry, False)
    return _native(input, weight, ready, norm, residual, eps, activation, geometry, tile)


def _triton(
    input: Tensor, weight: Tensor, norm: Norm, residual: Tensor | None, eps: float, activation: str, *geometry: Any
) -> Tensor:
    return triton.conv_bn_act(input, weight, norm, residual, eps, *BOUNDS[activation], *geometry)


def _framework(
    input: Tensor, weight: Tensor, norm: Norm, residual: Tensor | None, eps: float, activation: str, *geometry: Any
) -> Tensor:
    out = conv.framework_conv2d(input, weight, None, *geometry)
    if input.device.type == "cpu" and input.dtype in NATIVE_DTYPES and native.cpu_missing() is None:
        bn_weight, bn_bias, mean, var = _sums(norm, input.dtype)
        assert mean is not None
        assert var is not None
        scale = var.add(eps).rsqrt_()
        scale = scale if bn_weight is None else scale.mul_(bn_weight)
        shift = torch.zeros_like(scale) if bn_bias is None else bn_bias
        bounds = BOUNDS[activation if residual is None else "none"]
        torch.ops.atrous_native.batch_norm_act_(out, mean, scale, shift, *bounds)
        return out if residual is None else activate_(out.add_(residual), activation)
    bn_weight, bn_bias, mean, var = norm
    out = torch.nn.functional.batch_norm(out, mean, var, bn_weight, bn_bias, False, 0.0, eps)
    return activate_(out if residual is None else out.add_(residual), activation)


def _reference(
    input: Tensor, weight: Tensor, norm: Norm, residual: Tensor | None, eps: float, activation: str, *geometry: Any
) -> Tensor:
    out = reference_conv2d.conv2d(input, weight, None, *geometry)
    return reference.conv_bn_act(out, norm, residual, eps, *BOUNDS[activation])


NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def cpu_can_run(problem: ConvProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    if problem.dtype not in NATIVE_DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, NATIVE_DTYPES))}"
    return native.cpu_missing()


def always(problem: ConvProblem) -> None:
    return None


def last_resort(problem: ConvProblem) -> str:
    return "plain PyTorch, tap by tap: for checking, not for speed"


def _cpu_loses(problem: ConvProblem) -> str | None:
    known, reason = tuned.verdict("conv_bn_act", problem, "cpu")
    return reason if known else conv.cpu_loses_conv2d(problem)


def _winograd_loses(problem: ConvProblem) -> str | None:
    known, reason = tuned.verdict("conv_bn_act", problem, "winograd")
    return reason if known else winograd.loses(problem)


dispatch.register(
    "conv_bn_act",
    [
        Implementation("winograd", _winograd, winograd.can_run, _winograd_loses),
        Implementation("cpu", _cpu, cpu_can_run, _cpu_loses),
        Implementation("triton", _triton, triton_can_run, conv.gpu_unmeasured),
        Implementation("torch", _framework, always, always),
        Implementation("reference", _reference, always, last_resort),
    ],
)
