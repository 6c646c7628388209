"""A data set of which some images keep their label maps, and the others are known by tags or boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segmodels.data import DataError, SegmentationDataset
from segmodels.weak.annotations import WeakLabels
from segmodels.weak.boxes import rectangles, segments

TAGS = ("em_fixed", "em_adapt")
BOXES = ("bbox_rect", "bbox_seg", "bbox_em_fixed")
LATENT = ("em_fixed", "em_adapt", "bbox_em_fixed")  # labels are estimated again in every training step


class Subset(SegmentationDataset):
    """Some items of another data set, in the order given."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]):
        super().__init__(dataset.classes, dataset.colors, dataset.split, len(indices))
        self.dataset, self.indices = dataset, [int(index) for index in indices]

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As the other data set."""
        return self.dataset[self.indices[index]]

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[self._check(index)])


class WeakDataset(SegmentationDataset):
    """Items of ``dataset``; where ``weak`` holds, their label maps are never read. In their place comes what the method knows:
    0 everywhere (tags), the filled boxes (bbox_rect, bbox_em_fixed), or their segmentation (bbox_seg).

    Args:
        dataset: the images.
        labels: what is known of them.
        weak: bool, one per image.
        method: one of ``TAGS`` or ``BOXES``.
        source: the file of ``labels``, for messages.

    Attributes:
        weak: the same.
        present: bool ``[images, num_classes]``, tags and background.
        background: its class, or None.

    Raises:
        DataError: labels of another data set, boxes in one without a background class, tags that name no class.
    """

    def __init__(
        self, dataset: SegmentationDataset, labels: WeakLabels, weak: np.ndarray, method: str, source: str = "weak labels"
    ):
        super().__init__(dataset.classes, dataset.colors, dataset.split, len(dataset))
        labels.check_fits(dataset, source)
        if method in BOXES and labels.background is None:
            raise DataError(f"{source}: no background class; {method} needs one, as what is outside all boxes")
        self.dataset, self.weak, self.method, self.source = dataset, np.asarray(weak, bool), method, source
        self.background = labels.background
        self._annotations = [labels.images[dataset.name(index)] for index in range(len(dataset))]
        self.present = np.zeros((len(dataset), self.num_classes), bool)
        for row, annotation in zip(self.present, self._annotations, strict=True):
            row[list(annotation.tags)] = True
        if self.background is not None:
            self.present[:, self.background] = True
        empty = np.flatnonzero(self.weak & ~self.present.any(1))
        if empty.size:
            raise DataError(f"{source}: image {self.name(int(empty[0]))!r} has no tags; expected one or more")

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image, and its label map or what stands in for it. Raises DataError as the data set, and for other sizes."""
        if not self.weak[index]:
            return self.dataset[index]
        image, annotation = self.dataset.load_image(index), self._annotations[index]
        if image.shape[:2] != annotation.size:
            raise DataError(
                f"{self.source}: image {self.name(index)!r} is {annotation.size[0]}x{annotation.size[1]} (height x width) there "
                f"and {image.shape[0]}x{image.shape[1]} in {self.dataset!r}; expected equal sizes"
            )
        if self.method in TAGS:
            return image, np.zeros(annotation.size, np.uint8)
        assert self.background is not None
        if self.method == "bbox_seg":
            return image, segments(annotation, self.background, image)
        return image, rectangles(annotation, self.background)

    def __repr__(self) -> str:
        return f"{self.dataset!r} with {int((~self.weak).sum())} strong and {int(self.weak.sum())} weak images ({self.method})"


def draw_strong(length: int, strong: int, seed: int) -> np.ndarray:
    """Which images keep their label maps: bool ``[length]`` with ``strong`` ones; those of a smaller number are among those of a
    larger one. Raises ValueError where there are fewer images."""
    if strong > length:
        raise ValueError(f"weak.strong={strong}: the training split has {length} images; expected at most as many")
    chosen = np.zeros(length, bool)
    chosen[np.random.default_rng([seed, length]).permutation(length)[:strong]] = True
    return chosen
