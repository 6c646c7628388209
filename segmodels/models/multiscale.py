"""One network on several scales of the image (DeepLab v2, section 4.1.1; Chen et al., "Attention to Scale", 2016, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmodels.backbones.base import Backbone
from segmodels.models.base import check_input, upsample
from segmodels.models.classic import ClassicModel


class MultiScaleModel(ClassicModel):
    """Scores of each scale, brought to the grid of the first and fused.

    A subclass defines ``_scores(x) -> (scores, features or None)`` and ``_fuse(scores, features)``, both of all scales in order.

    Args:
        scales: factors on the image, 1 first, then descending.
        supervise_scales: in training, the output also has the scores of each scale, ``"scale1"``, ``"scale0.75"`` ..., which the
            loss counts like the fused ones. Where the scale is not 1 / n, its grid does not meet that of the labels, so the
            scores come on the grid of the first scale.
        align_corners: of all interpolation; the authors' code has True.

    Raises:
        ValueError: other scales.
    """

    def __init__(
        self,
        backbone: Backbone,
        classifier: nn.Module,
        scales: Sequence[float],
        *,
        supervise_scales: bool,
        aux_loss: bool,
        align_corners: bool = True,
    ) -> None:
        super().__init__(backbone, classifier, aux_loss=aux_loss, align_corners=align_corners)
        self.scales = tuple(scales)
        descending = all(0 < b < a for a, b in zip(self.scales, self.scales[1:], strict=False))
        if not self.scales or self.scales[0] != 1 or not descending:
            raise ValueError(f"scales={self.scales}: expected 1 first and then smaller factors, for example (1, 0.75, 0.5)")
        self.supervise_scales = supervise_scales

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """``{"out": [N, num_classes, h, w]}`` at stride 8; in training with the scores of each scale."""
        check_input(x)
        parts = []
        for scale in self.scales:
            image = rescale(x, scale, self.align_corners)
            self._check_statistics(image)
            parts.append(self._scores(image))
        if len(parts) == 1:
            return {"out": parts[0][0]}
        size = parts[0][0].shape[-2:]
        scores = [upsample(score, size, self.align_corners) for score, _ in parts]
        features = [upsample(feature, size, self.align_corners) for _, feature in parts if feature is not None]
        out = {"out": self._fuse(scores, features)}
        if self.training and self.supervise_scales:
            for scale, (own, _), met in zip(self.scales, parts, scores, strict=True):
                out[f"scale{scale:g}"] = own if (1 / scale).is_integer() else met
        return out

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError(f"{type(self).__name__} does not define its scores")

    def _fuse(self, scores: list[Tensor], features: list[Tensor]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define its fusion")


def rescale(x: Tensor, scale: float, align_corners: bool = True) -> Tensor:
    """Bilinear. With aligned corners n pixels become ``(n - 1) * scale + 1``, so that 8 k + 1 stays of this kind at a half;
    otherwise ``n * scale``, rounded down."""
    if scale == 1:
        return x
    if align_corners:
        return upsample(x, torch.Size(round((n - 1) * scale) + 1 for n in x.shape[-2:]), align_corners=True)
    if min(x.shape[-2:]) * scale < 1:
        return upsample(x, torch.Size(max(1, int(n * scale)) for n in x.shape[-2:]))
    # The factor itself places the pixels, not the ratio of the rounded sizes.
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
