"""DeepLabv3: Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.

The backbone runs densely from ``output_stride`` on (section 3.1); either it is deep, with ``cascade`` further stages and
``multi_grid`` rates, and a 1x1 convolution reads its output (section 3.2, ``aspp=False``), or ASPP with image-level features does
(section 3.3). The logits are upsampled bilinearly to the image.
"""

from __future__ import annotations

from torch import nn

from segmodels.backbones.base import Backbone
from segmodels.heads.aspp import DeepLabHead, PlainHead
from segmodels.heads.fcn import FCNHead
from segmodels.models.base import SegmentationModel


class DeepLabV3(SegmentationModel):
    """DeepLabv3 with torchvision's names: ``backbone``, ``classifier``, ``aux_classifier``.

    Args:
        backbone: see :class:`segmodels.backbones.base.Backbone`; its output stride is the model's.
        num_classes: channels of the logits.
        aux_loss: with an auxiliary head on the features before the last stage, active in training.
        aspp: False: the classifier reads the backbone's output, and the arguments of ASPP do not matter.
        rates, separable, image_pooling, dropout: of the :class:`segmodels.heads.aspp.ASPP`.
        head_channels: width of ASPP.
        head_conv: torchvision's additional 3x3 convolution after ASPP; the paper has none.
        align_corners: of the final upsampling; the authors' code has True, torchvision False.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        aspp: bool = True,
        rates: tuple[int, ...] = (6, 12, 18),
        separable: bool | str = False,
        image_pooling: bool = True,
        dropout: float = 0.5,
        head_channels: int = 256,
        head_conv: bool = True,
        align_corners: bool = False,
    ) -> None:
        classifier: nn.Module
        if not aspp:
            classifier = PlainHead(backbone.channels["out"], num_classes)
        else:
            classifier = DeepLabHead(
                backbone.channels["out"],
                num_classes,
                rates,
                channels=head_channels,
                separable=separable,
                image_pooling=image_pooling,
                dropout=dropout,
                head_conv=head_conv,
            )
        aux = FCNHead(backbone.channels["aux"], num_classes) if aux_loss else None
        super().__init__(backbone, classifier, aux, align_corners=align_corners)
