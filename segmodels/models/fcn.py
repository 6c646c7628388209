"""FCN: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", 2015 (CVPR; PAMI 2017).

A classification network whose fully connected layers run as convolutions scores the image at stride 32; a transposed
convolution brings the scores to the image (FCN-32s). FCN-16s and 8s add scores of pool4 and pool3, which see more detail
(section 4.2). The image is padded by 100 instead of aligning it, so what is added and what is returned is cropped; the offsets
follow from the backbone's ``centers`` and are the 19, 27, 31, 18, 5 and 9 of the authors' code. Later backbones align their maps
with the image; there, nothing is cropped.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone
from segmodels.backbones.classic import ClassicBackbone
from segmodels.heads.upscore import Upscore, crop, upsample_from_corner
from segmodels.models.base import check_input
from segmodels.models.classic import LIGHT_BACKBONES, ClassicModel

#: Fixed factors on what the at-once form of FCN-8s scores (PAMI, section 4.3): features of other depths have other magnitudes.
AT_ONCE = {"out": 1.0, "pool4": 0.01, "pool3": 0.0001}


class SkipScores(nn.Module):
    """Scores of fc7 and of the pools, coarse to fine; 1x1 convolutions, zero at the start.

    Args:
        levels: name of a score -> name of the backbone's features, coarse to fine.
    """

    def __init__(self, channels: dict[str, int], num_classes: int, levels: dict[str, str], at_once: bool) -> None:
        super().__init__()
        self.levels = levels
        self.factors = {name: AT_ONCE[name] if at_once else 1.0 for name in levels}
        self.score = nn.ModuleDict({name: Conv2d(channels[level], num_classes, 1) for name, level in levels.items()})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        inputs = {name: features[level] for name, level in self.levels.items()}
        return [
            score(inputs[name] if self.factors[name] == 1 else inputs[name] * self.factors[name])
            for name, score in self.score.items()
        ]


class SkipDecoder(nn.Module):
    """From scores, coarse to fine, to the image: each is doubled and added to the next, the last is upsampled at once.

    Args:
        centers: of the backbone, in pixels of the image; from them follow all offsets.
        skips: what is added, coarse to fine.
        learned: the doublings are learned (CVPR, section 3.3); the last upsampling never is.

    Attributes:
        skip_offsets: rows of each skip before the first one that is used; ``offset``: the same of the last upsampling.
    """

    def __init__(self, centers: dict[str, float], num_classes: int, skips: tuple[str, ...], learned: bool) -> None:
        super().__init__()
        stride, center = 32, centers["out"]
        self.skip_offsets: list[int] = []
        self.doublings = nn.ModuleList()
        for name in skips:
            self.doublings.append(Upscore(num_classes, 4, 2, learned=learned))
            stride //= 2
            center -= 1.5 * stride
            self.skip_offsets.append(round((center - centers[name]) / stride))
        # A kernel as odd as the position of the scores, so that they fall on whole pixels.
        kernel = 2 * stride if center % 1 else 2 * stride - 1
        self.offset = round((kernel - 1) / 2 - center)
        self.upscore = Upscore(num_classes, kernel, stride)

    def forward(self, scores: list[Tensor], size: torch.Size) -> Tensor:
        x, *rest = scores
        for double, offset, score in zip(self.doublings, self.skip_offsets, rest, strict=True):
            x = double(x)
            x = x + crop(score, offset, x.shape[-2:])
        return crop(self.upscore(x), self.offset, size)


class AlignedDecoder(nn.Module):
    """The same for maps whose value ``i`` lies on row ``stride * i`` of the image: interpolation, nothing learned or cropped."""

    def forward(self, scores: list[Tensor], size: torch.Size) -> Tensor:
        x, *rest = scores
        for score in rest:
            x = upsample_from_corner(x, 2, score.shape[2:]) + score
        return upsample_from_corner(x, 32 >> len(rest), size)


class FCN32s(ClassicModel):
    """FCN-32s; ``logits`` have the size of the image.

    Args:
        backbone: VGG-16, AlexNet or GoogLeNet in the geometry of ``backbone_options``, or one that aligns its maps.
        num_classes: channels of ``"out"``.
        geometric_classes: with a second head, ``"geometric"`` (SIFT Flow has 3; section 5).
        late_fusion: two networks, for colour and for HHA, whose scores are averaged (NYUDv2; section 5). The second starts as a
            copy of the first, and the input has six channels. Early fusion is a backbone of more ``in_channels``.
        at_once: FCN-8s trained in one stage, from fixed factors on the pools (PAMI, section 4.3).
        learn_upsampling: of 16s and 8s: learn all transposed convolutions but the last (CVPR); the code learns none.

    Raises:
        ValueError: ``learn_upsampling`` on a backbone that aligns its maps.
    """

    default_output_stride = 32
    #: Name of the score -> the backbone's features that it reads.
    skips: dict[str, str] = {}
    backbones: tuple[str, ...] = ("vgg16", "alexnet", "googlenet", *LIGHT_BACKBONES)
    backbone_options: dict[str, Any] = {"fc6": "fcn", "first_padding": 100}

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        geometric_classes: int | None = None,
        late_fusion: bool = False,
        at_once: bool = False,
        learn_upsampling: bool = False,
    ) -> None:
        heads = {"out": num_classes} | ({"geometric": geometric_classes} if geometric_classes is not None else {})
        streams = 2 if late_fusion else 1
        if learn_upsampling and not isinstance(backbone, ClassicBackbone):
            raise ValueError("learn_upsampling=True: expected vgg16; this backbone aligns its maps, which are interpolated")
        levels = {"out": "out"} | self.skips
        classifier = nn.ModuleDict()
        for name, classes in heads.items():
            scores = [SkipScores(backbone.channels, classes, levels, at_once) for _ in range(streams)]
            decoder: nn.Module = AlignedDecoder()
            if isinstance(backbone, ClassicBackbone):
                decoder = SkipDecoder(backbone.centers(), classes, tuple(self.skips), learn_upsampling)
            classifier[name] = nn.ModuleDict({"scores": nn.ModuleList(scores), "decoder": decoder})
        super().__init__(backbone, classifier, aux_loss=aux_loss)
        self.backbone_hha = copy.deepcopy(backbone) if late_fusion else None
        self.in_channels = backbone.in_channels * streams

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """``{"out": [N, num_classes, H, W]}`` and, with that head, ``"geometric"``."""
        check_input(x, self.in_channels)
        self._check_statistics(x)
        streams = [self.backbone(x)] if self.backbone_hha is None else self._both(x)
        out = {}
        for name, head in self.classifier.items():
            parts = [score(features) for score, features in zip(head["scores"], streams, strict=True)]
            scores = [sum(part) / len(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
            out[name] = head["decoder"](scores, x.shape[-2:])
        return out

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As :meth:`logits`."""
        return self.logits(x)

    def _both(self, x: Tensor) -> list[dict[str, Tensor]]:
        colour, hha = x.chunk(2, dim=1)
        return [self.backbone(colour), self.backbone_hha(hha)]  # type: ignore[misc]

    def start_from(self, coarser: FCN32s) -> None:
        """Copy everything that ``coarser`` has: 16s starts from 32s, 8s from 16s; the new skip stays zero.

        Raises:
            ValueError: ``coarser`` has something that does not fit here.
        """
        own = self.state_dict()
        for key, value in coarser.state_dict().items():
            if key not in own or own[key].shape != value.shape:
                expected = f"{list(own[key].shape)}" if key in own else "nothing of this name"
                raise ValueError(f"{key} of {type(coarser).__name__} has shape {list(value.shape)}: expected {expected}")
        self.load_state_dict(coarser.state_dict(), strict=False)


class FCN16s(FCN32s):
    """FCN-16s: as :class:`FCN32s`, with pool4."""

    skips = {"pool4": "aux"}
    backbones = ("vgg16", *LIGHT_BACKBONES)


class FCN8s(FCN16s):
    """FCN-8s: as :class:`FCN16s`, with pool3."""

    skips = {"pool4": "aux", "pool3": "mid"}
