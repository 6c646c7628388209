"""torchvision's layer order and names, written down again in plain torch.nn: what our models are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Bottleneck(nn.Module):
    def __init__(self, cin: int, width: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if project:
            self.downsample = nn.Sequential(nn.Conv2d(cin, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class _ResNet50(nn.Module):
    """Dilated as torchvision's segmentation models; the first block of a stage has the rate before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        cin = 64
        stages = [(64, 3, 1, 1, 1), (128, 4, 2, 1, 1), (256, 6, 1, 1, 2), (512, 3, 1, 2, 4)]
        for index, (width, blocks, stride, first, rest) in enumerate(stages, start=1):
            layers = [_Bottleneck(cin, width, stride, first, True)]
            layers += [_Bottleneck(4 * width, width, 1, rest, False) for _ in range(blocks - 1)]
            self.add_module(f"layer{index}", nn.Sequential(*layers))
            cin = 4 * width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        aux = self.layer3(self.layer2(self.layer1(x)))
        return aux, self.layer4(aux)


def _conv_bn_relu(cin: int, cout: int, kernel: int = 1, dilation: int = 1) -> list[nn.Module]:
    pad = dilation if kernel == 3 else 0
    return [nn.Conv2d(cin, cout, kernel, 1, pad, dilation, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]


class _ASPP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Sequential(*_conv_bn_relu(2048, 256))]
            + [nn.Sequential(*_conv_bn_relu(2048, 256, 3, rate)) for rate in (12, 24, 36)]
            + [nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_bn_relu(2048, 256))]
        )
        self.project = nn.Sequential(*_conv_bn_relu(5 * 256, 256), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        *local, pooled = [conv(x) for conv in self.convs]
        pooled = F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*local, pooled], dim=1))


class TorchvisionDeepLabV3ResNet50(nn.Module):
    """``deeplabv3_resnet50(aux_loss=True)``: output stride 8, ASPP rates 12, 24, 36."""

    def __init__(self, num_classes: int = 21) -> None:
        super().__init__()
        self.backbone = _ResNet50()
        self.classifier = nn.Sequential(_ASPP(), *_conv_bn_relu(256, 256, 3), nn.Conv2d(256, num_classes, 1))
        self.aux_classifier = nn.Sequential(
            *_conv_bn_relu(1024, 256, 3), nn.Dropout(0.1), nn.Conv2d(256, num_classes, 1)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        aux, out = self.backbone(x)
        logits = {"out": self.classifier(out), "aux": self.aux_classifier(aux)}
        return {k: F.interpolate(v, size=x.shape[-2:], mode="bilinear", align_corners=False) for k, v in logits.items()}


def batch_norm_keys(prefix: str) -> list[str]:
    """What a BatchNorm2d writes into a state_dict."""
    return [f"{prefix}.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def resnet_keys(blocks: tuple[int, ...], bottleneck: bool) -> set[str]:
    """Keys of torchvision's ResNet without ``fc``."""
    keys = ["conv1.weight", *batch_norm_keys("bn1")]
    for stage, count in enumerate(blocks, start=1):
        for i in range(count):
            block = f"layer{stage}.{i}"
            for n in range(1, 4 if bottleneck else 3):
                keys += [f"{block}.conv{n}.weight", *batch_norm_keys(f"{block}.bn{n}")]
            if i == 0 and (stage > 1 or bottleneck):
                keys += [f"{block}.downsample.0.weight", *batch_norm_keys(f"{block}.downsample.1")]
    return set(keys)


def mobilenetv2_keys() -> set[str]:
    """Keys of torchvision's MobileNetV2 up to ``features.17``."""
    keys = ["features.0.0.weight", *batch_norm_keys("features.0.1")]
    for i in range(1, 18):
        pairs = 1 if i == 1 else 2  # the first block does not expand
        for n in range(pairs):
            keys += [f"features.{i}.conv.{n}.0.weight", *batch_norm_keys(f"features.{i}.conv.{n}.1")]
        keys += [f"features.{i}.conv.{pairs}.weight", *batch_norm_keys(f"features.{i}.conv.{pairs + 1}")]
    return set(keys)


def randomise_batch_norm(model: nn.Module, seed: int = 0) -> None:
    """Statistics and affine terms as after some training, so that a forgotten or swapped BatchNorm shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
