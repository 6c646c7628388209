"""Xception-65, modified for segmentation: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation" (DeepLabv3+), 2018, section 3.2 and figure 4; after Chollet, "Xception", 2016, and Qi et al. 2017.

Deeper than Chollet's, every max pooling replaced by a strided separable convolution, BatchNorm after every depthwise
convolution. As in the authors' code, a ReLU stands before each separable convolution, and only the last module has one after
each BatchNorm instead. Names follow their scopes: ``entry.block2.convs.1`` is ``entry_flow/block2/separable_conv2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone, ConvBN, Geometry, plan_geometry, set_geometry

ENTRY_WIDTHS = (128, 256, 728)
MIDDLE_REPEATS = 16
EXIT_WIDTHS = ((728, 1024, 1024), (1536, 1536, 2048))
STEM_WIDTHS = (32, 64)
# TensorFlow's decay of 0.9997 is a momentum of 0.0003 here.
BN_EPS, BN_MOMENTUM = 1e-3, 3e-4


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


def _separable(in_channels: int, out_channels: int, relus_inside: bool) -> ConvBN:
    """Depthwise 3x3 and 1x1 convolution, each with BatchNorm; ReLU before both, or after each."""
    depthwise = [Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False), _batch_norm(in_channels)]
    pointwise = [Conv2d(in_channels, out_channels, 1, bias=False), _batch_norm(out_channels)]
    if relus_inside:
        return ConvBN(*depthwise, nn.ReLU(inplace=True), *pointwise, nn.ReLU(inplace=True))
    return ConvBN(*depthwise, *pointwise)


class XceptionBlock(nn.Module):
    """Three separable convolutions; the last one has the stride.

    Args:
        shortcut: ``"conv"`` (1x1 with the stride), ``"sum"`` or ``"none"``.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], stride: int, shortcut: str) -> None:
        super().__init__()
        self.relu_first = shortcut != "none"
        channels = [in_channels, *widths]
        self.convs = nn.ModuleList(
            _separable(into, out, not self.relu_first) for into, out in pairwise(channels)
        )
        self.shortcut = shortcut
        if shortcut == "conv":
            self.project = ConvBN(Conv2d(in_channels, widths[-1], 1, stride=stride, bias=False), _batch_norm(widths[-1]))
        self.native_stride = stride

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and that of its second convolution, which the decoder of DeepLabv3+ reads."""
        y = inner = x
        for index, conv in enumerate(self.convs):
            # Not in place: the shortcut reads the block's input, the decoder the second output.
            y = conv(F.relu(y) if self.relu_first else y)
            if index == 1:
                inner = y
        if self.shortcut == "conv":
            y = y + self.project(x)
        elif self.shortcut == "sum":
            y = y + x
        return y, inner

    def set_geometry(self, geometry: Geometry, grid: Sequence[int] = (1, 1, 1)) -> None:
        # All three convolutions read or make the map before the stride: they have the rate before it.
        for index, (conv, factor) in enumerate(zip(self.convs, grid, strict=True)):
            depthwise = cast(Conv2d, cast(nn.Sequential, conv)[0])
            set_geometry(depthwise, geometry.stride if index == 2 else 1, geometry.first_rate * factor)
        if self.shortcut == "conv":
            set_geometry(cast(Conv2d, self.project[0]), geometry.stride, rate=1)


class Xception65(Backbone):
    """Xception-65: ``low`` is the second separable convolution of entry block 2 (256 channels), ``aux`` the middle flow (728),
    ``out`` the exit flow (2048).

    Args:
        output_stride: 4, 8, 16 or 32.
        multi_grid: one factor per separable convolution of the last block; None is all ones.
        width_mult: factor on all widths; 1 is the published network.
        middle_repeats: blocks of the middle flow; 16 is the published network.

    Raises:
        ValueError: an argument outside these.
    """

    # TensorFlow's x / 127.5 - 1
    input_mean = (0.5, 0.5, 0.5)
    input_std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        output_stride: int = 32,
        multi_grid: Sequence[int] | None = None,
        width_mult: float = 1.0,
        middle_repeats: int = MIDDLE_REPEATS,
    ) -> None:
        super().__init__()
        self.multi_grid = (1, 1, 1) if multi_grid is None else tuple(multi_grid)
        if len(self.multi_grid) != 3 or not all(isinstance(rate, int) and rate >= 1 for rate in self.multi_grid):
            raise ValueError(f"multi_grid={self.multi_grid}: expected 3 positive integers, for example (1, 2, 4)")
        if not width_mult > 0:
            raise ValueError(f"width_mult={width_mult!r}: expected a positive number")
        if not isinstance(middle_repeats, int) or middle_repeats < 1:
            raise ValueError(f"middle_repeats={middle_repeats!r}: expected a positive integer")

        def width(channels: int) -> int:
            return max(1, round(channels * width_mult))

        stem = [width(channels) for channels in STEM_WIDTHS]
        self.stem = ConvBN(
            Conv2d(3, stem[0], 3, stride=2, padding=1, bias=False), _batch_norm(stem[0]), nn.ReLU(inplace=True),
            Conv2d(stem[0], stem[1], 3, padding=1, bias=False), _batch_norm(stem[1]), nn.ReLU(inplace=True),
        )  # fmt: skip
        channels = stem[1]
        self.entry = nn.ModuleDict()
        for index, entry_width in enumerate(map(width, ENTRY_WIDTHS), start=1):
            self.entry[f"block{index}"] = XceptionBlock(channels, [entry_width] * 3, 2, "conv")
            channels = entry_width
        self.middle = nn.ModuleList(XceptionBlock(channels, [channels] * 3, 1, "sum") for _ in range(middle_repeats))
        exits = [[width(channels) for channels in widths] for widths in EXIT_WIDTHS]
        self.exit = nn.ModuleDict(
            {
                "block1": XceptionBlock(channels, exits[0], 2, "conv"),
                "block2": XceptionBlock(exits[0][-1], exits[1], 1, "none"),
            }
        )
        self.channels = {"low": width(ENTRY_WIDTHS[1]), "aux": channels, "out": exits[1][-1]}
        self.set_output_stride(output_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, _ = self.entry["block1"](self.stem(x))
        x, low = self.entry["block2"](x)
        x, _ = self.entry["block3"](x)
        for block in self.middle:
            x, _ = block(x)
        aux = x
        x, _ = self.exit["block1"](x)
        x, _ = self.exit["block2"](x)
        return {"low": low, "aux": aux, "out": x}

    def _apply_output_stride(self, output_stride: int) -> None:
        blocks = [cast(XceptionBlock, b) for b in (*self.entry.values(), *self.middle, *self.exit.values())]
        plan = list(plan_geometry([block.native_stride for block in blocks], 2, output_stride))
        for block, geometry in zip(blocks[:-1], plan, strict=False):
            block.set_geometry(geometry)
        blocks[-1].set_geometry(plan[-1], self.multi_grid)
