"""VGG-16 (Simonyan and Zisserman, "Very Deep Convolutional Networks", 2015, configuration D) as the papers before ResNet use it.

fc6 and fc7 run as convolutions (FCN, section 3.1). What the systems change is geometry only, so one set of published weights
serves them all: FCN pads conv1_1 by 100; DeepLab v1 and v2 keep the last two pools at stride 1; Yu & Koltun remove them and every
padding. Keys of the convolutions are torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.classic import ClassicBackbone, grid_of, init_convolutions
from segmodels.backbones.surgery import (
    VGG16_LAYERS,
    as_convolution,
    fold_caffe_input,
    renamed_layers,
    subsampled,
    widen_input,
)

#: width and number of convolutions of each stage, all 3x3 and followed by a pool
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

FC_KEYS = ("fc6.weight", "fc6.bias", "fc7.weight", "fc7.bias")
#: what every backbone has -> which pool it is here
LEVELS = {"low": "pool2", "mid": "pool3", "aux": "pool4"}


class FullyConnected(NamedTuple):
    """fc6 as a convolution; fc7 is 1x1 and as wide.

    ``average_pool``: a 3x3 average of stride 1 before it, so that its few taps see the pixels between them (pool5a).
    """

    kernel: int
    rate: int
    padding: int
    channels: int = 4096
    average_pool: bool = False


#: fc6 of FCN; of Yu & Koltun's front end; of DeepLab v1 by the names of its section on the field of view
FC6 = {
    "fcn": FullyConnected(7, 1, 0),
    "front-end": FullyConnected(7, 4, 0),
    "4x4": FullyConnected(4, 4, 6),
    "4x4-wide": FullyConnected(4, 8, 12),
    "7x7": FullyConnected(7, 4, 12),
    "largefov": FullyConnected(3, 12, 12, 1024, average_pool=True),
}


class VGG16(ClassicBackbone):
    """VGG-16: ``pool1`` to ``pool5`` (``low`` is pool2, ``mid`` pool3, ``aux`` pool4) and ``out``, which is
    fc7 or, without it, pool5.

    Sizes are Caffe's: pools round up. Pools beyond ``output_stride`` run at stride 1, and everything after them at the rate that
    replaces their stride.

    Args:
        output_stride: 8, 16 or 32.
        fc6: a name in :data:`FC6`, or None for the convolutional body alone. Its rate is that of the paper's output stride.
        in_channels: more than three where depth is fused early.
        first_padding: of conv1_1; FCN has 100.
        layer_padding: False leaves all zeros out (Yu & Koltun, section 4).
        pool: size of the max pools: 2, or 3 with a border of one (DeepLab). A pool of 2 at stride 1 loses a row and a column.
        dense_pools: False removes pools that have lost their stride (Yu & Koltun, section 4).
        dropout: after fc6 and fc7, in training.
        width_mult: factor on all widths; 1 is the published network.

    Raises:
        ValueError: an argument outside these.
    """

    output_strides = (8, 16, 32)
    classifier_prefixes = ("classifier.6.",)

    def __init__(
        self,
        output_stride: int = 32,
        fc6: str | None = None,
        *,
        in_channels: int = 3,
        first_padding: int = 1,
        layer_padding: bool = True,
        pool: int = 2,
        dense_pools: bool = True,
        dropout: float = 0.5,
        width_mult: float = 1.0,
    ) -> None:
        super().__init__()
        if fc6 is not None and fc6 not in FC6:
            raise ValueError(f"fc6={fc6!r}: expected None or one of {', '.join(FC6)}")
        if pool not in (2, 3):
            raise ValueError(f"pool={pool!r}: expected 2 or 3")
        if STAGES[0][0] * width_mult < 1:
            raise ValueError(f"width_mult={width_mult}: expected at least {1 / STAGES[0][0]}, one channel in conv1_1")
        self.in_channels, self.first_padding, self.layer_padding = in_channels, first_padding, layer_padding
        self.pool, self.dense_pools = pool, dense_pools
        layers: list[nn.Module] = []
        self._pools: list[int] = []
        self.channels = {}
        channels = in_channels
        for stage, (width, count) in enumerate(STAGES, 1):
            width = round(width * width_mult)
            for _ in range(count):
                layers += [Conv2d(channels, width, 3), nn.ReLU(inplace=True)]
                channels = width
            self._pools.append(len(layers))
            layers.append(nn.Identity())
            self.channels[f"pool{stage}"] = width
        self.features = nn.Sequential(*layers)
        self.fc6: Conv2d | None = None
        self.fc7: Conv2d | None = None
        self.dropout = dropout
        self.fully_connected = None if fc6 is None else FC6[fc6]
        if self.fully_connected is not None:
            kernel, rate, border, width, _ = self.fully_connected
            width = round(width * width_mult)
            self.fc6 = Conv2d(channels, width, kernel, padding=border, dilation=rate)
            self.fc7 = Conv2d(width, width, 1)
            channels = width
        self.channels |= {name: self.channels[pool] for name, pool in LEVELS.items()} | {"out": channels}
        self.set_output_stride(output_stride)
        init_convolutions(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        begin = 0
        for stage, end in enumerate(self._pools, 1):
            x = self.features[begin : end + 1](x)
            features[f"pool{stage}"] = x
            begin = end + 1
        if self.fully_connected is not None and self.fc6 is not None and self.fc7 is not None:
            if self.fully_connected.average_pool:
                x = F.avg_pool2d(x, 3, stride=1, padding=1)
            x = F.dropout(F.relu(self.fc6(x), inplace=True), self.dropout, self.training)
            x = F.dropout(F.relu(self.fc7(x), inplace=True), self.dropout, self.training)
        return features | {name: features[pool] for name, pool in LEVELS.items()} | {"out": x}

    def _apply_output_stride(self, output_stride: int) -> None:
        stride, rate = 1, 1
        for index, layer in enumerate(self.features):
            if isinstance(layer, Conv2d):
                border = 0 if not self.layer_padding else self.first_padding if index == 0 else rate
                layer.dilation, layer.padding = (rate, rate), (border, border)
            if index not in self._pools:
                continue
            step = 2 if stride < output_stride else 1
            stride *= step
            rate *= 2 // step
            kept = step == 2 or self.dense_pools
            self.features[index] = (
                nn.MaxPool2d(self.pool, step, padding=self.pool // 3, ceil_mode=True) if kept else nn.Identity()
            )

    def from_published(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """torchvision's file or Caffe's under our names: fc6 and fc7 as the convolutions that this geometry has."""
        ours = self._renamed(state)
        weight, bias = ours.get("features.0.weight"), ours.get("features.0.bias")
        if weight is not None and bias is not None and weight.shape[1] == 3:
            if "conv1_1.0" in state:
                weight, ours["features.0.bias"] = fold_caffe_input(weight, bias, self.input_mean, self.input_std)
            ours["features.0.weight"] = widen_input(weight, self.in_channels)
        if self.fc6 is None:
            return {key: value for key, value in ours.items() if key not in FC_KEYS}
        return ours | self.fully_connected_of(state, self.channels["out"], self.fc6.kernel_size[0])

    def fully_connected_of(self, state: Mapping[str, Tensor], channels: int, kernel: int) -> dict[str, Tensor]:
        """fc6, of ``kernel`` rows, and fc7 of a published file as convolutions of ``channels`` filters, under
        :data:`FC_KEYS`; nothing where the file lacks one."""
        ours = self._renamed(state)
        if not all(key in ours for key in FC_KEYS):
            return {}
        weight6, bias6, weight7, bias7 = (ours[key] for key in FC_KEYS)
        fc6, fc7 = (as_convolution(weight6, 7), bias6), (as_convolution(weight7, 1), bias7)
        return dict(zip(FC_KEYS, subsampled(fc6, fc7, channels, kernel), strict=True))

    def _renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "conv1_1.0" in state:
            return renamed_layers(state, self.caffe_layers() | {"fc6": "fc6", "fc7": "fc7"}, leave_out=("fc8",))
        names = {"classifier.0": "fc6", "classifier.3": "fc7"}
        parts = ((key, key.rpartition(".")) for key in state)
        return {f"{names.get(layer, layer)}.{kind}": state[key] for key, (layer, _, kind) in parts}

    def caffe_layers(self) -> dict[str, str]:
        """Caffe's names of the convolutions -> ours."""
        ours = [f"features.{index}" for index, layer in enumerate(self.features) if isinstance(layer, Conv2d)]
        return dict(zip(VGG16_LAYERS, ours, strict=True))

    def centers(self) -> dict[str, float]:
        """As :meth:`segmodels.backbones.classic.ClassicBackbone.centers`: of ``pool1`` to ``pool5`` and ``out``."""
        layers = list(self.features)
        found = {f"pool{stage}": grid_of(layers[: end + 1]).center for stage, end in enumerate(self._pools, 1)}
        if self.fc6 is not None:
            layers.append(self.fc6)
        return found | {"out": grid_of(layers).center}
