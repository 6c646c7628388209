"""``torch.ops.atrous.pyramid_pool`` and its gradient ``pyramid_pool_input``.

The levels travel packed, as ``[N, cells, C]``: the 1x1 convolutions that follow are matrix products over the last axis. Averages
are linear, so each of the two ops is the other's derivative; of the maximum, the gradient is differentiable in the incoming
gradient, and the choice of the pixel is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels import dispatch, native
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops.conv2d import cuda_can_run, gpu_unmeasured, is_channels_last
from atrous_kernels.reference import pyramid_pool as reference
from atrous_kernels.triton import pyramid_pool as triton
from atrous_kernels.triton import runtime

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define("pyramid_pool(Tensor input, SymInt[] bins, bool maximum, str backend) -> (Tensor, Tensor)")
_library.define(
    "pyramid_pool_input(Tensor grad, Tensor index, SymInt[] input_size, SymInt[] bins, bool maximum, bool channels_last, "
    "str backend) -> Tensor"
)

Ints = Sequence[int]


@dataclass(frozen=True)
class PyramidProblem:
    """One call as numbers; ``bins`` holds (rows, columns) of each level."""

    size: tuple[int, int, int, int]
    bins: tuple[int, ...]
    maximum: bool
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"

    @property
    def cells(self) -> int:
        """Bins of all levels."""
        return sum(rows * columns for rows, columns in zip(self.bins[::2], self.bins[1::2], strict=True))

    @property
    def min_bytes(self) -> int:
        """Every input value read once and every bin written once."""
        n, c, h, w = self.size
        return n * c * (h * w + self.cells) * self.dtype.itemsize

    def cost(self) -> str:
        return f"{self.cells} bins per channel, at least {self.min_bytes / 1e6:.1f} MB of memory traffic"

    def __str__(self) -> str:
        levels = ", ".join(f"{rows}x{columns}" for rows, columns in zip(self.bins[::2], self.bins[1::2], strict=True))
        sizes = "x".join(map(str, self.size))
        kind = "maximum" if self.maximum else "average"
        return f"{sizes} to {levels}, {kind}, {str(self.dtype).removeprefix('torch.')} on {self.device_type}"


def problem_of(input_size: Ints, bins: Ints, maximum: bool, tensor: Tensor) -> PyramidProblem:
    """The numbers of one call."""
    n, c, h, w = input_size
    return PyramidProblem((n, c, h, w), tuple(bins), maximum, tensor.dtype, tensor.device.type)


def unpacked(packed: Tensor, bins: Ints) -> list[Tensor]:
    """Per level a view ``[N, C, rows, columns]`` of ``[N, cells, C]``."""
    levels = _levels(bins)
    parts = packed.split([rows * columns for rows, columns in levels], 1)
    return [part.unflatten(1, level).permute(0, 3, 1, 2) for part, level in zip(parts, levels, strict=True)]


def implementation_of(op: str, backend: str, input_size: Ints, bins: Ints, maximum: bool, tensor: Tensor) -> Implementation:
    """What runs a call of ``op``."""
    if backend == dispatch.AUTO:
        backend = dispatch.default_backend(op)
    key = (tuple(input_size), tuple(bins), maximum, tensor.dtype, tensor.device.type)
    found = dispatch.cached(op, backend, key)
    return found or dispatch.choose(op, problem_of(input_size, bins, maximum, tensor), backend, key)


def _pyramid_pool(input: Tensor, bins: Ints, maximum: bool, backend: str) -> tuple[Tensor, Tensor]:
    run = implementation_of("pyramid_pool", backend, input.shape, bins, maximum, input).run
    return run(input, list(bins), maximum)


def _pyramid_pool_input(
    grad: Tensor, index: Tensor, input_size: Ints, bins: Ints, maximum: bool, channels_last: bool, backend: str
) -> Tensor:
    run = implementation_of("pyramid_pool_input", backend, input_size, bins, maximum, grad).run
    return run(grad, index, list(input_size), list(bins), maximum, channels_last)


for _key in ("CPU", "CUDA"):
    _library.impl("pyramid_pool", _pyramid_pool, _key)
    _library.impl("pyramid_pool_input", _pyramid_pool_input, _key)


# Fake -----------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("atrous::pyramid_pool", lib=_library)
def _pyramid_pool_fake(input, bins, maximum, backend):
    cells = sum(rows * columns for rows, columns in zip(bins[::2], bins[1::2], strict=True))
    size = [input.shape[0], cells, input.shape[1]]
    return input.new_empty(size), input.new_empty(size if maximum else [0], dtype=torch.int64)


@torch.library.register_fake("atrous::pyramid_pool_input", lib=_library)
def _pyramid_pool_input_fake(grad, index, input_size, bins, maximum, channels_last, backend):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(list(input_size), dtype=grad.dtype, device=grad.device, memory_format=layout)


# Autograd -------------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, ctx.bins, ctx.maximum, ctx.backend = inputs
    ctx.input_size, ctx.channels_last = input.shape, is_channels_last(input)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    grad_input = pyramid_pool_input(grad, index, ctx.input_size, ctx.bins, ctx.maximum, ctx.channels_last, ctx.backend)
    return grad_input, None, None, None


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, _, ctx.bins, ctx.maximum, _, ctx.backend = inputs
    ctx.save_for_backward(index)


def _input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    if ctx.maximum:
        grad_grad = grad.flatten(2).gather(2, index.transpose(1, 2)).transpose(1, 2)
    else:
        grad_grad = pyramid_pool(grad, ctx.bins, False, ctx.backend)[0]
    return grad_grad, None, None, None, None, None, None


torch.library.register_autograd("atrous::pyramid_pool", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd("atrous::pyramid_pool_input", _input_backward, setup_context=_save_input, lib=_library)

pyramid_pool = torch.ops.atrous.pyramid_pool.default
pyramid_pool_input = torch.ops.atrous.pyramid_pool_input.default


# Implementations ------------------------------------------------------------------------------------------------------


def _levels(bins: Ints) -> list[tuple[int, int]]:
    return list(zip(bins[::2], bins[1::2], strict=True))


def _framework(input: Tensor, bins: Ints, maximum: bool) -> tuple[Tensor, Tensor]:
    def pack(levels: Sequence[Tensor]) -> Tensor:
        return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2).contiguous()

    if not maximum:
        return pack([F.adaptive_avg_pool2d(input, level) for level in _levels(bins)]), input.new_empty(0, dtype=torch.int64)
    pairs = [F.adaptive_max_pool2d(input, level, return_indices=True) for level in _levels(bins)]
    return pack([values for values, _ in pairs]), pack([indices for _, indices in pairs])


def _framework_input(
    grad: Tensor, index: Tensor, input_size: Ints, bins: Ints, maximum: bool, channels_last: bool
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # Only the sizes and the layout of the absent input are read.
    input = torch.empty(list(input_size), dtype=grad.dtype, device=grad.device, memory_format=layout)
    total = torch.zeros_like(input)
    begin = 0
    for rows, columns in _levels(bins):
        here = slice(begin, begin + rows * columns)
        begin = here.stop
        size = (input_size[0], input_size[1], rows, columns)
        level = grad[:, here].transpose(1, 2).reshape(size)
        if maximum:
            at = index[:, here].transpose(1, 2).reshape(size)
            total += torch.ops.aten.adaptive_max_pool2d_backward(level, input, at)
        else:
            total += torch.ops.aten._adaptive_avg_pool2d_backward(level, input)
    return total


def _has_large_planes(problem: PyramidProblem) -> str | None:
    if problem.size[2] * problem.size[3] < 2**31:
        return None
    return f"its indices have 32 bits: a plane of {problem.size[2]}x{problem.size[3]} has too many pixels"


def _cpu_can_run(problem: PyramidProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    if problem.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"{problem.dtype} is not one of torch.float32, torch.float64, torch.bfloat16"
    return _has_large_planes(problem) or native.cpu_missing()


def _triton_can_run(problem: PyramidProblem) -> str | None:
    return _has_large_planes(problem) or runtime.unavailable(problem.device_type, problem.dtype)


def _cuda_can_run(problem: PyramidProblem) -> str | None:
    if len(problem.bins) > 32:
        return f"its plan holds 16 levels, not {len(problem.bins) // 2}"
    return _has_large_planes(problem) or cuda_can_run(problem)


def _always(problem: PyramidProblem) -> None:
    return None


def _last_resort(problem: PyramidProblem) -> str:
    return "plain PyTorch, bin by bin: for checking, not for speed"


for _name, _framework_run in (("pyramid_pool", _framework), ("pyramid_pool_input", _framework_input)):

    def _native(*args: Any, _name: str = _name) -> Any:
        return getattr(torch.ops.atrous_native, _name)(*args)

    dispatch.register(
        _name,
        [
            Implementation("cpu", _native, _cpu_can_run, _always),
            Implementation("triton", getattr(triton, _name), _triton_can_run, gpu_unmeasured),
            Implementation("cuda", _native, _cuda_can_run, gpu_unmeasured),
            Implementation("torch", _framework_run, _always, _always),
            Implementation("reference", getattr(reference, _name), _always, _last_resort),
        ],
    )
