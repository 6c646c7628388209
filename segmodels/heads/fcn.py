"""The small head of an auxiliary loss, and of a plain FCN; keys of torchvision's ``FCNHead``."""

from __future__ import annotations

from torch import nn

from atrous_kernels.nn import Conv2d
from segmodels.heads.aspp import conv_bn_relu


class FCNHead(nn.Sequential):
    """3x3 convolution to a quarter of the channels, BatchNorm, ReLU, dropout 0.1, 1x1 convolution to the classes."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        hidden = max(1, in_channels // 4)
        super().__init__(*conv_bn_relu(in_channels, hidden, 3), nn.Dropout(0.1), Conv2d(hidden, num_classes, 1))

    def set_output_stride(self, output_stride: int) -> None:
        """Nothing depends on it."""
