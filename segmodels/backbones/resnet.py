"""ResNet-18 to 269 (He et al., "Deep Residual Learning for Image Recognition", 2015, table 1) as dilated backbones.

Keys are torchvision's, and so by default is the place of the stride (in the 3x3 convolution of a bottleneck), so published
weights load unchanged. Dilation, Multi_Grid and the cascade: DeepLabv3, sections 3.1 and 3.2. ResNet-269 and the deep stem:
PSPNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
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
    269: Depth(True, (3, 30, 48, 8)),
}


class _Block(nn.Module):
    """What both residual blocks share: the shortcut, projected where the channels change, subsampled where it is strided."""

    native_stride: int
    downsample: nn.Sequential | None

    def _init_shortcut(self, in_channels: int, out_channels: int, stride: int, avg_down: bool) -> None:
        self.native_stride = stride
        self.downsample = None
        self.shortcut_stride = stride
        if in_channels != out_channels:
            pool = [PairAverage(stride)] if avg_down else []
            projection = Conv2d(in_channels, out_channels, 1, stride=1 if avg_down else stride, bias=False)
            self.downsample = ConvBN(*pool, projection, nn.BatchNorm2d(out_channels))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        return x if self.shortcut_stride == 1 else x[:, :, :: self.shortcut_stride, :: self.shortcut_stride]

    def set_shortcut(self, stride: int, rate: int) -> None:
        """Stride, and the rate of the map that the block reads."""
        self.shortcut_stride = stride
        if self.downsample is not None and isinstance(self.downsample[0], PairAverage):
            self.downsample[0].stride, self.downsample[0].rate = stride, rate
        elif self.downsample is not None:
            set_geometry(cast(Conv2d, self.downsample[0]), stride, rate=1)


class PairAverage(nn.Module):
    """Average of the 2x2 values at and behind each position, of those that there are: ResNet-D's (He et al., "Bag of Tricks for
    Image Classification with Convolutional Neural Networks", 2019, figure 2c). A block without a native stride has none.

    Without its stride it averages values ``rate`` apart, so the values that the strided network keeps stay the same numbers.
    """

    def __init__(self, native_stride: int) -> None:
        super().__init__()
        self.native_stride, self.stride, self.rate = native_stride, native_stride, 1

    def forward(self, x: Tensor) -> Tensor:
        if self.native_stride == 1:
            return x
        if self.stride == 2:
            return F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        for dim in (2, 3):  # at the end the last value stands alone: its average with itself
            there = min(self.rate, x.shape[dim])
            behind = [x.narrow(dim, there, x.shape[dim] - there), x.narrow(dim, x.shape[dim] - there, there)]
            x = (x + torch.cat(behind, dim)) / 2
        return x


class BasicBlock(_Block):
    """Two 3x3 convolutions. Dilated as exactly as a bottleneck: the second one, behind the stride, has the new rate."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, avg_down: bool = False) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self._init_shortcut(in_channels, width, stride, avg_down)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn(self.conv1, self.bn1, x)
        return conv_bn(self.conv2, self.bn2, y, residual=self._shortcut(x))

    def set_geometry(self, geometry: Geometry) -> None:
        set_geometry(self.conv1, geometry.stride, geometry.first_rate)
        set_geometry(self.conv2, 1, geometry.rate)


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolution; the stride is in the 3x3, as torchvision has it, or in the first 1x1."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, avg_down: bool = False, stride_in_1x1: bool = False
    ) -> None:
        super().__init__()
        self.stride_in_1x1 = stride_in_1x1
        out_channels = width * self.expansion
        self.conv1 = Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self._init_shortcut(in_channels, out_channels, stride, avg_down)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn(self.conv2, self.bn2, conv_bn(self.conv1, self.bn1, x))
        return conv_bn(self.conv3, self.bn3, y, residual=self._shortcut(x))

    def set_geometry(self, geometry: Geometry) -> None:
        set_geometry(self.conv1, geometry.stride if self.stride_in_1x1 else 1, rate=1)
        set_geometry(self.conv2, 1 if self.stride_in_1x1 else geometry.stride, geometry.first_rate)


