"""``torch.ops.atrous.upsample_cross_entropy``: the loss and, where it will be needed, its gradient in the same pass.

The op returns (loss, gradient). The gradient is a by-product for the backward pass, which then is one multiplication;
it is empty where nothing asks for it and for ``reduction="none"``, whose backward runs the kernel again with the incoming
gradient of every pixel. Differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels import dispatch, native
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops.conv2d import cuda_can_run, gpu_unmeasured, is_channels_last
from atrous_kernels.problem import UpsampleProblem
from atrous_kernels.reference import upsample_cross_entropy as reference
from atrous_kernels.triton import upsample_cross_entropy as triton

_library = torch.library.Library("atrous", "FRAGMENT")
_OPTIONS = "SymInt ignore_index, str reduction, float label_smoothing, float hard_fraction, bool align_corners"
_library.define(
    f"upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS}, bool with_gradient, str backend)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "upsample_cross_entropy_backward(Tensor grad_output, Tensor gradient, Tensor logits, Tensor target, Tensor? weight, "
    f"{_OPTIONS}, str backend) -> Tensor"
)


# Choosing -------------------------------------------------------------------------------------------------------------


def problem_of(logits: Tensor, size: Sequence[int]) -> UpsampleProblem:
    """The numbers of one call."""
    batch, classes, height, width = logits.shape
    return UpsampleProblem(batch, classes, (height, width), (size[0], size[1]), logits.dtype, logits.device.type)


def pick(op: str, backend: str, logits: Tensor, size: Sequence[int]) -> Implementation:
    """The implementation that runs this call."""
    if backend == dispatch.AUTO:
        backend = dispatch.default_backend(op)
    key = (*logits.shape, *size, logits.dtype, logits.device.type)
    return dispatch.cached(op, backend, key) or dispatch.choose(op, problem_of(logits, size), backend, key)


def _layout(logits: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(logits) else torch.contiguous_format


# Kernels --------------------------------------------------------------------------------------------------------------


def _forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    *options, with_gradient, backend = arguments
    if options[1] == "none" and upstream is None:
        with_gradient = False
    implementation = pick("upsample_cross_entropy", backend, logits, target.shape[1:])
    loss, gradient = implementation.run(logits, target, weight, upstream, *options, with_gradient)
    return loss, gradient.contiguous(memory_format=_layout(logits)) if with_gradient else gradient


def _backward(
    grad_output: Tensor, gradient: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any
) -> Tensor:
    *options, backend = arguments
    if options[1] == "none":
        gradient = _forward(logits, target, weight, *options, True, backend, upstream=grad_output)[1]
    else:
        if gradient.dim() != 4:  # not computed with the loss
            gradient = _forward(logits, target, weight, *options, True, backend)[1]
        gradient = gradient * grad_output
    return gradient.to(logits.dtype)


for _key in ("CPU", "CUDA"):
    _library.impl("upsample_cross_entropy", _forward, _key)
    _library.impl("upsample_cross_entropy_backward", _backward, _key)


# Fake and autograd ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("atrous::upsample_cross_entropy", lib=_library)
def _fake(logits, target, weight, ignore_index, reduction, label_smoothing, hard_fraction, align_corners, with_gradient, backend):
    dtype = reference.accumulator(logits.dtype)
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    if not with_gradient or reduction == "none":
        return loss, logits.new_empty(0, dtype=dtype)
    return loss, torch.empty(logits.shape, dtype=dtype, device=logits.device, memory_format=_layout(logits))


@torch.library.register_fake("atrous::upsample_cross_entropy_backward", lib=_library)
def _backward_fake(grad_output, gradient, logits, target, weight, *arguments):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=_layout(logits))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, weight, *options, _, backend = inputs
    ctx.options = (*options, backend)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], logits, target, *(() if weight is None else (weight,)))


def _differentiate(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Any, ...]:
    gradient, logits, target, *weight = ctx.saved_tensors
    arguments = (grad_loss, gradient, logits, target, weight[0] if weight else None, *ctx.options)
    return upsample_cross_entropy_backward(*arguments), *(None,) * 9


def _twice(ctx: Any, grad: Tensor) -> Any:
    raise NotImplementedError(
        "upsample_cross_entropy is differentiable once. For second derivatives, take F.cross_entropy of F.interpolate"
    )


torch.library.register_autograd("atrous::upsample_cross_entropy", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("atrous::upsample_cross_entropy_backward", _twice, lib=_library)

upsample_cross_entropy = torch.ops.atrous.upsample_cross_entropy.default
upsample_cross_entropy_backward = torch.ops.atrous.upsample_cross_entropy_backward.default


# Implementations ------------------------------------------------------------------------------------------------------


def _mark_hard_pixels(loss: Tensor, target: Tensor, ignore_index: int, fraction: float) -> Tensor:
    torch.ops.atrous_native.hard_pixels_(loss, target, ignore_index, fraction)
    return loss


def _hard_pixels(loss: Tensor, target: Tensor, ignore_index: int, fraction: float) -> Tensor:
    return reference.hard_pixels(loss, target != ignore_index, fraction).to(loss.dtype)


def _native(
    hard_pixels: Callable[[Tensor, Tensor, int, float], Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    hard_fraction: float,
    align_corners: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    logits = logits.to(reference.accumulator(logits.dtype))  # a small tensor: 16-bit logits need no kernels of their own
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits.dtype)

    def run(scale: Tensor | None, per_pixel: bool, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.atrous_native.upsample_cross_entropy(
            logits, target, weight, scale, ignore_index, label_smoothing, align_corners, per_pixel, with_gradient
        )

    scale = upstream
    if hard_fraction < 1:
        kept = hard_pixels(run(None, True, False)[0], target, ignore_index, hard_fraction)
        scale = kept if upstream is None else kept.mul_(upstream)
    loss, gradient, (total, divisor) = run(scale, reduction == "none", with_gradient)
    if reduction == "none":
        return loss, gradient
    if reduction == "mean":
        gradient.div_(torch.where(divisor == 0, 1, divisor))  # without a counted pixel it is zero and stays so
        total = total / divisor
    return total.to(logits.dtype), gradient


def _framework(
    logits: Tensor, target: Tensor, weight: Tensor | None, upstream: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    *of_loss, align_corners, with_gradient = options
    size = list(target.shape[1:])
    logits = logits.to(reference.accumulator(logits.dtype))
    z = F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)
    arguments: tuple[Any, ...] = (z, target, weight, upstream, *of_loss, with_gradient)
    loss, gradient = reference.cross_entropy(*arguments)
    if with_gradient:
        gradient = torch.ops.aten.upsample_bilinear2d_backward(gradient, size, logits.shape, align_corners)
    return loss, gradient


def cpu_can_run(problem: UpsampleProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    return native.cpu_missing()


def always(problem: UpsampleProblem) -> None:
    return None


def last_resort(problem: UpsampleProblem) -> str | None:
    return "plain PyTorch by the definition: for checking, not for speed"


dispatch.register(
    "upsample_cross_entropy",
    [
        Implementation("cpu", partial(_native, _mark_hard_pixels), cpu_can_run, always),
        Implementation("triton", triton.upsample_cross_entropy, triton.can_run, gpu_unmeasured),
        Implementation("cuda", partial(_native, _hard_pixels), cuda_can_run, gpu_unmeasured),
        Implementation("torch", _framework, always, always),
        Implementation("reference", reference.upsample_cross_entropy, always, last_resort),
    ],
)
