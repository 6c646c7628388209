"""The contract of every segmentation model: torchvision's submodules and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.sync_batch_norm import group_of
from segmodels.backbones.base import Backbone


class SegmentationModel(nn.Module):
    """Backbone, classifier and, for training, an auxiliary classifier.

    The classifier reads ``"out"``; a subclass whose classifier reads more defines ``_classify(features) -> logits``. Input
    ``[N, 3, H, W]``, floating point, normalised as the backbone was trained; any size from 1 x 1. ``align_corners`` is that of
    the final upsampling, and of the loss.

    Raises:
        TypeError: input is not a floating-point tensor.
        ValueError: input is not ``[N, 3, H, W]``, or has no pixels; in training, a map of one value per channel.
    """

    #: Where the caller does not say: the paper's.
    default_output_stride = 16
    #: The backbones that it runs on, or None: all of :data:`segmodels.backbones.BACKBONES`.
    backbones: tuple[str, ...] | None = None
    #: Options of the backbone, where it has them, in the paper's network.
    backbone_options: dict[str, Any] = {}

    backbone: Backbone
    classifier: Any  # a module that has set_output_stride; its inputs are the system's own business

    def __init__(
        self,
        backbone: Backbone,
        classifier: nn.Module,
        aux_classifier: nn.Module | None = None,
        *,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.set_output_stride(backbone.output_stride)

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the encoder's output."""
        return self.backbone.output_stride

    def set_output_stride(self, output_stride: int) -> None:
        """Change stride and rates of the built, perhaps trained, model in place; see the backbone's."""
        self.backbone.set_output_stride(output_stride)
        self.classifier.set_output_stride(output_stride)

    def start_from_classification(self, state: Mapping[str, Tensor]) -> None:
        """What the head takes from the published classification file that the backbone has loaded: here, nothing."""

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """``{"out": [N, num_classes, h, w]}`` before the final upsampling; with ``"aux"`` in training with aux_loss."""
        check_input(x)
        self._check_statistics(x)
        features = self.backbone(x)
        out = {"out": self._classify(features)}
        if self.training and self.aux_classifier is not None:
            out["aux"] = self.aux_classifier(features["aux"])
        return out

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``{"out": [N, num_classes, H, W]}``, upsampled bilinearly; with ``"aux"`` as in :meth:`logits`."""
        return {name: upsample(logits, x.shape[-2:], self.align_corners) for name, logits in self.logits(x).items()}

    def _check_statistics(self, x: Tensor) -> None:
        height, width = (-(-side // self.output_stride) for side in x.shape[2:])
        if not self.training or x.shape[0] * height * width != 1:
            return
        norms = [module for module in self.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        if any(norm.training and group_of(norm) is None for norm in norms):
            raise ValueError(
                f"training with one image of {x.shape[2]} x {x.shape[3]} pixels: at output stride {self.output_stride} its map "
                "has one value per channel, so BatchNorm has no statistics. Use larger images, a batch of at least 2, or keep "
                "BatchNorm in eval mode"
            )

    def _classify(self, features: dict[str, Tensor]) -> Tensor:
        return self.classifier(features["out"])


def upsample(x: Tensor, size: torch.Size, align_corners: bool = False) -> Tensor:
    """Bilinear interpolation to ``size`` (height, width); by default pixel areas are aligned, not the centres of the corners."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def check_input(x: Tensor, channels: int = 3) -> None:
    """Refuse what would fail somewhere inside the network with a message about something else."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a tensor [N, {channels}, H, W], not {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"input of shape {list(x.shape)}: expected 4 dimensions [N, {channels}, H, W]")
    if not x.is_floating_point():
        raise TypeError(f"input of dtype {x.dtype}: expected normalised floating-point values")
    if x.shape[1] != channels:
        kind = " (RGB)" if channels == 3 else ""
        raise ValueError(f"input of shape {list(x.shape)}: expected {channels} channels{kind} in dimension 1, not {x.shape[1]}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"input of shape {list(x.shape)}: expected at least 1 x 1 pixels")
