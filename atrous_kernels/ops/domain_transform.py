"""``torch.ops.atrous.domain_transform`` and its gradient ``domain_transform_backward``.

The gradient's own derivative is that of the plain PyTorch form: right, not fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch, native
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops.conv2d import gpu_unmeasured, is_channels_last
from atrous_kernels.problem import TransformProblem
from atrous_kernels.reference import domain_transform as reference
from atrous_kernels.reference.upsample_cross_entropy import accumulator
from atrous_kernels.triton import domain_transform as triton

_library = torch.library.Library("atrous", "FRAGMENT")
_NUMBERS = "float sigma_s, float sigma_r, int iterations, str backend"
_library.define(f"domain_transform(Tensor input, Tensor edge, {_NUMBERS}) -> Tensor")
_library.define(f"domain_transform_backward(Tensor grad, Tensor input, Tensor edge, {_NUMBERS}) -> (Tensor, Tensor)")


def problem_of(input: Tensor, iterations: int) -> TransformProblem:
    """The numbers of one call."""
    n, c, h, w = input.shape
    return TransformProblem((n, c, h, w), iterations, input.dtype, input.device.type)


def _implementation(op: str, backend: str, input: Tensor, iterations: int) -> Implementation:
    if backend == dispatch.AUTO:
        backend = dispatch.default_backend(op)
    key = (tuple(input.shape), iterations, input.dtype, input.device.type)
    return dispatch.cached(op, backend, key) or dispatch.choose(op, problem_of(input, iterations), backend, key)


def _layout(input: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(input) else torch.contiguous_format


def _domain_transform(input: Tensor, edge: Tensor, sigma_s: float, sigma_r: float, iterations: int, backend: str) -> Tensor:
    if edge.device.type == "cpu" and edge.numel():  # elsewhere the check would have to wait for the device
        low, high = (bound.item() for bound in edge.aminmax())  # NaN comes through
        if not (low >= 0 and math.isfinite(high)):
            at = tuple((~(edge.isfinite() & (edge >= 0))).nonzero()[0].tolist())
            raise ValueError(f"edge holds {edge[at].item()} at {list(at)}: expected finite values of at least 0")
    return _implementation("domain_transform", backend, input, iterations).run(input, edge, sigma_s, sigma_r, iterations)


def _domain_transform_backward(
    grad: Tensor, input: Tensor, edge: Tensor, sigma_s: float, sigma_r: float, iterations: int, backend: str
) -> tuple[Tensor, Tensor]:
    run = _implementation("domain_transform_backward", backend, input, iterations).run
    return run(grad, input, edge, sigma_s, sigma_r, iterations)


for _key in ("CPU", "CUDA"):
    _library.impl("domain_transform", _domain_transform, _key)
    _library.impl("domain_transform_backward", _domain_transform_backward, _key)


@torch.library.register_fake("atrous::domain_transform", lib=_library)
def _fake(input, edge, sigma_s, sigma_r, iterations, backend):
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=_layout(input))


@torch.library.register_fake("atrous::domain_transform_backward", lib=_library)
def _backward_fake(grad, input, edge, *_):
    return _fake(input, edge, *_), edge.new_empty(edge.shape)


# Autograd -------------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, edge, *ctx.numbers = inputs
    ctx.save_for_backward(input, edge)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *domain_transform_backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, input, edge, *ctx.numbers = inputs
    ctx.save_for_backward(grad, input, edge)


def _backward_twice(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    operands = [each if each.requires_grad else each.detach().requires_grad_() for each in ctx.saved_tensors]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        results = reference.domain_transform_backward(*operands, *ctx.numbers[:-1])
        found = torch.autograd.grad(results, operands, grads, create_graph=create_graph)
    return *found, None, None, None, None


torch.library.register_autograd("atrous::domain_transform", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd("atrous::domain_transform_backward", _backward_twice, setup_context=_save_backward, lib=_library)

domain_transform = torch.ops.atrous.domain_transform.default
domain_transform_backward = torch.ops.atrous.domain_transform_backward.default


# Implementations ------------------------------------------------------------------------------------------------------


def _native(input: Tensor, *rest: Any) -> Tensor:
    wide = input.to(accumulator(input.dtype))
    return torch.ops.atrous_native.domain_transform(wide, *rest).to(input.dtype)


def _native_backward(grad: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(input.dtype)
    of_input, of_edge = torch.ops.atrous_native.domain_transform_backward(grad.to(dtype), input.to(dtype), *rest)
    return of_input.to(input.dtype), of_edge


def _plain(input: Tensor, *rest: Any) -> Tensor:
    return reference.domain_transform(input, *rest).contiguous(memory_format=_layout(input))


def _plain_backward(grad: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    of_input, of_edge = reference.domain_transform_backward(grad, input, *rest)
    return of_input.contiguous(memory_format=_layout(input)), of_edge


def _cpu_can_run(problem: TransformProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    return native.cpu_missing()


def _always(problem: TransformProblem) -> None:
    return None


def _last_resort(problem: TransformProblem) -> str:
    return "plain PyTorch, position by position: for checking, not for speed"


for _name, _compiled, _triton, _reference in (
    ("domain_transform", _native, triton.domain_transform, _plain),
    ("domain_transform_backward", _native_backward, triton.domain_transform_backward, _plain_backward),
):
    dispatch.register(
        _name,
        [
            Implementation("cpu", _compiled, _cpu_can_run, _always),
            Implementation("triton", _triton, triton.can_run, gpu_unmeasured),
            Implementation("reference", _reference, _always, _last_resort),
        ],
    )
