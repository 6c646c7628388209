"""ResNet-18 to 152 (He et al., "Deep Residual Learning for Image Recognition", 2015, table 1) as dilated backbones.

Keys are torchvision's, and so is the place of the stride (in the 3x3 convolution of a bottleneck), so published weights load
unchanged. Dilation and Multi_Grid: DeepLabv3, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone, ConvBN, Geometry, conv_bn, plan_geometry, set_geometry

WIDTHS = (64, 128, 256, 512)


class Depth(NamedTuple):
    bottleneck: bool
    blocks: tuple[int, int, int, int]


DEPTHS = {
    18: Depth(False, (2, 2, 2, 2)),
    34: Depth(False, (3, 4, 6, 3)),
    50: Depth(True, (3, 4, 6, 3)),
    101: Depth(True, (3, 4, 23, 3)),
    152: Depth(True, (3, 8, 36, 3)),
}


class _Block(nn.Module):
    """What both residual blocks share: the projection of the shortcut and its stride."""

    native_stride: int
    downsample: nn.Sequential | None

    def _init_shortcut(self, in_channels: int, out_channels: int, stride: int) -> None:
        self.native_stride = stride
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = ConvBN(
                Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        return self.downsample(x)

    def _set_shortcut_stride(self, stride: int) -> None:
        if self.downsample is not None:
            set_geometry(cast(Conv2d, self.downsample[0]), stride, rate=1)


class BasicBlock(_Block):
    """Two 3x3 convolutions. Dilated as exactly as a bottleneck: the second one, behind the stride, has the new rate."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self._init_shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn(self.conv1, self.bn1, x)
        return conv_bn(self.conv2, self.bn2, y, residual=self._shortcut(x))

    def set_geometry(self, geometry: Geometry) -> None:
        set_geometry(self.conv1, geometry.stride, geometry.first_rate)
        set_geometry(self.conv2, 1, geometry.rate)
        self._set_shortcut_stride(geometry.stride)


class Bottleneck(_Block):
    """1x1, 3x3 (with the stride, as torchvision has it) and 1x1 convolution."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self._init_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn(self.conv2, self.bn2, conv_bn(self.conv1, self.bn1, x))
        return conv_bn(self.conv3, self.bn3, y, residual=self._shortcut(x))

    def set_geometry(self, geometry: Geometry) -> None:
        set_geometry(self.conv2, geometry.stride, geometry.first_rate)
        self._set_shortcut_stride(geometry.stride)


class ResNet(Backbone):
    """ResNet without its classifier: ``low`` is layer1, ``aux`` layer3, ``out`` layer4.

    Args:
        depth: 18, 34, 50, 101 or 152.
        output_stride: 8, 16 or 32.
        multi_grid: one factor per block of layer4; the rate of a block's 3x3 convolutions is its base rate times the factor
            (section 3.2.1). None is all ones.
        first_block: base rate of the first block of a stage whose stride was removed. ``"previous"``: the rate before the
            stage, as torchvision (for bottlenecks that is the block's only 3x3 convolution). ``"full"``: the stage's own
            rate, as the paper, whose strides sit at the end of the stage before. Same keys, different outputs.
        width_mult: factor on all widths; 1 is the published network.

    Raises:
        ValueError: an argument outside these.
    """

    classifier_prefixes = ("fc.",)
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        depth: int = 50,
        output_stride: int = 32,
        multi_grid: Sequence[int] | None = None,
        first_block: str = "previous",
        width_mult: float = 1.0,
    ) -> None:
        super().__init__()
        bottleneck, blocks = DEPTHS[depth]
        self.multi_grid = _check_multi_grid(multi_grid, blocks[-1])
        if first_block not in ("previous", "full"):
            raise ValueError(f"first_block={first_block!r}: expected 'previous' or 'full'")
        self.first_block = first_block
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck if bottleneck else BasicBlock
        widths = [round(width * width_mult) for width in WIDTHS]
        if widths[0] < 1:
            raise ValueError(f"width_mult={width_mult}: expected at least {1 / WIDTHS[0]}, one channel in the stem")
        in_channels = widths[0]
        self.conv1 = Conv2d(3, in_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = nn.Sequential()
            for i in range(count):
                stage.append(block(in_channels, width, 2 if index > 0 and i == 0 else 1))
                in_channels = width * block.expansion
            setattr(self, f"layer{index + 1}", stage)
        low, _, aux, out = (width * block.expansion for width in widths)
        self.channels = {"low": low, "aux": aux, "out": out}
        self.set_output_stride(output_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = conv_bn(self.conv1, self.bn1, x)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        low = self.layer1(x)
        aux = self.layer3(self.layer2(low))
        return {"low": low, "aux": aux, "out": self.layer4(aux)}

    def _apply_output_stride(self, output_stride: int) -> None:
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        blocks = [cast("BasicBlock | Bottleneck", block) for stage in stages for block in stage]
        grids = [1] * (len(blocks) - len(self.multi_grid)) + list(self.multi_grid)
        plan = plan_geometry([block.native_stride for block in blocks], 4, output_stride)
        for block, grid, (stride, first_rate, rate) in zip(blocks, grids, plan, strict=True):
            if self.first_block == "full":
                first_rate = rate
            block.set_geometry(Geometry(stride, first_rate * grid, rate * grid))


def _check_multi_grid(multi_grid: Sequence[int] | None, blocks: int) -> tuple[int, ...]:
    if multi_grid is None:
        return (1,) * blocks
    grid = tuple(multi_grid)
    if not all(isinstance(g, int) and g >= 1 for g in grid):
        raise ValueError(f"multi_grid={grid}: expected positive integers, for example (1, 2, 4)")
    if len(grid) != blocks:
        raise ValueError(f"multi_grid={grid}: expected {blocks} factors, one per block of layer4, not {len(grid)}")
    return grid
