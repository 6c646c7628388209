"""Yu & Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", 2016: front end and context modules.

The front end is VGG-16 without pool4, pool5 and without any padding (section 4): images are reflected at their borders instead,
so that every score sees image. A context module then exchanges what neighbours know (section 3). Dilation7, 8 and 10 are the
authors' networks for KITTI, VOC and CamVid, and Cityscapes (appendix).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import Backbone
from segmodels.backbones.vgg import VGG16
from segmodels.heads.context import LARGE_WIDTHS, ContextModule
from segmodels.heads.upscore import Upscore, crop, upsample_from_corner
from segmodels.models.base import check_input
from segmodels.models.classic import LIGHT_BACKBONES, ClassicModel

#: Rows of the padded image that the front end consumes on each side, and its stride.
MARGIN, STRIDE = 186, 8


class FrontEnd(ClassicModel):
    """The front end; ``logits`` have the size of the image.

    Score ``i`` stands for row ``8 i`` of the image, as in the authors' labels and upsampling; rows between are interpolated.

    Args:
        backbone: VGG-16 in the geometry of ``backbone_options``; or one that pads its own maps, which then needs no margin.
        num_classes: channels of the logits.
    """

    default_output_stride = STRIDE
    backbones = ("vgg16", *LIGHT_BACKBONES)
    backbone_options: dict[str, Any] = {"fc6": "front-end", "layer_padding": False, "dense_pools": False}
    tile: tuple[int, int] | None = None

    def __init__(self, backbone: Backbone, num_classes: int = 21, *, aux_loss: bool = False) -> None:
        final = Conv2d(backbone.channels["out"], num_classes, 1)
        nn.init.normal_(final.weight, std=0.001)
        nn.init.zeros_(final.bias)  # type: ignore[arg-type]
        classifier = nn.Sequential(OrderedDict(final=final))
        context = self._context(num_classes)
        if context is not None:
            classifier.add_module("context", context)
        super().__init__(backbone, classifier, aux_loss=aux_loss)
        self.margin = MARGIN if isinstance(backbone, VGG16) else 0

    def _context(self, num_classes: int) -> ContextModule | None:
        return None

    def _in_context(self, scores: Tensor) -> Tensor:
        if self.tile is None:
            return self.classifier.context(scores)
        rows = [[self.classifier.context(part) for part in row.split(self.tile[1], 3)] for row in scores.split(self.tile[0], 2)]
        return torch.cat([torch.cat(row, 3) for row in rows], 2)

    def scores(self, x: Tensor) -> Tensor:
        """``[N, num_classes, ceil(H / 8), ceil(W / 8)]``; with ``tile``, as much more as the last tiles need."""
        for dim, tile in zip((2, 3), self.tile or (1, 1), strict=True):
            size = x.shape[dim]
            x = x.index_select(dim, reflected(size, self.margin, self.margin + -size % (STRIDE * tile), x.device))
        scores = self.classifier.final(self.backbone(x)["out"])
        return scores if len(self.classifier) == 1 else self._in_context(scores)

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """``{"out": [N, num_classes, H, W]}``."""
        check_input(x)
        self._check_statistics(x)
        return {"out": self._upsample(self.scores(x), x.shape[-2:])}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As :meth:`logits`."""
        return self.logits(x)

    def _upsample(self, scores: Tensor, size: torch.Size) -> Tensor:
        return upsample_from_corner(scores, STRIDE, size)


class Dilation8(FrontEnd):
    """Front end and the eight layers of table 1.

    Args:
        context: ``"basic"`` (as for CamVid) or ``"large"`` (as for VOC: all zeros around the scores at once).
        noise: standard deviation of the context module's weights beside the identity (equation 5).
        identity: False: Glorot's random initialisation in its place, for comparison (section 3).
        pad_first: all zeros around the scores at once; by default with the large context.
        tile: rows and columns of scores that the context module sees at once, with zeros around, as in the authors' evaluation:
            (66, 66) for VOC, (66, 91) for CamVid, (128, 128) for Cityscapes. None: the whole image. The front end does not
            depend on it.
    """

    dilations: tuple[int, ...] = (1, 1, 2, 4, 8, 16, 1)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 21,
        *,
        aux_loss: bool = False,
        context: str = "large",
        noise: float = 0.01,
        identity: bool = True,
        pad_first: bool | None = None,
        tile: Sequence[int] | None = None,
    ) -> None:
        widths = {"basic": None, "large": LARGE_WIDTHS}
        if context not in widths:
            raise ValueError(f"context={context!r}: expected 'basic' or 'large'")
        if widths[context] is not None and len(self.dilations) != len(LARGE_WIDTHS):
            raise ValueError(f"context={context!r}: {type(self).__name__} has the basic one only")
        if tile is not None:
            if len(tile) != 2 or not all(isinstance(side, int) and side > 0 for side in tile):
                raise ValueError(f"tile={tuple(tile)}: expected two positive integers, rows and columns of scores")
            self.tile = (tile[0], tile[1])
        pad_first = context == "large" if pad_first is None else pad_first
        self._context_options = {"widths": widths[context], "pad_first": pad_first, "noise": noise, "identity": identity}
        super().__init__(backbone, num_classes, aux_loss=aux_loss)

    def _context(self, num_classes: int) -> ContextModule:
        return ContextModule(num_classes, self.dilations, **self._context_options)  # type: ignore[arg-type]


class Dilation7(Dilation8):
    """KITTI: a layer less, since its objects are smaller. Basic context."""

    dilations = (1, 1, 2, 4, 8, 1)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 11,
        *,
        aux_loss: bool = False,
        noise: float = 0.01,
        tile: Sequence[int] | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, aux_loss=aux_loss, context="basic", noise=noise, tile=tile)


class Dilation10(Dilation8):
    """Cityscapes: two layers more, for its larger images. Basic context; a fixed transposed convolution upsamples."""

    dilations = (1, 1, 2, 4, 8, 16, 32, 64, 1)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int = 19,
        *,
        aux_loss: bool = False,
        noise: float = 0.01,
        tile: Sequence[int] | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, aux_loss=aux_loss, context="basic", noise=noise, tile=tile)
        self.upscore = Upscore(num_classes, 2 * STRIDE, STRIDE)

    def _upsample(self, scores: Tensor, size: torch.Size) -> Tensor:
        return crop(self.upscore(scores), STRIDE // 2, size)


def reflected(size: int, before: int, after: int, device: torch.device) -> Tensor:
    """Indices that continue ``0 ... size - 1`` on both sides by reflection at its ends, as often as it takes."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(-before, size + after, device=device) % period
    return torch.minimum(index, period - index)
