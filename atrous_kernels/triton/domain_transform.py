"""The recursive domain transform and its gradients.

A program has a few lanes, each a channel of a row or column, and walks along them: what a step needs of the one before stays in
registers. Neighbouring lanes are neighbours in memory where the pass allows it: channels-last always, else along columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atrous_kernels.problem import TransformProblem, transform_passes
from atrous_kernels.triton.runtime import Launch, kernel, new_tensor, run, unavailable

if TYPE_CHECKING:
    import triton.language as tl

LANES = 32  # one warp: a step waits for its loads, so many small programs are better than few large ones
_SIZES = ["channels", "across", "length"]


@kernel()
def _lanes(program, channels, across, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Image, channels, positions across the sequences, and which lanes exist."""
    blocks = tl.cdiv(channels * across, BLOCK)
    lane = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = lane < channels * across
    channel = lane % channels if CHANNELS_LAST else lane // across
    cross = lane // channels if CHANNELS_LAST else lane % across
    return (program // blocks).to(tl.int64), channel.to(tl.int64), cross.to(tl.int64), inside


@kernel()
def _weight(edge, rate, slope, inside):
    return tl.exp(-rate - slope * tl.load(edge, mask=inside, other=0.0))


@kernel(do_not_specialize=_SIZES)
def _filter(
    src, dst, edge, rate, slope, channels, across, length,
    src_n, src_c, src_step, src_cross, dst_n, dst_c, dst_step, dst_cross, edge_n, edge_step, edge_cross,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, channel, cross, inside = _lanes(tl.program_id(0), channels, across, CHANNELS_LAST, BLOCK)
    src += image * src_n + channel * src_c + cross * src_cross
    dst += image * dst_n + channel * dst_c + cross * dst_cross
    edge += image * edge_n + cross * edge_cross
    y = tl.load(src, mask=inside, other=0.0).to(tl.float32)
    tl.store(dst, y, mask=inside)
    for _ in range(1, length):
        src += src_step
        dst += dst_step
        edge += edge_step
        x = tl.load(src, mask=inside, other=0.0).to(tl.float32)
        y = x + _weight(edge, rate, slope, inside) * (y - x)
        tl.store(dst, y, mask=inside)
    tl.debug_barrier()  # another thread may have written what is read now
    for _ in range(1, length):
        dst -= dst_step
        x = tl.load(dst, mask=inside, other=0.0)
        y = x + _weight(edge, rate, slope, inside) * (y - x)
        tl.store(dst, y, mask=inside)
        edge -= edge_step


@kernel(do_not_specialize=_SIZES)
def _gradient(
    src, grad, ahead, behind, of_edge, edge, rate, slope, channels, across, length,
    src_n, src_c, src_step, src_cross, grad_n, grad_c, grad_step, grad_cross, edge_n, edge_step, edge_cross,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both recurrences again, which leave the differences that their weights multiply, then back through the two.

    ``grad``, of what the pass wrote, becomes that of what it read; ``of_edge`` is added to. They, ``ahead`` and ``behind`` have
    the same strides.
    """
    image, channel, cross, inside = _lanes(tl.program_id(0), channels, across, CHANNELS_LAST, BLOCK)
    src += image * src_n + channel * src_c + cross * src_cross
    at = image * grad_n + channel * grad_c + cross * grad_cross
    grad += at
    ahead += at
    behind += at
    of_edge += at
    edge += image * edge_n + cross * edge_cross
    y = tl.load(src, mask=inside, other=0.0).to(tl.float32)
    tl.store(ahead, y, mask=inside)
    for _ in range(1, length):
        src += src_step
        ahead += grad_step
        behind += grad_step
        edge += edge_step
        x = tl.load(src, mask=inside, other=0.0).to(tl.float32)
        tl.store(behind, y - x, mask=inside)
        y = x + _weight(edge, rate, slope, inside) * (y - x)
        tl.store(ahead, y, mask=inside)
    tl.debug_barrier()
    for _ in range(1, length):
        ahead -= grad_step
        x = tl.load(ahead, mask=inside, other=0.0)
        tl.store(ahead, y - x, mask=inside)
        y = x + _weight(edge, rate, slope, inside) * (y - x)
        edge -= edge_step
    tl.debug_barrier()
    total = tl.load(grad, mask=inside, other=0.0)
    for _ in range(1, length):
        edge += edge_step
        of_edge += grad_step
        weight = _weight(edge, rate, slope, inside)
        found = slope * weight * total * tl.load(ahead, mask=inside, other=0.0)
        tl.store(of_edge, tl.load(of_edge, mask=inside, other=0.0) - found, mask=inside)
        tl.store(grad, total - weight * total, mask=inside)
        grad += grad_step
        ahead += grad_step
        total = tl.load(grad, mask=inside, other=0.0) + weight * total
    tl.debug_barrier()  # the last position keeps its total in the register
    for _ in range(1, length):
        weight = _weight(edge, rate, slope, inside)
        found = slope * weight * total * tl.load(behind, mask=inside, other=0.0)
        tl.store(of_edge, tl.load(of_edge, mask=inside, other=0.0) - found, mask=inside)
        tl.store(grad, total - weight * total, mask=inside)
        grad -= grad_step
        behind -= grad_step
        of_edge -= grad_step
        edge -= edge_step
        total = tl.load(grad, mask=inside, other=0.0) + weight * total
    tl.store(grad, total, mask=inside)


def can_run(problem: TransformProblem) -> str | None:
    """None where these kernels can compute ``problem`` and its gradients, else the reason why not."""
    batch, channels, height, width = problem.size
    if batch * (channels * max(height, width) + LANES) >= 2**31:
        return f"{batch} x {channels} x {max(height, width)} sequences are counted in 32 bits"
    return unavailable(problem.device_type, problem.dtype)


def _launch(function: Any, axis: int, rate: float, slope: float, src: Tensor, dst: Tensor, edge: Tensor, **others: Any) -> Launch:
    """One pass; ``dst`` names the tensor whose sizes and strides the others share."""
    batch, channels, height, width = dst.shape
    across, length = (height, width) if axis == 0 else (width, height)

    def steps(name: str, tensor: Tensor) -> dict[str, int]:
        along, cross = (tensor.stride(-1), tensor.stride(-2)) if axis == 0 else (tensor.stride(-2), tensor.stride(-1))
        return {f"{name}_n": tensor.stride(0), f"{name}_step": along, f"{name}_cross": cross}

    name = "dst" if function is _filter else "grad"
    one = edge.select(1, axis)
    arguments = {
        "src": src, name: dst, "edge": one, **others, "rate": rate, "slope": slope, "channels": channels, "across": across,
        "length": length, "src_c": src.stride(1), f"{name}_c": dst.stride(1), **steps("src", src), **steps(name, dst),
        **steps("edge", one),
    }  # fmt: skip
    channels_last = dst.stride(1) == 1 and channels > 1
    grid = (batch * -(-channels * across // LANES),)
    return Launch(function, grid, arguments, {"CHANNELS_LAST": channels_last, "BLOCK": LANES}, 1, 1)


def plan(input: Tensor, edge: Tensor, *numbers: Any) -> tuple[Tensor, list[Launch]]:
    """The unwritten result of :func:`domain_transform`, in float32, and the launches that write it."""
    out = new_tensor(input.shape, input, dtype=torch.float32)
    launches = []
    for index, one in enumerate(transform_passes(*numbers)):
        launches.append(_launch(_filter, *one, out if index else input, out, edge))
    return out, launches


def plan_backward(grad: Tensor, input: Tensor, edge: Tensor, *numbers: Any) -> tuple[Tensor, list[Tensor], list[Launch]]:
    """The gradient of input, laid out as it; per axis and channel that of the edges; and the launches that write them."""
    passes = list(transform_passes(*numbers))
    found = new_tensor(input.shape, input, dtype=torch.float32).copy_(grad)
    ahead, behind = torch.empty_like(found), torch.empty_like(found)
    of_edges = [torch.zeros_like(found) for _ in range(2)]
    saved = [input, *(torch.empty_like(found) for _ in passes[1:])]
    launches = [_launch(_filter, *one, src, dst, edge) for one, src, dst in zip(passes, saved, saved[1:], strict=False)]
    for (axis, rate, slope), src in zip(reversed(passes), reversed(saved), strict=True):
        others = {"ahead": ahead, "behind": behind, "of_edge": of_edges[axis]}
        launches.append(_launch(_gradient, axis, rate, slope, src, found, edge, **others))
    return found, of_edges, launches


def domain_transform(input: Tensor, edge: Tensor, *numbers: Any) -> Tensor:
    """[N, C, H, W] filtered; edge float32 [N, 2, H, W]. All passes are computed in float32."""
    out, launches = plan(input, edge, *numbers)
    run(launches, input.device)
    return out.to(input.dtype)


def domain_transform_backward(grad: Tensor, input: Tensor, edge: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    """The gradients of input and edge; the sum over the channels has a fixed order."""
    found, of_edges, launches = plan_backward(grad, input, edge, *numbers)
    run(launches, input.device)
    return found.to(input.dtype), torch.stack([each.sum(1) for each in of_edges], 1)
