"""DeepLab with EdgeNet and domain transform: Chen, Barron, Papandreou, Murphy, Yuille, "Semantic Image Segmentation with
Task-Specific Edge Detection Using CNNs and a Discriminatively Trained Domain Transform", 2016.

EdgeNet predicts edges from features in the middle of the network, and a domain transform smooths the upsampled scores within them
(sections 3.1 and 3.2). Nothing but the segmentation loss trains the edges: its gradient flows through the filter (section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import atrous_kernels as ak
from segmodels.backbones import BACKBONES
from segmodels.backbones.base import Backbone
from segmodels.heads.aspp import DeepLabHead, PlainHead
from segmodels.heads.edge_net import EdgeNet
from segmodels.heads.fcn import FCNHead
from segmodels.models.base import SegmentationModel, check_input, upsample


class DeepLabDT(SegmentationModel):
    """DeepLab's classifier, ``edge_net`` and a domain transform at the resolution of the image, trained end to end.

    The paper has DeepLab-LargeFOV on VGG-16: ``backbone="vgg16", fc6="largefov", aspp=False``.

    Args:
        backbone: see :class:`segmodels.backbones.base.Backbone`; its output stride is the model's.
        num_classes: channels of the logits.
        aux_loss: with an auxiliary head on the features before the last stage, active in training.
        edge_levels: the backbone's features that EdgeNet reads, of ``"low"``, ``"mid"``, ``"aux"``, ``"out"`` and, of VGG-16,
            ``"pool1"`` to ``"pool5"``; the paper takes some from before the last stage.
        sigma_s, sigma_r, iterations: of :func:`atrous_kernels.domain_transform`; the paper trains with widths 100 and 1.
        aspp, rates, image_pooling, dropout, head_channels, head_conv: as in :class:`segmodels.models.DeepLabV3`.

    Raises:
        ValueError: an argument outside these.
    """

    default_output_stride = 8
    backbone_options = {"pool": 3}
    backbones = (*BACKBONES, "vgg16")

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        edge_levels: Sequence[str] = ("low", "aux"),
        sigma_s: float = 100.0,
        sigma_r: float = 1.0,
        iterations: int = 3,
        aspp: bool = True,
        rates: tuple[int, ...] = (6, 12, 18),
        image_pooling: bool = True,
        dropout: float = 0.5,
        head_channels: int = 256,
        head_conv: bool = False,
    ) -> None:
        unknown = [level for level in edge_levels if level not in backbone.channels]
        if unknown or not edge_levels:
            raise ValueError(f"edge_levels={list(edge_levels)}: expected one or more of {', '.join(backbone.channels)}")
        if not (sigma_s > 0 and sigma_r > 0 and iterations > 0):
            given = f"sigma_s={sigma_s}, sigma_r={sigma_r}, iterations={iterations}"
            raise ValueError(f"{given}: expected numbers above 0")
        classifier = PlainHead(backbone.channels["out"], num_classes) if not aspp else DeepLabHead(
            backbone.channels["out"], num_classes, rates, channels=head_channels, image_pooling=image_pooling, dropout=dropout,
            head_conv=head_conv,
        )  # fmt: skip
        super().__init__(backbone, classifier, FCNHead(backbone.channels["aux"], num_classes) if aux_loss else None)
        self.edge_levels = tuple(edge_levels)
        self.edge_net = EdgeNet([backbone.channels[level] for level in edge_levels])
        self.sigma_s, self.sigma_r, self.iterations = float(sigma_s), float(sigma_r), iterations

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """``{"out": [N, num_classes, H, W]}``, at the resolution of the image; with ``"aux"`` in training with aux_loss."""
        check_input(x)
        self._check_statistics(x)
        features = self.backbone(x)
        size = x.shape[-2:]
        scores = upsample(self.classifier(features["out"]), size)
        edges = self.edge_net([features[level] for level in self.edge_levels], size)
        out = {"out": ak.domain_transform(scores, edges, self.sigma_s, self.sigma_r, self.iterations)}
        if self.training and self.aux_classifier is not None:
            out["aux"] = self.aux_classifier(features["aux"])
        return out

    def edges(self, x: Tensor) -> Tensor:
        """What EdgeNet predicts, ``[N, 1, H, W]``."""
        check_input(x)
        features = self.backbone(x)
        return self.edge_net([features[level] for level in self.edge_levels], x.shape[-2:])
