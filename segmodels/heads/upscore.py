"""Bilinear upsampling as a transposed convolution (FCN, section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.ops.conv2d import conv2d_input


class Upscore(nn.Module):
    """``[N, C, h, w]`` to ``[N, C, stride * (h - 1) + kernel, stride * (w - 1) + kernel]``; zeros beyond the map.

    Args:
        kernel, stride: Value ``i`` of the map is centred on row ``stride * i + (kernel - 1) / 2`` of the result.
        learned: the kernel ``[C, C, kernel, kernel]`` is a parameter that starts as bilinear interpolation of each channel;
            otherwise it stays that.
    """

    weight: Tensor

    def __init__(self, channels: int, kernel: int, stride: int, *, learned: bool = False) -> None:
        super().__init__()
        self.channels, self.kernel, self.stride = channels, kernel, stride
        self.groups = 1 if learned else channels
        if learned:
            self.weight = nn.Parameter(torch.empty(channels, channels, kernel, kernel))
        else:
            self.register_buffer("weight", torch.empty(channels, 1, kernel, kernel), persistent=False)
        with torch.no_grad():
            self.weight.zero_()
            taps = range(channels)
            self.weight[taps, taps if learned else 0] = bilinear_kernel(kernel).to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        size = [x.shape[0], self.channels, *(self.stride * (n - 1) + self.kernel for n in x.shape[2:])]
        stride = [self.stride, self.stride]
        # The transpose of a convolution is its gradient with respect to its input.
        return conv2d_input(size, self.weight.to(x.dtype), x, stride, [0, 0], [1, 1], self.groups, "auto")

    def extra_repr(self) -> str:
        learned = isinstance(self.weight, nn.Parameter)
        return f"{self.channels}, kernel={self.kernel}, stride={self.stride}, learned={learned}"


def bilinear_kernel(size: int) -> Tensor:
    """float32 ``[size, size]``: a tent, one in its centre, zero from ``(size + 1) // 2`` rows away."""
    reach = (size + 1) // 2
    tent = 1 - (torch.arange(size) - (size - 1) / 2).abs() / reach
    return tent[:, None] * tent[None, :]


def upsample_from_corner(x: Tensor, stride: int, size: torch.Size) -> Tensor:
    """Bilinear, to ``size`` (height, width). Value ``i`` of the map is row ``stride * i``; the last one is repeated beyond it."""
    between = F.interpolate(x, size=[stride * (n - 1) + 1 for n in x.shape[2:]], mode="bilinear", align_corners=True)
    return crop(F.pad(between, (0, stride - 1, 0, stride - 1), mode="replicate"), 0, size)


def crop(x: Tensor, offset: int, size: torch.Size) -> Tensor:
    """Rows and columns ``offset`` to ``offset + size`` (height, width)."""
    height, width = size
    return x[:, :, offset : offset + height, offset : offset + width]
