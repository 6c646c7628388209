"""``torch.ops.atrous.upsample_concat``: a map and bilinearly upsampled smaller ones, concatenated over channels.

Its gradients are a slice of the incoming one and, per level, two matrix products with the transposed interpolation: plain
differentiable operations, so double backward needs no code of its own.
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
from atrous_kernels.ops.conv2d import is_channels_last
from atrous_kernels.reference import upsample_concat as reference
from atrous_kernels.reference.upsample_concat import interpolation_matrix

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define("upsample_concat(Tensor input, Tensor[] levels, bool align_corners, str backend) -> Tensor")


@dataclass(frozen=True)
class ConcatProblem:
    """One call as numbers; ``levels`` are (channels, rows, columns)."""

    size: tuple[int, int, int, int]
    levels: tuple[tuple[int, int, int], ...]
    align_corners: bool
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"

    @property
    def min_bytes(self) -> int:
        """The input read once and the concatenation written once."""
        n, c, h, w = self.size
        return n * h * w * (2 * c + sum(level[0] for level in self.levels)) * self.dtype.itemsize

    def cost(self) -> str:
        return f"at least {self.min_bytes / 1e6:.1f} MB of memory traffic"

    def __str__(self) -> str:
        levels = ", ".join("x".join(map(str, level)) for level in self.levels)
        corners = "aligned" if self.align_corners else "not aligned"
        sizes = "x".join(map(str, self.size))
        return f"{sizes} with {levels}, corners {corners}, {str(self.dtype).removeprefix('torch.')} on {self.device_type}"


def problem_of(input: Tensor, levels: Sequence[Tensor], align_corners: bool) -> ConcatProblem:
    """The numbers of one call."""
    n, c, h, w = input.shape
    shapes = tuple((level.shape[1], level.shape[2], level.shape[3]) for level in levels)
    return ConcatProblem((n, c, h, w), shapes, align_corners, input.dtype, input.device.type)


def _upsample_concat(input: Tensor, levels: Sequence[Tensor], align_corners: bool, backend: str) -> Tensor:
    if backend == dispatch.AUTO:
        backend = dispatch.default_backend("upsample_concat")
    problem = problem_of(input, levels, align_corners)
    run = dispatch.choose("upsample_concat", problem, backend, (problem,)).run
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return run(input, list(levels), align_corners).contiguous(memory_format=layout)


for _key in ("CPU", "CUDA"):
    _library.impl("upsample_concat", _upsample_concat, _key)


@torch.library.register_fake("atrous::upsample_concat", lib=_library)
def _fake(input, levels, align_corners, backend):
    channels = input.shape[1] + sum(level.shape[1] for level in levels)
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    size = [input.shape[0], channels, *input.shape[2:]]
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, levels, ctx.align_corners, _ = inputs
    ctx.channels = input.shape[1]
    ctx.level_sizes = [level.shape for level in levels]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads, begin = [], ctx.channels
    for _, channels, rows, columns in ctx.level_sizes:
        at_rows = interpolation_matrix(grad.shape[2], rows, ctx.align_corners, grad)
        at_columns = interpolation_matrix(grad.shape[3], columns, ctx.align_corners, grad)
        here = grad[:, begin : begin + channels]
        begin += channels
        if is_channels_last(grad):  # channels innermost: [N, H, columns, C], then [N, rows, columns * C]
            narrow = at_columns.t() @ here.permute(0, 2, 3, 1)
            small = (at_rows.t() @ narrow.flatten(2)).unflatten(2, (columns, channels)).permute(0, 3, 1, 2)
        else:
            small = at_rows.t() @ (here @ at_columns)
        grads.append(small)
    return grad[:, : ctx.channels], grads, None, None


torch.library.register_autograd("atrous::upsample_concat", _backward, setup_context=_save, lib=_library)
upsample_concat = torch.ops.atrous.upsample_concat.default


# Implementations ------------------------------------------------------------------------------------------------------


def _framework(input: Tensor, levels: Sequence[Tensor], align_corners: bool) -> Tensor:
    size = input.shape[2:]
    return torch.cat([input, *(F.interpolate(v, size, mode="bilinear", align_corners=align_corners) for v in levels)], 1)


def _cpu_can_run(problem: ConcatProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    if problem.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"{problem.dtype} is not one of torch.float32, torch.float64, torch.bfloat16"
    return native.cpu_missing()


def _always(problem: ConcatProblem) -> None:
    return None


def _last_resort(problem: ConcatProblem) -> str:
    return "plain PyTorch, a matrix per axis: for checking, not for speed"


def _native(*args: Any) -> Tensor:
    return torch.ops.atrous_native.upsample_concat(*args)


dispatch.register(
    "upsample_concat",
    [
        Implementation("cpu", _native, _cpu_can_run, _always),
        Implementation("torch", _framework, _always, _always),
        Implementation("reference", reference.upsample_concat, _always, _last_resort),
    ],
)
