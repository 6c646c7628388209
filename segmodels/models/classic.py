"""What the systems before DeepLabv3 share: a geometry that is part of the paper."""

from __future__ import annotations

from torch import nn

from segmodels.backbones.base import Backbone
from segmodels.models.base import SegmentationModel

#: Later backbones that these systems also run on, light ones, the first two with free ImageNet weights. They pad their own maps,
#: so value ``i`` of a map lies on row ``stride * i`` of the image, and they have no fc6 and fc7.
LIGHT_BACKBONES = ("mobilenetv2", "efficientnet_lite0", "resnet18")


class ClassicModel(SegmentationModel):
    """A system with one output stride, without an auxiliary head."""

    def __init__(
        self, backbone: Backbone, classifier: nn.Module, *, aux_loss: bool = False, align_corners: bool = False
    ) -> None:
        if aux_loss:
            raise ValueError(f"aux_loss=True: {type(self).__name__} has no auxiliary head")
        super().__init__(backbone, classifier, align_corners=align_corners)

    def set_output_stride(self, output_stride: int) -> None:
        """Refuses every stride but the paper's."""
        if output_stride != self.default_output_stride:
            raise ValueError(
                f"output_stride={output_stride!r}: {type(self).__name__} has {self.default_output_stride}, and no other"
            )
