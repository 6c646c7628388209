"""DeepLabv3+: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", 2018.

DeepLabv3 is the encoder; its ASPP output is upsampled to the stride-4 features of the backbone, which a 1x1 convolution
narrows to 48 channels so that they do not outweigh it; two 3x3 convolutions refine the two together (section 3.1, table 1,
table 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone
from segmodels.heads.aspp import ASPP, conv_bn_relu
from segmodels.heads.fcn import FCNHead
from segmodels.models.base import SegmentationModel, upsample


class DeepLabPlusHead(nn.Module):
    """ASPP and decoder: ``(low [N, C_low, h, w], out [N, C_out, h', w']) -> logits [N, num_classes, h, w]``."""

    def __init__(
        self,
        low_channels: int,
        out_channels: int,
        num_classes: int,
        rates: Sequence[int],
        *,
        channels: int,
        low_projection: int,
        separable: bool | str,
        image_pooling: bool,
        dropout: float,
        aspp_refine: bool,
        refine: int,
        align_corners: bool,
    ) -> None:
        super().__init__()
        if not isinstance(refine, int) or refine < 1:
            raise ValueError(f"refine={refine!r}: expected a positive number of convolutions")
        self.align_corners = align_corners
        self.aspp = ASPP(
            out_channels, channels, rates, separable=separable, image_pooling=image_pooling, dropout=dropout
        )
        self.aspp_refine = conv_bn_relu(channels, channels, 3, separable=separable) if aspp_refine else None
        self.project_low = conv_bn_relu(low_channels, low_projection)
        self.refine = nn.Sequential(
            *(
                conv_bn_relu(channels + (low_projection if index == 0 else 0), channels, 3, separable=separable)
                for index in range(refine)
            )
        )
        self.predict = Conv2d(channels, num_classes, 1)

    def forward(self, low: Tensor, out: Tensor) -> Tensor:
        low = self.project_low(low)
        context = self.aspp(out)
        if self.aspp_refine is not None:
            context = self.aspp_refine(context)
        context = upsample(context, low.shape[-2:], self.align_corners)
        return self.predict(self.refine(torch.cat([context, low], dim=1)))

    def set_output_stride(self, output_stride: int) -> None:
        """As :meth:`segmodels.heads.aspp.ASPP.set_output_stride`."""
        self.aspp.set_output_stride(output_stride)


class DeepLabV3Plus(SegmentationModel):
    """DeepLabv3+; ``logits`` have stride 4.

    Args:
        backbone: see :class:`segmodels.backbones.base.Backbone`; its output stride is the model's.
        num_classes: channels of the logits.
        aux_loss: with an auxiliary head on the features before the last stage, active in training.
        rates, image_pooling, dropout: of the :class:`segmodels.heads.aspp.ASPP`.
        separable: atrous separable convolutions in ASPP and decoder (section 3.1).
        head_channels: width of ASPP and decoder.
        low_channels: width to which the stride-4 features are narrowed (table 1).
        refine: number of 3x3 convolutions in the decoder (table 2).
        aspp_refine: with another one behind ASPP, as segmentation_models.pytorch.
        align_corners: of all upsampling; the authors' code has True.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        rates: tuple[int, ...] = (6, 12, 18),
        separable: bool | str = True,
        image_pooling: bool = True,
        dropout: float = 0.1,
        head_channels: int = 256,
        low_channels: int = 48,
        refine: int = 2,
        aspp_refine: bool = False,
        align_corners: bool = False,
    ) -> None:
        classifier = DeepLabPlusHead(
            backbone.channels["low"],
            backbone.channels["out"],
            num_classes,
            rates,
            channels=head_channels,
            low_projection=low_channels,
            separable=separable,
            image_pooling=image_pooling,
            dropout=dropout,
            aspp_refine=aspp_refine,
            refine=refine,
            align_corners=align_corners,
        )
        aux = FCNHead(backbone.channels["aux"], num_classes) if aux_loss else None
        super().__init__(backbone, classifier, aux, align_corners=align_corners)

    def _classify(self, features: dict[str, Tensor]) -> Tensor:
        return self.classifier(features["low"], features["out"])
