"""Atrous spatial pyramid pooling and the heads built on it.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (DeepLabv3), 2017, section 3.3 and figure 5;
the separable form is DeepLabv3+ (2018), section 3.1. Keys and order of the branches are those of torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import set_geometry

#: Output stride for which the rates of an ASPP are given (DeepLabv3, section 3.3).
REFERENCE_STRIDE = 16


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int = 1, rate: int = 1, *, separable: bool = False
) -> nn.Sequential:
    """Centred convolution without bias, BatchNorm, ReLU; keys ``0.weight``, ``1.*``.

    ``separable``: a depthwise convolution (with its own BatchNorm and ReLU, as the paper's code has) and a 1x1 convolution.
    """
    padding = rate * (kernel - 1) // 2
    layers: list[nn.Module] = []
    if separable:
        layers += [
            Conv2d(in_channels, in_channels, kernel, padding=padding, dilation=rate, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
        ]
        kernel, padding, rate = 1, 0, 1
    layers += [
        Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=rate, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers)


class ImagePooling(nn.Sequential):
    """Image-level features (DeepLabv3, section 3.3): global average, 1x1 convolution, BatchNorm, ReLU, spread over the map.

    Input ``[N, C, H, W]``, output ``[N, out_channels, H, W]``, constant over each image.

    Raises:
        ValueError: one image in training, where BatchNorm would have a single value per channel.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 and self[2].training:
            raise ValueError(
                "training with a batch of 1: BatchNorm of the image pooling branch has one value per channel, so no "
                "statistics. Use a batch of at least 2 (drop an incomplete last batch), image_pooling=False, or keep "
                "BatchNorm in eval mode"
            )
        # Bilinear interpolation of a single pixel is that pixel everywhere.
        return super().forward(x).expand(-1, -1, x.shape[2], x.shape[3])


class ASPP(nn.Module):
    """Parallel 1x1 and 3x3 convolutions at several rates and image pooling, concatenated and projected.

    Input ``[N, in_channels, H, W]``, output ``[N, out_channels, H, W]``.

    Args:
        rates: of the 3x3 convolutions at output stride 16; ``()`` leaves the 1x1 convolution (and image pooling).
        separable: atrous separable convolutions (DeepLabv3+, section 3.1).
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
        separable: bool = False,
        image_pooling: bool = True,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.rates = tuple(rates)
        if not all(isinstance(rate, int) and rate >= 1 for rate in self.rates):
            raise ValueError(f"rates={self.rates}: expected positive integers, for example (6, 12, 18), or ()")
        if out_channels < 1:
            raise ValueError(f"width of ASPP is {out_channels}: expected a positive integer")
        branches: list[nn.Module] = [conv_bn_relu(in_channels, out_channels)]
        branches += [conv_bn_relu(in_channels, out_channels, 3, rate, separable=separable) for rate in self.rates]
        if image_pooling:
            branches.append(ImagePooling(in_channels, out_channels))
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(*conv_bn_relu(len(branches) * out_channels, out_channels), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.convs], dim=1))

    def set_output_stride(self, output_stride: int) -> None:
        """Keep the field of view in image pixels: rates doubled at output stride 8 (section 3.3), halved at 32."""
        for branch, rate in zip(self.convs[1:], self.rates, strict=False):
            set_geometry(
                cast(Conv2d, cast(nn.Sequential, branch)[0]), 1, max(1, rate * REFERENCE_STRIDE // output_stride)
            )


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
        separable: bool = False,
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
