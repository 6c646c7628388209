"""Attention to scale: Chen, Yang, Wang, Xu, Yuille, "Attention to Scale: Scale-Aware Semantic Image Segmentation", 2016.

DeepLab-LargeFOV sees the image at two or three scales, and a small network says for every pixel how much each scale counts
(section 3.2). Extra supervision: each scale also has a loss of its own (section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone
from segmodels.backbones.classic import init_convolutions
from segmodels.models.base import check_input, upsample
from segmodels.models.deeplabv1 import DeepLabV1, classifier_of, field_of_view
from segmodels.models.multiscale import MultiScaleModel, rescale

FUSIONS = ("attention", "average", "max")


class AttentionToScale(MultiScaleModel):
    """Attention to scale; scores at stride 8, upsampled with aligned corners.

    Args:
        backbone: VGG-16 with LargeFOV; others get LargeFOV behind them.
        num_classes: channels of the logits.
        scales: (1, 0.75, 0.5) or (1, 0.5) in the paper.
        fusion: ``"attention"``, or what the paper compares it with: ``"average"``, ``"max"``.
        extra_supervision: in training, each scale's scores are outputs too.
        attention_channels: width of the attention network, a 3x3 convolution with ReLU before a 1x1 convolution to S maps.
        fc_channels, fc_rate, dropout: of LargeFOV, behind a backbone other than VGG-16.

    Raises:
        ValueError: an argument outside these.
    """

    default_output_stride = 8
    backbones = DeepLabV1.backbones
    backbone_options = DeepLabV1.backbone_options

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        scales: Sequence[float] = (1.0, 0.75, 0.5),
        fusion: str = "attention",
        extra_supervision: bool = True,
        attention_channels: int = 512,
        fc_channels: int = 1024,
        fc_rate: int = 12,
        dropout: float = 0.5,
    ) -> None:
        if fusion not in FUSIONS:
            raise ValueError(f"fusion={fusion!r}: expected one of {', '.join(FUSIONS)}")
        fc7, channels = field_of_view(backbone, fc_channels, 3, fc_rate, dropout)
        classifier = nn.ModuleDict({"fc7": fc7, "fc8": classifier_of(channels, num_classes)})
        if fusion == "attention":
            hidden = Conv2d(channels * len(scales), attention_channels, 3, padding=1)
            init_convolutions(hidden)
            classifier["attention"] = nn.Sequential(
                hidden, nn.ReLU(inplace=True), classifier_of(attention_channels, len(scales))
            )
        super().__init__(backbone, classifier, scales, supervise_scales=extra_supervision, aux_loss=aux_loss)
        self.fusion = fusion

    def attention(self, x: Tensor) -> Tensor:
        """How much each scale counts: ``[N, len(scales), H, W]``, with sum 1 at every pixel.

        Raises:
            ValueError: a model with another fusion, or an input that :meth:`forward` refuses.
        """
        if self.fusion != "attention":
            raise ValueError(f"fusion={self.fusion!r} has no attention maps: expected a model with fusion='attention'")
        check_input(x)
        features = [self._features(rescale(x, scale)) for scale in self.scales]
        size = features[0].shape[-2:]
        weights = self._weights([upsample(feature, size, align_corners=True) for feature in features])
        return upsample(weights, x.shape[-2:], align_corners=True)

    def _features(self, x: Tensor) -> Tensor:
        return self.classifier["fc7"](self.backbone(x)["out"])

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self._features(x)
        return self.classifier["fc8"](features), features

    def _weights(self, features: list[Tensor]) -> Tensor:
        return self.classifier["attention"](torch.cat(features, dim=1)).softmax(1)

    def _fuse(self, scores: list[Tensor], features: list[Tensor]) -> Tensor:
        stacked = torch.stack(scores, dim=1)
        if self.fusion == "max":
            return stacked.amax(1)
        if self.fusion == "average":
            return stacked.mean(1)
        return (stacked * self._weights(features)[:, :, None]).sum(1)
