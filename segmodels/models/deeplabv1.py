"""DeepLab v1: Chen, Papandreou, Kokkinos, Murphy, Yuille, "Semantic Image Segmentation with Deep Convolutional Nets and Fully
Connected CRFs", 2015.

VGG-16 with its last two pools at stride 1 and rates in their place (section 3.1); fc6 with a field of view of choice (section
5.2: ``fc6="4x4"``, ``"4x4-wide"``, ``"7x7"``, ``"largefov"``); MSc adds scores of the image and of the first four pools (section
4.3). The CRF is :class:`segmodels.refine.DenseCRF`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from atrous_kernels.functional import conv2d
from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone
from segmodels.backbones.classic import init_convolutions
from segmodels.backbones.vgg import VGG16
from segmodels.models.base import check_input, upsample
from segmodels.models.classic import LIGHT_BACKBONES, ClassicModel

#: What MSc scores, and the strides of its 3x3 convolutions in training, where all scores meet at stride 8.
BRANCH_STRIDES = {"image": 8, "pool1": 4, "pool2": 2, "pool3": 1, "pool4": 1}


def classifier_of(channels: int, num_classes: int, kernel: int = 1, rate: int = 1) -> Conv2d:
    """The last convolution of DeepLab v1 and v2: normal with a standard deviation of 0.01, biases zero."""
    layer = Conv2d(channels, num_classes, kernel, padding=rate * (kernel // 2), dilation=rate)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


class ScoreBranch(nn.Sequential):
    """3x3, 1x1 and 1x1 convolution, the first two with ReLU and dropout; the first one's stride depends on the phase."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float, training_stride: int) -> None:
        hidden = [Conv2d(in_channels, channels, 3, padding=1), Conv2d(channels, channels, 1)]
        for layer in hidden:
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(cast(Tensor, layer.bias))
        layers = [module for layer in hidden for module in (layer, nn.ReLU(inplace=True), nn.Dropout(dropout))]
        super().__init__(*layers, classifier_of(channels, num_classes))
        self.training_stride = training_stride

    def forward(self, x: Tensor) -> Tensor:
        first = cast(Conv2d, self[0])
        stride = self.training_stride if self.training else 1
        x = conv2d(x, first.weight, first.bias, stride, padding=1, backend=first.backend)
        for layer in list(self)[1:]:
            x = layer(x)
        return x


def fully_connected(in_channels: int, channels: int, rate: int, dropout: float, kernel: int = 3) -> list[nn.Module]:
    """fc6 and fc7, each with ReLU and dropout, for a backbone that has none."""
    fc6 = Conv2d(in_channels, channels, kernel, padding=rate * (kernel - 1) // 2, dilation=rate)
    fc7 = Conv2d(channels, channels, 1)
    layers: list[nn.Module] = [m for fc in (fc6, fc7) for m in (fc, nn.ReLU(inplace=True), nn.Dropout(dropout))]
    init_convolutions(nn.ModuleList(layers))
    # Zeros around an even kernel cannot be the same on both sides.
    return [nn.ZeroPad2d((0, 1, 0, 1)), *layers] if rate * (kernel - 1) % 2 else layers


def field_of_view(backbone: Backbone, channels: int, kernel: int, rate: int, dropout: float) -> tuple[nn.Sequential, int]:
    """What stands between a backbone and fc8, and its width: nothing behind VGG-16, otherwise what VGG-16 has of it. As there,
    only LargeFOV, the kernel of 3, averages before it skips."""
    if isinstance(backbone, VGG16):
        return nn.Sequential(), backbone.channels["out"]
    pool = [nn.AvgPool2d(3, 1, 1)] if kernel == 3 else []
    return nn.Sequential(*pool, *fully_connected(backbone.channels["out"], channels, rate, dropout, kernel)), channels


class DeepLabV1(ClassicModel):
    """DeepLab v1; scores at stride 8, upsampled with aligned corners (images of 8 k + 1 pixels make the grids meet).

    Args:
        backbone: VGG-16 in the geometry of ``backbone_options``; its ``fc6`` is the field of view. Others get LargeFOV behind
            them.
        num_classes: channels of the logits.
        msc: scores of the image and of pool1 to pool4 are added to those of fc7. In training they meet at stride 8, otherwise at
            the size of the image, which ``logits`` then have.
        branch_channels, dropout: of these branches.
        fc_channels, fc_kernel, fc_rate: width, kernel and rate of fc6 behind a backbone other than VGG-16; its dropout is
            ``dropout``.

    Raises:
        ValueError: ``msc`` on another backbone than VGG-16.
    """

    default_output_stride = 8
    backbones = ("vgg16", *LIGHT_BACKBONES)
    backbone_options: dict[str, Any] = {"fc6": "largefov", "pool": 3}

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        msc: bool = False,
        branch_channels: int = 128,
        dropout: float = 0.5,
        fc_channels: int = 1024,
        fc_kernel: int = 3,
        fc_rate: int = 12,
    ) -> None:
        fc7, width = field_of_view(backbone, fc_channels, fc_kernel, fc_rate, dropout)
        classifier = nn.ModuleDict({"fc7": fc7, "fc8": classifier_of(width, num_classes)})
        if msc and not isinstance(backbone, VGG16):
            raise ValueError(f"msc=True: expected vgg16, whose pools it scores, not {type(backbone).__name__}")
        if msc:
            channels = {"image": backbone.in_channels, **backbone.channels}
            for name, stride in BRANCH_STRIDES.items():
                classifier[name] = ScoreBranch(channels[name], branch_channels, num_classes, dropout, stride)
        super().__init__(backbone, classifier, aux_loss=aux_loss, align_corners=True)
        self.msc = msc

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """``{"out": [N, num_classes, h, w]}``, at stride 8; with MSc and outside training, at the size of the image."""
        check_input(x)
        self._check_statistics(x)
        features = self.backbone(x)
        scores = self.classifier["fc8"](self.classifier["fc7"](features["out"]))
        if self.msc:
            size = scores.shape[-2:] if self.training else x.shape[-2:]
            scores = _at(scores, size)
            for name in BRANCH_STRIDES:
                scores = scores + _at(self.classifier[name](x if name == "image" else features[name]), size)
        return {"out": scores}

    def freeze_base(self) -> None:
        """As MSc is trained: the network up to fc8 keeps its weights."""
        for module in (self.backbone, self.classifier["fc8"]):
            module.requires_grad_(False)


def _at(scores: Tensor, size: torch.Size) -> Tensor:
    return scores if scores.shape[-2:] == size else upsample(scores, size, align_corners=True)