class ResNet(Backbone):
    """ResNet without its classifier: ``low`` is layer1, ``mid`` layer2, ``aux`` layer3, ``out`` layer4 or the last cascaded
    layer.

    Args:
        depth: 18, 34, 50, 101, 152 or 269.
        output_stride: 4, 8, 16 or 32; with a cascade also 64, 128, 256.
        multi_grid: one factor per block of layer4 and of every cascaded layer; the rate of a block's 3x3 convolutions is its
            base rate times the factor (section 3.2.1). None is all ones.
        first_block: base rate of the first block of a stage whose stride was removed. ``"previous"``: the rate before the
            stage, as torchvision (for bottlenecks that is the block's only 3x3 convolution). ``"full"``: the stage's own
            rate, as PSPNet and the peers that set the rate of a whole stage. Same keys, different outputs. Of stride placement
            ``"3x3"`` only: the others leave no choice.
        stem: ``"conv7"``, or ``"deep"``: 3x3 convolutions of ``stem_width`` (stride 2), ``stem_width`` and twice as many
            channels in its place; 64 as PSPNet (timm's ``s``), 32 as timm's ``c`` and ``d``.
        avg_down: projections of strided blocks average 2x2 values in place of their stride, as timm's ``d``.
        stride_placement: ``"3x3"``: in the 3x3 convolution of a stage's first block, as torchvision; ``"1x1"``: in its first
            1x1 convolution, as the paper and its Caffe models; ``"last"``: in the 3x3 convolution of the last block of the
            stage before, as the authors of DeepLabv3. Same keys, different outputs. Basic blocks have no 1x1 convolution: there
            ``"1x1"`` is the first one, which is ``"3x3"``.
        ceil_mode: the max pool rounds its size up, as Caffe's (DeepLab v2).
        stages: 4; with fewer the last ones are left out, and ``aux`` is the stage before ``out``.
        cascade: further stages behind layer4, copies of it (DeepLabv3, section 3.2, block5 to block7): up to 3.
        width_mult: factor on all widths; 1 is the published network.

    Raises:
        ValueError: an argument outside these.
    """

    classifier_prefixes = ("fc.",)

    def __init__(
        self,
        depth: int = 50,
        output_stride: int = 32,
        multi_grid: Sequence[int] | None = None,
        first_block: str = "previous",
        stem: str = "conv7",
        stem_width: int = 64,
        avg_down: bool = False,
        stride_placement: str = "3x3",
        ceil_mode: bool = False,
        stages: int = 4,
        cascade: int = 0,
        width_mult: float = 1.0,
    ) -> None:
        super().__init__()
        bottleneck, blocks = DEPTHS[depth]
        self.multi_grid = _check_multi_grid(multi_grid, blocks[-1])
        _check_choice("first_block", first_block, ("previous", "full"))
        _check_choice("stem", stem, ("conv7", "deep"))
        _check_choice("stride_placement", stride_placement, ("3x3", "1x1", "last") if bottleneck else ("3x3", "1x1"))
        if cascade not in range(4):
            raise ValueError(f"cascade={cascade!r}: expected 0 to 3 stages behind layer4")
        if avg_down and stride_placement == "last":
            raise ValueError("avg_down=True with stride_placement='last': expected '3x3' or '1x1', where projections are strided")
        if stages not in ((4,) if cascade else (2, 3, 4)):
            raise ValueError(f"stages={stages!r}: expected 2 to 4, and 4 with a cascade")
        self.first_block, self.stride_placement, self.ceil_mode = first_block, stride_placement, ceil_mode
        self.output_strides = (4, 8, 16, 32, 64, 128, 256)[: stages + cascade]
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck if bottleneck else BasicBlock
        widths = [round(width * width_mult) for width in WIDTHS]
        if widths[0] < 1:
            raise ValueError(f"width_mult={width_mult}: expected at least {1 / WIDTHS[0]}, one channel in the stem")
        in_channels = widths[0]
        self.conv1: nn.Module = Conv2d(3, in_channels, 7, stride=2, padding=3, bias=False)
        if stem == "deep":
            in_channels = 2 * round(stem_width * width_mult)
            self.conv1 = _deep_stem(in_channels // 2, in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        # Every stage but the first has a stride: at its beginning, or at the end of the stage before.
        widths = widths[:stages] + widths[-1:] * cascade
        counts = [*blocks[:stages], *blocks[-1:] * cascade]
        last = stride_placement == "last"
        in_1x1 = {"stride_in_1x1": True} if bottleneck and stride_placement == "1x1" else {}
        for index, (width, count) in enumerate(zip(widths, counts, strict=True)):
            strided = count - 1 if last else 0
            strides = index < len(widths) - 1 if last else index > 0
            stage = nn.Sequential()
            for i in range(count):
                stride = 2 if strides and i == strided else 1
                stage.append(block(in_channels, width, stride, avg_down, **in_1x1))
                in_channels = width * block.expansion
            setattr(self, f"layer{index + 1}", stage)
        self._aux_index = stages - 2
        taps = {"low": 0, "mid": 1, "aux": self._aux_index, "out": -1}
        self.channels = {name: widths[index] * block.expansion for name, index in taps.items()}
        self.set_output_stride(output_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stem = self.conv1
        if isinstance(stem, nn.Sequential):  # the last convolution's BatchNorm is bn1
            x, stem = stem[:-1](x), stem[-1]
        x = conv_bn(stem, self.bn1, x)
        x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=self.ceil_mode)
        features = {}
        for index, stage in enumerate(self._stages):
            if index == 0 and self.stride_placement == "last":
                features["low"] = stage[:-1](x)  # before the block that leaves stride 4
                x = stage[-1](features["low"])
            else:
                x = stage(x)
                features.setdefault("low", x)
            if index == 1:
                features["mid"] = x
            if index == self._aux_index:
                features["aux"] = x
        return {**features, "out": x}

    @property
    def _stages(self) -> list[nn.Sequential]:
        return [cast(nn.Sequential, stage) for name, stage in self.named_children() if name.startswith("layer")]

    def _apply_output_stride(self, output_stride: int) -> None:
        blocks = [cast("BasicBlock | Bottleneck", block) for stage in self._stages for block in stage]
        gridded = [rate for _ in self._stages[3:] for rate in self.multi_grid]
        grids = [1] * (len(blocks) - len(gridded)) + gridded
        plan = plan_geometry([block.native_stride for block in blocks], 4, output_stride)
        for block, grid, (stride, first_rate, rate) in zip(blocks, grids, plan, strict=True):
            block.set_shortcut(stride, first_rate)
            # Behind a stride in the 1x1 convolution the 3x3 reads the new grid, before one at the end of a stage the old.
            if self.stride_placement == "1x1" or (self.first_block == "full" and self.stride_placement == "3x3"):
                first_rate = rate
            block.set_geometry(Geometry(stride, first_rate * grid, rate * grid))


def _deep_stem(width: int, out_channels: int) -> nn.Sequential:
    """Keys of timm's deep stems: ``0``, ``3`` and ``6`` are the convolutions; the last one's BatchNorm is ``bn1``."""
    layers: list[nn.Module] = []
    for index, (into, out) in enumerate(((3, width), (width, width), (width, out_channels))):
        layers.append(Conv2d(into, out, 3, stride=2 if index == 0 else 1, padding=1, bias=False))
        if index < 2:
            layers += [nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return ConvBN(*layers)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}")


def _check_multi_grid(multi_grid: Sequence[int] | None, blocks: int) -> tuple[int, ...]:
    if multi_grid is None:
        return (1,) * blocks
    grid = tuple(multi_grid)
    if not all(isinstance(g, int) and g >= 1 for g in grid):
        raise ValueError(f"multi_grid={grid}: expected positive integers, for example (1, 2, 4)")
    if len(grid) != blocks:
        raise ValueError(f"multi_grid={grid}: expected {blocks} factors, one per block of layer4, not {len(grid)}")
    return grid
