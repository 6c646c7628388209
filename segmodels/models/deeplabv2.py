"""DeepLab v2: Chen, Papandreou, Kokkinos, Murphy, Yuille, "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets,
Atrous Convolution, and Fully Connected CRFs", 2017.

Atrous spatial pyramid pooling: classifiers of several rates read the same features, and their scores are summed (section 3.2,
figure 7). One network sees the image at three scales, fused by their maximum (section 4.1.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmodels.backbones.base import Backbone
from segmodels.backbones.vgg import VGG16
from segmodels.models.classic import LIGHT_BACKBONES
from segmodels.models.deeplabv1 import classifier_of, fully_connected
from segmodels.models.multiscale import MultiScaleModel

#: Section 4.1.2: ``rates`` of the variants.
RATES = {"largefov": (12,), "aspp-s": (2, 4, 8, 12), "aspp-l": (6, 12, 18, 24)}


class SummedASPP(nn.Module):
    """Branches of one rate each, summed: ``[N, in_channels, h, w]`` to ``[N, num_classes, h, w]``.

    Args:
        fc_channels: on VGG-16, each branch has its own fc6 (3x3, with the rate), fc7 and fc8, the first two this wide; with None,
            as elsewhere, a branch is one 3x3 convolution.
    """

    def __init__(
        self, in_channels: int, num_classes: int, rates: Sequence[int], fc_channels: int | None, dropout: float
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for rate in rates:
            if fc_channels is None:
                self.branches.append(classifier_of(in_channels, num_classes, 3, rate))
                continue
            fc7 = fully_connected(in_channels, fc_channels, rate, dropout)
            self.branches.append(nn.Sequential(*fc7, classifier_of(fc_channels, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.branches
        total = first(x)
        for branch in rest:
            total = total + branch(x)
        return total


class DeepLabV2(MultiScaleModel):
    """DeepLab v2; scores at stride 8.

    Args:
        backbone: VGG-16 or a ResNet in the geometry of ``backbone_options``, or a lighter one, read like a ResNet.
        num_classes: channels of the logits.
        rates: of the branches; a name in :data:`RATES` or the rates themselves. LargeFOV on VGG-16 averages pool5 first, as v1.
        scales: of the image, fused by their maximum; (1, 0.75, 0.5) in the paper. In training each has its own loss.
        fc_channels, dropout: of the branches on VGG-16.
        freeze_batch_norm: the backbone keeps its BatchNorm's statistics and weights in training (the paper's batch is one image).
        align_corners: of all interpolation; the authors' code has True.

    Raises:
        ValueError: unknown rates or scales.
    """

    default_output_stride = 8
    backbones = ("vgg16", "resnet101", "resnet50", *LIGHT_BACKBONES)
    backbone_options: dict[str, Any] = {"pool": 3, "first_block": "full", "stride_placement": "1x1", "ceil_mode": True}

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        rates: str | Sequence[int] = "aspp-l",
        scales: Sequence[float] = (1.0,),
        fc_channels: int = 1024,
        dropout: float = 0.5,
        freeze_batch_norm: bool = True,
        align_corners: bool = True,
    ) -> None:
        if isinstance(rates, str):
            if rates not in RATES:
                raise ValueError(f"rates={rates!r}: expected one of {', '.join(RATES)} or integers")
            rates = RATES[rates]
        if not rates or not all(isinstance(rate, int) and rate >= 1 for rate in rates):
            raise ValueError(f"rates={tuple(rates)}: expected positive integers, for example (6, 12, 18, 24)")
        vgg = isinstance(backbone, VGG16)
        classifier = SummedASPP(backbone.channels["out"], num_classes, rates, fc_channels if vgg else None, dropout)
        self.freeze_batch_norm = freeze_batch_norm
        super().__init__(
            backbone, classifier, scales, supervise_scales=True, aux_loss=aux_loss, align_corners=align_corners
        )
        self.average_pool = vgg and len(rates) == 1
        if freeze_batch_norm:
            for norm in self._norms():
                norm.requires_grad_(False)
            self.train(self.training)

    def train(self, mode: bool = True) -> DeepLabV2:
        """As :meth:`torch.nn.Module.train`; a frozen BatchNorm stays as in evaluation."""
        super().train(mode)
        if self.freeze_batch_norm:
            for norm in self._norms():
                norm.training = False
        return self

    def start_from_classification(self, state: Mapping[str, Tensor]) -> None:
        """On VGG-16 every branch starts with its fc6 and fc7, subsampled as LargeFOV's, where the file has them."""
        if not isinstance(self.backbone, VGG16):
            return
        for branch in self.classifier.branches:
            layers = {"fc6": branch[0], "fc7": branch[3]}
            found = self.backbone.fully_connected_of(state, layers["fc6"].out_channels, layers["fc6"].kernel_size[0])
            for key, value in found.items():
                name, _, kind = key.partition(".")
                with torch.no_grad():
                    getattr(layers[name], kind).copy_(value)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def _scores(self, x: Tensor) -> tuple[Tensor, None]:
        features = self.backbone(x)["out"]
        if self.average_pool:
            features = F.avg_pool2d(features, 3, stride=1, padding=1)
        return self.classifier(features), None

    def _fuse(self, scores: list[Tensor], features: list[Tensor]) -> Tensor:
        fused = scores[0]
        for score in scores[1:]:
            fused = torch.maximum(fused, score)
        return fused
