"""2-D convolution and its two gradients, tap by tap over the positions where the tap reads real input.

output[n, o, y, x] = bias[o] + sum over c, i, j of weight[o, c, i, j] * input[n, c, y*stride - padding + i*dilation, ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from atrous_kernels.problem import forward_axis, out_extent

Taps = Iterator[tuple[int, int, tuple[slice, slice], tuple[slice, slice]]]


def _valid_taps(
    in_size: Sequence[int],
    out_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Taps:
    """Per tap (i, j) the output slices it is valid on and the strided input slices it reads there."""
    axes = [forward_axis(*args) for args in zip(in_size, out_size, kernel, stride, padding, dilation, strict=True)]

    def slices(axis: int, tap: int) -> tuple[slice, slice]:
        first, last = axes[axis].tap_range(tap)
        begin = first * stride[axis] - padding[axis] + tap * dilation[axis]
        return slice(first, last), slice(begin, begin + max((last - first - 1) * stride[axis] + 1, 0), stride[axis])

    for i in range(kernel[0]):
        out_rows, in_rows = slices(0, i)
        for j in range(kernel[1]):
            out_cols, in_cols = slices(1, j)
            if out_rows.start < out_rows.stop and out_cols.start < out_cols.stop:
                yield i, j, (out_rows, out_cols), (in_rows, in_cols)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of ``dtype`` are summed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """[N, C, H, W] and [O, C/groups, kh, kw] -> [N, O, H', W']."""
    dtype = accumulator(input.dtype)
    batch, channels = input.shape[:2]
    out_channels, _, *kernel = weight.shape
    out_size = [out_extent(*a) for a in zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)]
    x = input.to(dtype).reshape(batch, groups, channels // groups, *input.shape[2:])
    w = weight.to(dtype).reshape(groups, out_channels // groups, channels // groups, *kernel)
    out = torch.zeros(batch, groups, out_channels // groups, *out_size, dtype=dtype, device=input.device)
    for i, j, at_out, at_in in _valid_taps(input.shape[2:], out_size, kernel, stride, padding, dilation):
        out[..., at_out[0], at_out[1]] += torch.einsum("ngchw,goc->ngohw", x[..., at_in[0], at_in[1]], w[..., i, j])
    out = out.reshape(batch, out_channels, *out_size)
    if bias is not None:
        out += bias.to(dtype).reshape(-1, 1, 1)
    return out.to(input.dtype)


def conv2d_input(
    input_size: Sequence[int],
    weight: Tensor,
    grad_output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient with respect to the input: [N, O, H', W'] -> ``input_size``."""
    dtype = accumulator(grad_output.dtype)
    batch, channels, *in_size = input_size
    out_channels, _, *kernel = weight.shape
    out_size = grad_output.shape[2:]
    g = grad_output.to(dtype).reshape(batch, groups, out_channels // groups, *out_size)
    w = weight.to(dtype).reshape(groups, out_channels // groups, channels // groups, *kernel)
    grad = torch.zeros(batch, groups, channels // groups, *in_size, dtype=dtype, device=weight.device)
    for i, j, at_out, at_in in _valid_taps(in_size, out_size, kernel, stride, padding, dilation):
        grad[..., at_in[0], at_in[1]] += torch.einsum("ngohw,goc->ngchw", g[..., at_out[0], at_out[1]], w[..., i, j])
    return grad.reshape(batch, channels, *in_size).to(grad_output.dtype)


def conv2d_weight(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient with respect to the weight: [N, C, H, W] and [N, O, H', W'] -> ``weight_size``."""
    dtype = accumulator(input.dtype)
    batch, channels, *in_size = input.shape
    out_channels, _, *kernel = weight_size
    out_size = grad_output.shape[2:]
    x = input.to(dtype).reshape(batch, groups, channels // groups, *in_size)
    g = grad_output.to(dtype).reshape(batch, groups, out_channels // groups, *out_size)
    grad = torch.zeros(groups, out_channels // groups, channels // groups, *kernel, dtype=dtype, device=input.device)
    for i, j, at_out, at_in in _valid_taps(in_size, out_size, kernel, stride, padding, dilation):
        grad[..., i, j] = torch.einsum("ngohw,ngchw->goc", g[..., at_out[0], at_out[1]], x[..., at_in[0], at_in[1]])
    return grad.reshape(list(weight_size)).to(input.dtype)
