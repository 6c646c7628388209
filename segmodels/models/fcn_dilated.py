"""Dilated FCN: Shelhamer, Long, Darrell, "Fully Convolutional Networks for Semantic Segmentation", 2015, on a dilated backbone.

Without the skips of the paper; output stride 8 as the dilated ResNets of DeepLab and PSPNet. It is what their papers call the
baseline, and torchvision ``fcn_resnet50``.
"""

from __future__ import annotations

from segmodels.backbones.base import Backbone
from segmodels.heads.fcn import FCNHead
from segmodels.models.base import SegmentationModel


class DilatedFCN(SegmentationModel):
    """A 3x3 convolution and a classifier on the backbone's output, with torchvision's names.

    Args:
        backbone: see :class:`segmodels.backbones.base.Backbone`; its output stride is the model's.
        num_classes: channels of the logits.
        aux_loss: with an auxiliary head on the features before the last stage, active in training.
        align_corners: of the final upsampling.
    """

    default_output_stride = 8

    def __init__(
        self, backbone: Backbone, num_classes: int = 21, *, aux_loss: bool = False, align_corners: bool = False
    ) -> None:
        aux = FCNHead(backbone.channels["aux"], num_classes) if aux_loss else None
        super().__init__(backbone, FCNHead(backbone.channels["out"], num_classes), aux, align_corners=align_corners)
