"""MobileNetV2: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2.

Keys are torchvision's, so published weights load unchanged; the last 1x1 convolution (features.18) belongs to the
classifier and is left out.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone, ConvBN, Geometry, SamePaddedConv2d, plan_geometry, scaled_width, set_geometry

#: expansion, width, repeats, stride of the first repeat
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_WIDTH = 32


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int, groups: int, conv: type[Conv2d]
) -> nn.Sequential:
    layer = conv(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False)
    set_geometry(layer, stride, rate=1)
    return ConvBN(layer, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection (section 3.3); sum where the shape is kept."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, conv: type[Conv2d]) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [] if expansion == 1 else [_conv_bn_relu6(in_channels, hidden, 1, 1, 1, Conv2d)]
        depthwise = _conv_bn_relu6(hidden, hidden, 3, stride, hidden, conv)
        self.conv = ConvBN(
            *expand, depthwise, Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.native_stride = stride
        self.depthwise_index = len(expand)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)

    def set_geometry(self, geometry: Geometry) -> None:
        depthwise = cast(nn.Sequential, self.conv[self.depthwise_index])
        set_geometry(cast(Conv2d, depthwise[0]), geometry.stride, geometry.first_rate)


class MobileNetV2(Backbone):
    """MobileNetV2 up to features.17: ``low`` is features.3, ``mid`` features.6, ``aux`` features.13, ``out`` features.17
    (320 channels).

    Args:
        width_mult: multiplies every width.
        width_divisor: the products are rounded to multiples of it; the authors' half-width segmentation network has 1.
        output_stride: 8, 16 or 32.
        padding: ``"centred"`` as torchvision, or ``"same"`` for weights that were trained with TensorFlow's zeros.

    Raises:
        ValueError: an argument outside these.
    """

    classifier_prefixes = ("features.18.", "classifier.")

    def __init__(
        self, width_mult: float = 1.0, output_stride: int = 32, padding: str = "centred", width_divisor: int = 8
    ) -> None:
        super().__init__()
        if not width_mult > 0:
            raise ValueError(f"width_mult={width_mult!r}: expected a positive number")
        if not isinstance(width_divisor, int) or width_divisor < 1:
            raise ValueError(f"width_divisor={width_divisor!r}: expected a positive integer")
        if padding not in ("centred", "same"):
            raise ValueError(f"padding={padding!r}: expected 'centred' or 'same'")
        conv: type[Conv2d] = SamePaddedConv2d if padding == "same" else Conv2d
        in_channels = scaled_width(STEM_WIDTH, width_mult, width_divisor)
        layers: list[nn.Module] = [_conv_bn_relu6(3, in_channels, 3, 2, 1, conv)]
        self._taps: dict[int, str] = {}
        self.channels = {}
        strides_left = 4
        for expansion, width, repeats, stride in STAGES:
            if stride == 2:
                name = {3: "low", 2: "mid", 1: "aux"}.get(strides_left)
                if name is not None:
                    self._taps[len(layers) - 1] = name
                    self.channels[name] = in_channels
                strides_left -= 1
            out_channels = scaled_width(width, width_mult, width_divisor)
            for repeat in range(repeats):
                layers.append(
                    InvertedResidual(in_channels, out_channels, stride if repeat == 0 else 1, expansion, conv)
                )
                in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self._taps[len(layers) - 1] = "out"
        self.channels["out"] = in_channels
        self.set_output_stride(output_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._taps:
                features[self._taps[index]] = x
        return features

    def _apply_output_stride(self, output_stride: int) -> None:
        blocks = [cast(InvertedResidual, block) for block in list(self.features)[1:]]
        plan = plan_geometry([block.native_stride for block in blocks], 2, output_stride)
        for block, geometry in zip(blocks, plan, strict=True):
            block.set_geometry(geometry)
