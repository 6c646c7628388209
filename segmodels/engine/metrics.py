"""Scores from one confusion matrix over a whole split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

IGNORE_INDEX = 255


class ConfusionMatrix:
    """Counts of pixels by truth (rows) and prediction (columns), int64 ``[C, C]``, added up over a split.

    Unlike an average of per-image scores, the result depends on no order, batch size or image size.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: expected 1 or more")
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds integer maps of equal shape; pixels whose target is 255 do not count.

        Raises:
            ValueError: unequal shapes, or a class outside ``0 .. C-1`` (a target may be 255).
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)}: expected equal shapes")
        kept = target != IGNORE_INDEX
        prediction, target = prediction[kept].to(torch.int64), target[kept].to(torch.int64)
        for what, values in (("prediction", prediction), ("target", target)):
            if values.numel() and (int(values.min()) < 0 or int(values.max()) >= self.num_classes):
                raise ValueError(
                    f"{what} holds classes {int(values.min())} to {int(values.max())}: expected 0 to {self.num_classes - 1}"
                )
        counts = torch.bincount(target * self.num_classes + prediction, minlength=self.num_classes**2)
        self.matrix += counts.view(self.num_classes, self.num_classes).cpu()

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the counts of another part of the split."""
        self.matrix += other.matrix

    def iou(self) -> Tensor:
        """Intersection over union per class, float64 ``[C]``; nan for a class in neither truth nor prediction."""
        diagonal = self.matrix.diagonal().double()
        return diagonal / (self.matrix.sum(0) + self.matrix.sum(1) - self.matrix.diagonal())

    def scores(self) -> dict[str, float]:
        """``miou``, ``pixel_accuracy``, ``mean_accuracy`` (over classes of the truth) and ``fwiou`` (frequency-weighted).

        Classes absent from both truth and prediction do not count; with no pixel at all every score is nan.
        """
        matrix = self.matrix.double()
        total, truth, iou = matrix.sum(), matrix.sum(1), self.iou()
        accuracy = matrix.diagonal() / truth
        return {
            "miou": float(iou.nanmean()),
            "pixel_accuracy": float(matrix.trace() / total),
            "mean_accuracy": float(accuracy.nanmean()),
            "fwiou": float((truth / total * iou).nansum()) if total else float("nan"),
        }

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Everything as JSON values: scores, ``iou`` by class name (None where undefined), the counts."""
        iou = {name: None if value != value else value for name, value in zip(classes, self.iou().tolist(), strict=True)}
        scores = {name: None if value != value else value for name, value in self.scores().items()}
        return {**scores, "iou": iou, "confusion": self.matrix.tolist()}

    def table(self, classes: Sequence[str], title: str = "") -> Table:
        """IoU, accuracy and share of pixels per class, for the terminal."""
        table = Table("class", title=title)
        for column in ("IoU", "accuracy", "pixels"):
            table.add_column(column, justify="right")
        truth, total = self.matrix.sum(1), max(1, int(self.matrix.sum()))
        for index, (name, value) in enumerate(zip(classes, self.iou().tolist(), strict=True)):
            accuracy = float(self.matrix[index, index] / truth[index])
            table.add_row(name, _percent(value), _percent(accuracy), _percent(int(truth[index]) / total))
        scores = self.scores()
        table.add_section()
        table.add_row("mean", _percent(scores["miou"]), _percent(scores["mean_accuracy"]), "", style="bold")
        table.add_row("all pixels", _percent(scores["fwiou"]), _percent(scores["pixel_accuracy"]), "")
        return table


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f} %"
