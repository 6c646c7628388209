"""What the peers compute, written down again in plain torch.nn under their own names: what the readers are compared with.

The names of modules are the peers' state_dict keys; nothing else is theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Basic block or bottleneck whose whole stage has one rate; stride in the 3x3 convolution."""

    def __init__(self, cin: int, width: int, stride: int, rate: int, bottleneck: bool) -> None:
        super().__init__()
        cout = 4 * width if bottleneck else width
        self.bottleneck = bottleneck
        if bottleneck:
            self.conv1, self.bn1 = nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, rate, rate, bias=False), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout)
        else:
            self.conv1, self.bn1 = nn.Conv2d(cin, width, 3, stride, rate, rate, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, rate, rate, bias=False), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = self.bn3(self.conv3(y.relu())) if self.bottleneck else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


def stages(blocks: tuple[int, ...], cin: int, output_stride: int, bottleneck: bool) -> list[nn.Sequential]:
    """layer1 to layer4; a stage whose stride is removed runs at twice the rate, its first block included."""
    found, reached, rate = [], 4, 1
    for index, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
        stride = 1 if index == 0 else 2
        if stride == 2 and reached == output_stride:
            stride, rate = 1, 2 * rate
        reached *= stride
        layers = []
        for i in range(count):
            layers.append(Block(cin, width, stride if i == 0 else 1, rate, bottleneck))
            cin = 4 * width if bottleneck else width
        found.append(nn.Sequential(*layers))
    return found


def conv_bn_relu(cin: int, cout: int, kernel: int = 1, rate: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, kernel, 1, rate * (kernel // 2), rate, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]


class SemsegPSPNet(nn.Module):
    """hszhao/semseg ``PSPNet(layers=50)`` in evaluation, with its auxiliary head."""

    def __init__(self, num_classes: int = 21) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            *conv_bn_relu(64, 64, 3), *conv_bn_relu(64, 128, 3), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.layer1, self.layer2, self.layer3, self.layer4 = stages((3, 4, 6, 3), 128, 8, True)
        self.ppm = nn.Module()
        self.ppm.features = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(b), *conv_bn_relu(2048, 512)) for b in (1, 2, 3, 6))
        self.cls = nn.Sequential(*conv_bn_relu(4096, 512, 3), nn.Dropout2d(0.1), nn.Conv2d(512, num_classes, 1))
        self.aux = nn.Sequential(*conv_bn_relu(1024, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.shape[2:]
        inner = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        x = self.layer4(inner)
        levels = [F.interpolate(f(x), x.shape[2:], mode="bilinear", align_corners=True) for f in self.ppm.features]
        logits = self.cls(torch.cat([x, *levels], 1)), self.aux(inner)
        out, aux = (F.interpolate(y, size, mode="bilinear", align_corners=True) for y in logits)
        return out, aux


class Encoder(nn.Module):
    """ResNet-18 under segmentation_models.pytorch's names."""

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages((2, 2, 2, 2), 64, output_stride, False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        found = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            found.append(x)
        return found


def separable(cin: int, cout: int, rate: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cin, 3, 1, rate, rate, cin, bias=False), nn.Conv2d(cin, cout, 1, bias=False))


class SmpASPP(nn.Module):
    def __init__(self, cin: int, rates: tuple[int, ...], is_separable: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(*conv_bn_relu(cin, 256))])
        for rate in rates:
            if is_separable:
                self.convs.append(nn.Sequential(separable(cin, 256, rate), nn.BatchNorm2d(256), nn.ReLU()))
            else:
                self.convs.append(nn.Sequential(*conv_bn_relu(cin, 256, 3, rate)))
        self.convs.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(cin, 256)))
        self.project = nn.Sequential(*conv_bn_relu(5 * 256, 256), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        *local, pooled = [conv(x) for conv in self.convs]
        return self.project(torch.cat([*local, pooled.expand_as(local[0])], 1))


class SmpDeepLabV3(nn.Module):
    """``smp.DeepLabV3("resnet18")``; ``named``: the decoder of later versions."""

    def __init__(self, num_classes: int = 21, named: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(8)
        aspp, refine = SmpASPP(512, (12, 24, 36), False), conv_bn_relu(256, 256, 3)
        if named:
            self.decoder = nn.Module()
            self.decoder.aspp, self.decoder.conv, self.decoder.bn = aspp, refine[0], refine[1]
        else:
            self.decoder = nn.Sequential(aspp, *refine)
        self.layers = [aspp, *refine]
        self.segmentation_head = nn.Sequential(nn.Conv2d(256, num_classes, 1), nn.UpsamplingBilinear2d(scale_factor=8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)[-1]
        for layer in self.layers:
            x = layer(x)
        return self.segmentation_head(x)


class SmpDeepLabV3Plus(nn.Module):
    """``smp.DeepLabV3Plus("resnet18")``."""

    def __init__(self, num_classes: int = 21) -> None:
        super().__init__()
        self.encoder = Encoder(16)
        self.decoder = nn.Module()
        self.decoder.aspp = nn.Sequential(
            SmpASPP(512, (12, 24, 36), True), separable(256, 256), nn.BatchNorm2d(256), nn.ReLU()
        )
        self.decoder.block1 = nn.Sequential(*conv_bn_relu(64, 48))
        self.decoder.block2 = nn.Sequential(separable(256 + 48, 256), nn.BatchNorm2d(256), nn.ReLU())
        self.segmentation_head = nn.Sequential(nn.Conv2d(256, num_classes, 1), nn.UpsamplingBilinear2d(scale_factor=4))

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        x = F.interpolate(self.decoder.aspp(features[-1]), scale_factor=4, mode="bilinear", align_corners=True)
        return self.segmentation_head(self.decoder.block2(torch.cat([x, self.decoder.block1(features[0])], 1)))


class SmpPSPNet(nn.Module):
    """``smp.PSPNet("resnet18")``: reads layer2; the level of one bin has a bias in place of its BatchNorm."""

    def __init__(self, num_classes: int = 21) -> None:
        super().__init__()
        self.encoder = Encoder(32)
        blocks = []
        for bins in (1, 2, 3, 6):
            layers: list[nn.Module] = conv_bn_relu(128, 32)
            if bins == 1:
                layers = [nn.Conv2d(128, 32, 1), nn.Identity(), nn.ReLU()]
            block = nn.Module()
            block.pool = nn.Sequential(nn.AdaptiveAvgPool2d(bins), nn.Sequential(*layers))
            blocks.append(block)
        self.decoder = nn.Module()
        self.decoder.psp = nn.Module()
        self.decoder.psp.blocks = nn.ModuleList(blocks)
        self.decoder.conv = nn.Sequential(*conv_bn_relu(256, 512))
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(512, num_classes, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)[1]
        levels = [
            F.interpolate(block.pool(x), x.shape[2:], mode="bilinear", align_corners=True) for block in self.decoder.psp.blocks
        ]
        return self.segmentation_head(self.decoder.conv(torch.cat([*levels, x], 1)))
