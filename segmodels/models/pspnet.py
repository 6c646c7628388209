"""PSPNet: Zhao, Shi, Qi, Wang, Jia, "Pyramid Scene Parsing Network", 2017.

The backbone, a ResNet with a stem of three 3x3 convolutions, runs densely at output stride 8, whole stages at one rate; pyramid
pooling gathers context over the whole map and its parts (section 3.2), a 3x3 convolution reads map and context together, and
the logits are upsampled bilinearly to the image. The auxiliary loss reads the features before the last stage (section 3.3).
"""

from __future__ import annotations

from segmodels.backbones.base import Backbone
from segmodels.heads.fcn import FCNHead
from segmodels.heads.psp import PSPHead
from segmodels.models.base import SegmentationModel


class PSPNet(SegmentationModel):
    """PSPNet with torchvision's names: ``backbone``, ``classifier``, ``aux_classifier``.

    Args:
        backbone: see :class:`segmodels.backbones.base.Backbone`; its output stride is the model's.
        num_classes: channels of the logits.
        aux_loss: with an auxiliary head on the features before the last stage, active in training.
        bins, mode, reduction, kernel, predict_kernel, dropout: of the :class:`segmodels.heads.psp.PSPHead`.
        align_corners: of all upsampling; the authors' code aligns corners.
        head_channels: width of the convolution over the concatenation (section 3.2: 512).
    """

    default_output_stride = 8
    backbone_options = {"stem": "deep", "first_block": "full"}

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        bins: tuple[int, ...] = (1, 2, 3, 6),
        mode: str = "avg",
        reduction: bool = True,
        kernel: int = 3,
        predict_kernel: int = 1,
        dropout: float = 0.1,
        align_corners: bool = True,
        head_channels: int = 512,
    ) -> None:
        classifier = PSPHead(
            backbone.channels["out"],
            head_channels,
            num_classes,
            tuple(bins),
            dropout=dropout,
            align_corners=align_corners,
            mode=mode,
            reduction=reduction,
            kernel=kernel,
            predict_kernel=predict_kernel,
        )
        aux = FCNHead(backbone.channels["aux"], num_classes) if aux_loss else None
        super().__init__(backbone, classifier, aux, align_corners=align_corners)
