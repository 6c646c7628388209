"""Atrous spatial pyramid pooling and the heads built on it.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (DeepLabv3), 2017, section 3.3 and figure 5;
the separable form is DeepLabv3+ (2018), section 3.1. Keys and order of the branches are those of torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from atrous_kernels import nn as kernels
from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import ConvBN, set_geometry

#: Output stride for which the rates of an ASPP are given (DeepLabv3, section 3.3).
REFERENCE_STRIDE = 16


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int = 1, rate: int = 1, *, separable: bool | str = False
) -> nn.Sequential:
    """Centred convolution without bias, BatchNorm, ReLU; keys ``0.weight``, ``1.*``.

    ``separable``: a depthwise convolution (with its own BatchNorm and ReLU, as the authors' code has) and a 1x1 convolution;
    ``"bare"``: without those two.
    """
    padding = rate * (kernel - 1) // 2
    layers: list[nn.Module] = []
    if separable:
        layers += [
            Conv2d(in_channels, in_channels, kernel, padding=padding, dilation=rate, groups=in_channels, bias=False)
        ]
        if separable != "bare":
            layers += [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)]
        kernel, padding, rate = 1, 0, 1
    layers += [
        Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=rate, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
    return ConvBN(*layers)


def check_separable(separable: bool | str) -> None:
    if separable not in (True, False, "bare"):
        raise ValueError(f"separable={separable!r}: expected True, False or 'bare'")


class ASPP(kernels.ASPP):
    """Parallel 1x1 and 3x3 convolutions at several rates and image pooling, concatenated and projected.

    Input ``[N, in_channels, H, W]``, output ``[N, out_channels, H, W]``.

    Args:
        rates: of the 3x3 convolutions at output stride 16; ``()`` leaves the 1x1 convolution (and image pooling).
        separable: atrous separable convolutions (DeepLabv3+, section 3.1); ``"bare"``: without BatchNorm and ReLU between the
            two, as segmentation_models.pytorch.
        image_pooling: with the image-level branch.
        dropout: after the projection (torchvision 0.5, the paper's code 0.1).

    Raises:
        ValueError: an argument outside these.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        *,
        separable: bool | str = False,
        image_pooling: bool = True,
        dropout: float = 0.5,
    ) -> None:
        check_separable(separable)
        self.separable = separable
        super().__init__(in_channels, out_channels, rates, image_pooling, dropout=dropout)

    def _layer(self, in_channels: int, out_channels: int, kernel: int, rate: int) -> nn.Sequential:
        return conv_bn_relu(in_channels, out_channels, kernel, rate, separable=kernel > 1 and self.separable)

    def forward(self, x: Tensor) -> Tensor:
        if not self.separable:
            return super().forward(x)
        return self.project(torch.cat([branch(x) for branch in self.convs], dim=1))

    def set_output_stride(self, output_stride: int) -> None:
        """Keep the field of view in image pixels: rates doubled at output stride 8 (section 3.3), halved at 32."""
        for branch, rate in zip(self.convs[1:], self.rates, strict=False):
            set_geometry(
                cast(Conv2d, cast(nn.Sequential, branch)[0]), 1, max(1, rate * REFERENCE_STRIDE // output_stride)
            )


class PlainHead(nn.Sequential):
    """A 1x1 convolution to the classes, key ``0``: the head of DeepLabv3's cascade (section 3.2)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(Conv2d(in_channels, num_classes, 1))

    def set_output_stride(self, output_stride: int) -> None:
        """Nothing depends on it."""


class DeepLabHead(nn.Sequential):
    """ASPP and classifier of DeepLabv3: keys ``0`` (ASPP), ``1``-``2`` (3x3 convolution, BatchNorm), ``4`` (1x1 to classes).

    ``head_conv`` is torchvision's additional 3x3 convolution; the paper has none, and then the keys are ``0`` and ``1``.
    Other arguments as in :class:`ASPP`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        rates: Sequence[int] = (6, 12, 18),
        *,
        channels: int = 256,
        separable: bool | str = False,
        image_pooling: bool = True,
        dropout: float = 0.5,
        head_conv: bool = True,
    ) -> None:
        aspp = ASPP(in_channels, channels, rates, separable=separable, image_pooling=image_pooling, dropout=dropout)
        refine = conv_bn_relu(channels, channels, 3) if head_conv else ()
        super().__init__(aspp, *refine, Conv2d(channels, num_classes, 1))

    def set_output_stride(self, output_stride: int) -> None:
        """As :meth:`ASPP.set_output_stride`."""
        cast(ASPP, self[0]).set_output_stride(output_stride)
