"""``torch.ops.atrous.permutohedral_lattice``: where points lie in the permutohedral lattice, once for any number of filters.

The lattice travels as plain tensors, so that it can be kept, exported and shared between threads. It is differentiable: within a
simplex its weights are linear in the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atrous_kernels import dispatch, native
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops.conv2d import gpu_unmeasured
from atrous_kernels.reference import permutohedral_lattice as reference

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define("permutohedral_lattice(Tensor features, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")

MOST_DIMENSIONS = 6


class PermutohedralLattice(NamedTuple):
    """What :func:`atrous_kernels.permutohedral_filter` reads. P points of all images, M vertices, d + 1 corners per point."""

    vertices: Tensor  #: int32 ``[N, *spatial, d + 1]``: the vertex at each corner of a point's simplex
    weights: Tensor  #: ``[N, *spatial, d + 1]``: the barycentric coordinates; carries the gradient of the features
    neighbours: Tensor  #: int32 ``[d + 1, M, 2]``: per axis the vertices on both sides, M where there is none
    begin: Tensor  #: int64 ``[M + 1]``: where each vertex's part of the next two begins
    points: Tensor  #: int32 ``[P (d + 1)]``: the points of every vertex
    point_weights: Tensor  #: ``[P (d + 1)]``: their weights, those of ``weights`` in another order

    def arrays(self) -> tuple[Tensor, ...]:
        """The six as the ops take them."""
        return self.vertices.flatten(0, -2), self.weights.flatten(0, -2), *self[2:]


@dataclass(frozen=True)
class LatticeProblem:
    """One call as numbers; no channels: making the lattice."""

    points: int
    dimensions: int
    channels: int = 0
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"

    def cost(self) -> str:
        corners = self.points * (self.dimensions + 1)
        if not self.channels:
            return f"{corners} corners to find in the hash"
        return f"{4e-6 * corners * self.channels:.1f} MFLOP into the vertices and out of them, besides the blur"

    def __str__(self) -> str:
        channels = f" of {self.channels} channels" if self.channels else ""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.points} points{channels} in {self.dimensions} dimensions, {kind} on {self.device_type}"


def pick(op: str, backend: str, problem: LatticeProblem) -> Implementation:
    """The implementation that runs a call of one of the ops on lattices."""
    if backend == dispatch.AUTO:
        backend = dispatch.default_backend(op)
    return dispatch.cached(op, backend, (problem,)) or dispatch.choose(op, problem, backend, (problem,))


def problem_of(features: Tensor) -> LatticeProblem:
    """The numbers of a call with features [images, points, d]."""
    images, points, d = features.shape
    return LatticeProblem(images * points, d, 0, features.dtype, features.device.type)


def _lattice(features: Tensor, backend: str) -> reference.Arrays:
    return pick("permutohedral_lattice", backend, problem_of(features)).run(features)


for _key in ("CPU", "CUDA"):
    _library.impl("permutohedral_lattice", _lattice, _key)


@torch.library.register_fake("atrous::permutohedral_lattice", lib=_library)
def _fake(features, backend):
    images, points, d = features.shape
    vertices = torch.library.get_ctx().new_dynamic_size()
    corners = [images * points, d + 1]

    def empty(*sizes: Any, dtype: torch.dtype = features.dtype) -> Tensor:
        return features.new_empty(sizes, dtype=dtype)

    return (
        empty(*corners, dtype=torch.int32),
        empty(*corners),
        empty(d + 1, vertices, 2, dtype=torch.int32),
        empty(vertices + 1, dtype=torch.int64),
        empty(images * points * (d + 1), dtype=torch.int32),
        empty(images * points * (d + 1)),
        empty(*corners, dtype=torch.uint8),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: reference.Arrays) -> None:
    ctx.size = inputs[0].shape
    ctx.mark_non_differentiable(*output[:1], *output[2:])
    ctx.save_for_backward(output[6])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    (ranks,) = ctx.saved_tensors
    return reference.features_gradient(grads[1], ranks).view(ctx.size), None


torch.library.register_autograd("atrous::permutohedral_lattice", _backward, setup_context=_save, lib=_library)

permutohedral_lattice = torch.ops.atrous.permutohedral_lattice.default


def cpu_can_run(problem: LatticeProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    return _native_cannot(problem) or native.cpu_missing()


def cuda_can_run(problem: LatticeProblem) -> str | None:
    if problem.device_type != "cuda":
        return f"runs on CUDA devices, not on {problem.device_type}"
    return _native_cannot(problem) or native.cuda_missing()


def _native_cannot(problem: LatticeProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.float64):
        return f"{problem.dtype} is not one of torch.float32, torch.float64"
    if not 1 <= problem.dimensions <= MOST_DIMENSIONS:
        return f"has code for 1 to {MOST_DIMENSIONS} dimensions, not for {problem.dimensions}"
    if problem.points * (problem.dimensions + 1) >= 2**31:
        return f"its indices have 32 bits: {problem.points} points have too many corners"
    return None


def always(problem: LatticeProblem) -> None:
    return None


def last_resort(problem: LatticeProblem) -> str:
    return "plain PyTorch by the definition: for checking, not for speed"


def _native(features: Tensor) -> reference.Arrays:
    return torch.ops.atrous_native.permutohedral_lattice(features)


dispatch.register(
    "permutohedral_lattice",
    [
        Implementation("cpu", _native, cpu_can_run, always),
        Implementation("cuda", _native, cuda_can_run, gpu_unmeasured),
        Implementation("reference", reference.permutohedral_lattice, always, last_resort),
    ],
)
