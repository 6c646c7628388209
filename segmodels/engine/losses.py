"""The training loss: cross-entropy of the logits upsampled to the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

import atrous_kernels
from segmodels.config import Config, TrainConfig
from segmodels.data import SegmentationDataset

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
        reduction: ``"mean"`` over the labelled pixels, or ``"sum"`` (FCN, Long et al. 2015, section 4.3).
        hard_fraction: of the pixels, those of largest loss that count (Wu et al. 2016, arXiv:1605.06885). Can be set at any time.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        aux_weight: float = 0.4,
        align_corners: bool = False,
        labels_at: str = "image",
        reduction: str = "mean",
        hard_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        self.reduction, self.hard_fraction = reduction, hard_fraction
        self.labels_at = labels_at
        self.align_corners = align_corners
        self.register_buffer("weight", weight, persistent=False)
        self.label_smoothing, self.aux_weight = label_smoothing, aux_weight
        #: Where other processes have the rest of the batch: the sum of a number over all of them.
        self.total: Callable[[Tensor], Tensor] | None = None

    def forward(self, logits: dict[str, Tensor], target: Tensor, whole: Tensor | None = None) -> Tensor:
        """Scalar float32. Without any labelled pixel the loss is 0.

        Args:
            logits: of the network.
            target: int64 ``[N, H, W]`` with 255 ignored.
            whole: the labels ``[M, H, W]`` of a batch that ``target`` is a part of. The losses of all parts then add up to that
                of the batch; below ``hard_fraction`` 1, each part keeps the hardest of its own pixels.

        In several processes (``total``), the losses of all of them add up to that of the batch in the same way.
        """
        whole = target if whole is None else whole
        loss = self._cross_entropy(logits["out"], target, whole)
        if "aux" in logits and self.aux_weight:
            loss = loss + self.aux_weight * self._cross_entropy(logits["aux"], target, whole)
        for name, scores in logits.items():
            if name.startswith("scale"):
                loss = loss + self._cross_entropy(scores, target, whole)
        return loss

    def _cross_entropy(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        part = (target is not whole or self.total is not None) and self.reduction == "mean"
        if self.labels_at == "scores":
            target, whole = (self._on_grid(labels, logits) for labels in (target, whole))
        share = self._share(target, whole) if part else None  # first: every process has to ask
        if share == 0 or not bool((target != IGNORE_INDEX).any()):
            return logits.float().sum() * 0  # the mean over no pixels would be nan and end the training
        # computed in float32 whatever autocast chose: the exponentials of bf16 logits have two digits
        loss = atrous_kernels.upsample_cross_entropy(
            logits, target, weight=self.weight, ignore_index=IGNORE_INDEX, reduction=self.reduction,
            label_smoothing=self.label_smoothing, hard_fraction=self.hard_fraction, align_corners=self.align_corners,
        )  # fmt: skip
        return loss if share is None else loss * share.to(loss.dtype)

    def _share(self, target: Tensor, whole: Tensor) -> Tensor:
        """What the mean over the labels of a part counts in the mean over those of the batch; 0-dimensional float64."""
        counted = self._counted(whole)
        counted = counted if self.total is None else self.total(counted)
        return self._counted(target) / counted.clamp(min=torch.finfo(torch.float64).tiny)

    def _on_grid(self, labels: Tensor, logits: Tensor) -> Tensor:
        rows, columns = (
            torch.linspace(0, last - 1, n, device=labels.device).round().long()
            for last, n in zip(labels.shape[1:], logits.shape[2:], strict=True)
        )
        return labels[:, rows][:, :, columns]

    def _counted(self, labels: Tensor) -> Tensor:
        """What a mean over these labels divides by, float64."""
        kept = labels[labels != IGNORE_INDEX]
        if self.weight is None:
            return torch.tensor(kept.numel(), dtype=torch.float64, device=labels.device)
        return self.weight.double()[kept].sum()


def build_loss(config: Config, train_set: SegmentationDataset, align_corners: bool) -> SegmentationLoss:
    """As the settings say. Raises ValueError for class weights that do not fit the data."""
    settings = config.train
    return SegmentationLoss(
        _class_weights(config, train_set),
        settings.label_smoothing,
        settings.aux_weight,
        align_corners,
        settings.labels_at,
        settings.reduction,
        settings.hard_fraction,
    )


def hard_fraction(settings: TrainConfig, iteration: int) -> float:
    """The share of hard pixels in a step: it falls from 1 in ``hard_fraction_iterations`` steps, as in the code of the authors of
    DeepLab, since at first every pixel is hard."""
    ramp = settings.hard_fraction_iterations
    return 1 - (1 - settings.hard_fraction) * (min(1.0, iteration / ramp) if ramp else 1.0)


def _class_weights(config: Config, train_set: SegmentationDataset) -> Tensor | None:
    given, classes = config.train.class_weights, train_set.num_classes
    if given is not None:
        if len(given) != classes:
            raise ValueError(
                f"train.class_weights has {len(given)} entries: expected {classes}, one per class of {config.data.name}"
            )
        return torch.tensor(given, dtype=torch.float32)
    if config.train.balance:
        labels = (train_set[index][1] for index in range(len(train_set)))
        return balanced_weights(labels, classes, config.train.balance)
    return None


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
