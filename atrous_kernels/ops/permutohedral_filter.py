"""``torch.ops.atrous.permutohedral_filter`` and the gradient of its weights.

The filter is symmetric but for the order of the axes of its blur, so its own gradient in the values is the filter with the
axes in reverse order, and double backward in the values needs no code of its own. The gradient of the weights is taken once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops.conv2d import gpu_unmeasured
from atrous_kernels.ops.permutohedral_lattice import LatticeProblem, always, cpu_can_run, cuda_can_run, last_resort, pick
from atrous_kernels.reference import permutohedral_filter as reference

_library = torch.library.Library("atrous", "FRAGMENT")
_LATTICE = "Tensor vertices, Tensor weights, Tensor neighbours, Tensor begin, Tensor points, Tensor point_weights"
_library.define(f"permutohedral_filter(Tensor values, {_LATTICE}, bool reverse, str backend) -> Tensor")
_library.define(f"permutohedral_filter_weights(Tensor grad, Tensor values, {_LATTICE}, bool reverse, str backend) -> Tensor")


def problem_of(values: Tensor, vertices: Tensor) -> LatticeProblem:
    """The numbers of a call with values [points, channels]."""
    points, channels = values.shape
    return LatticeProblem(points, vertices.shape[-1] - 1, channels, values.dtype, values.device.type)


def _filter(values: Tensor, vertices: Tensor, *rest: Any) -> Tensor:
    *lattice, backend = rest
    return pick("permutohedral_filter", backend, problem_of(values, vertices)).run(values, vertices, *lattice)


def _filter_weights(grad: Tensor, values: Tensor, vertices: Tensor, *rest: Any) -> Tensor:
    *lattice, backend = rest
    return pick("permutohedral_filter_weights", backend, problem_of(values, vertices)).run(grad, values, vertices, *lattice)


for _key in ("CPU", "CUDA"):
    _library.impl("permutohedral_filter", _filter, _key)
    _library.impl("permutohedral_filter_weights", _filter_weights, _key)


@torch.library.register_fake("atrous::permutohedral_filter", lib=_library)
def _fake(values, *_):
    return values.new_empty(values.shape)


@torch.library.register_fake("atrous::permutohedral_filter_weights", lib=_library)
def _weights_fake(grad, values, vertices, *_):
    return values.new_empty(vertices.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, *lattice, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(values, *lattice)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, *lattice = ctx.saved_tensors
    of_values = of_weights = None
    if ctx.needs_input_grad[0]:
        of_values = permutohedral_filter(grad, *lattice, not ctx.reverse, ctx.backend)
    if ctx.needs_input_grad[2]:
        of_weights = permutohedral_filter_weights(grad, values, *lattice, ctx.reverse, ctx.backend)
    return of_values, None, of_weights, *(None,) * 6


def _twice(ctx: Any, grad: Tensor) -> Any:
    raise NotImplementedError("permutohedral_filter: the gradient in its features is differentiable once only")


torch.library.register_autograd("atrous::permutohedral_filter", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd("atrous::permutohedral_filter_weights", _twice, lib=_library)

permutohedral_filter = torch.ops.atrous.permutohedral_filter.default
permutohedral_filter_weights = torch.ops.atrous.permutohedral_filter_weights.default


for _name in ("permutohedral_filter", "permutohedral_filter_weights"):

    def _native(*args: Any, _name: str = _name) -> Tensor:
        return getattr(torch.ops.atrous_native, _name)(*args)

    dispatch.register(
        _name,
        [
            Implementation("cpu", _native, cpu_can_run, always),
            Implementation("cuda", _native, cuda_can_run, gpu_unmeasured),
            Implementation("reference", getattr(reference, _name), always, last_resort),
        ],
    )
