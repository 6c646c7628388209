"""The training loss: cross-entropy of the logits upsampled to the labels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

import atrous_kernels

IGNORE_INDEX = 255


class SegmentationLoss(nn.Module):
    """``CE(out) + aux_weight * CE(aux)``; each ``[N, C, h, w]`` is upsampled bilinearly to the labels (DeepLabv3, Chen et al.
    2017, arXiv:1706.05587, section 4.1: keep the labels' detail), without storing it at that size. The auxiliary loss is
    PSPNet's (Zhao et al. 2017, arXiv:1612.01105, section 3.3). Outputs ``"scale..."``, of the scales of one image, count like
    ``"out"`` (DeepLab v2, Chen et al. 2016, arXiv:1606.00915, section 4.1.1).

    Args:
        weight: float ``[C]``, one factor per class, or None.
        label_smoothing: 0 to below 1.
        aux_weight: factor of the auxiliary loss.
        align_corners: of the upsampling; the model's.
        labels_at: ``"image"``, or ``"scores"``: instead of upsampling, the labels nearest to the grid of the logits, corners
            aligned (DeepLab v1 and v2; for sizes of 8 k + 1, every eighth).
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        aux_weight: float = 0.4,
        align_corners: bool = False,
        labels_at: str = "image",
    ) -> None:
        super().__init__()
        self.labels_at = labels_at
        self.align_corners = align_corners
        self.register_buffer("weight", weight, persistent=False)
        self.label_smoothing, self.aux_weight = label_smoothing, aux_weight

    def forward(self, logits: dict[str, Tensor], target: Tensor) -> Tensor:
        """Scalar float32. ``target`` int64 ``[N, H, W]`` with 255 ignored; without any labelled pixel the loss is 0."""
        loss = self._cross_entropy(logits["out"], target)
        if "aux" in logits and self.aux_weight:
            loss = loss + self.aux_weight * self._cross_entropy(logits["aux"], target)
        for name, scores in logits.items():
            if name.startswith("scale"):
                loss = loss + self._cross_entropy(scores, target)
        return loss

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.labels_at == "scores":
            rows, columns = (
                torch.linspace(0, last - 1, n, device=target.device).round().long()
                for last, n in zip(target.shape[1:], logits.shape[2:], strict=True)
            )
            target = target[:, rows][:, :, columns]
        if not bool((target != IGNORE_INDEX).any()):
            return logits.float().sum() * 0  # the mean over no pixels would be nan and end the training
        # computed in float32 whatever autocast chose: the exponentials of bf16 logits have two digits
        return atrous_kernels.upsample_cross_entropy(
            logits, target, weight=self.weight, ignore_index=IGNORE_INDEX, label_smoothing=self.label_smoothing,
            align_corners=self.align_corners,
        )  # fmt: skip


def balanced_weights(labels: Iterable[np.ndarray], num_classes: int, balance: float) -> Tensor:
    """Class weights ``frequency ** -balance``, scaled so that the average pixel has weight 1.

    Args:
        labels: uint8 ``[H, W]`` maps of the training split.
        num_classes: C.
        balance: 0 (all equal) to 1 (all classes contribute equally).

    Returns:
        float32 ``[C]``; a class that never occurs has weight 0.

    Raises:
        ValueError: no labelled pixel in any map.
    """
    counts = np.zeros(256, np.int64)
    for label in labels:
        counts += np.bincount(label.ravel(), minlength=256)
    counts = counts[:num_classes]
    if not counts.sum():
        raise ValueError("train.balance needs labelled pixels; the training split has none")
    frequency = counts / counts.sum()
    weights = np.where(counts > 0, np.maximum(frequency, np.finfo(float).tiny) ** -balance, 0.0)
    return torch.from_numpy(weights / (weights * frequency).sum()).float()
