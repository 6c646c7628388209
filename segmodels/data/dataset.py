"""What all data sets share: an item is an RGB image and its map of class ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from segmodels.data.files import DataError, read_image, read_mask

IGNORE_INDEX = 255


def voc_colormap(count: int) -> np.ndarray:
    """The PASCAL VOC colour map, uint8 ``[count, 3]``: the bits of the class id, dealt in threes to R, G, B, high bits
    first (VOC development kit, ``VOClabelcolormap.m``)."""
    ids = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            bit = (ids >> (3 * level + channel)) & 1
            colors[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return colors


class SegmentationDataset:
    """Map-style base class. Subclasses give ``load(i)`` and ``name(i)`` and set the length.

    Attributes:
        classes: class names, in the order of their ids.
        colors: uint8 ``[num_classes, 3]``, RGB, for pictures of predictions.
        num_classes: number of classes, without void.
        ignore_index: 255, the label of pixels that count neither in the loss nor in the score.
        split: the split this is.
        TITLE: of the kind of data set, for lists.
        CLASSES, COLORS: of the kind, where they are known before it is opened.
        COUNTS: its splits with the number of images as published, None where no number was; None as a whole where the
            user's folder decides about splits.
        MEMBERS: a regular expression of the files that ``prepare`` takes from the official archives; "" where there are none.
        SUBMISSION_IDS: uint8, the ids that the benchmark's server expects in place of the class ids; None for the same.
        CACHEABLE: decoded images may be kept in memory.
    """

    TITLE: ClassVar[str] = ""
    CLASSES: ClassVar[Sequence[str]] = ()
    COLORS: ClassVar[np.ndarray] = np.zeros((0, 3), np.uint8)
    COUNTS: ClassVar[Mapping[str, int | None] | None] = None
    MEMBERS: ClassVar[str] = ""
    SUBMISSION_IDS: ClassVar[np.ndarray | None] = None
    CACHEABLE: ClassVar[bool] = True

    ignore_index = IGNORE_INDEX

    def __init__(self, classes: Sequence[str], colors: np.ndarray, split: str, length: int):
        self.classes = list(classes)
        self.colors = np.asarray(colors, np.uint8)
        self.num_classes = len(self.classes)
        self.split = split
        self._length = length

    @classmethod
    def labelling(cls, **options: Any) -> tuple[Sequence[str], np.ndarray]:
        """Names and colours of the classes under the options that choose among labellings; the others are ignored."""
        return cls.CLASSES, cls.COLORS

    @classmethod
    def prepare(cls, root: Path, progress: Callable[[str, int, int | None], None]) -> list[str]:
        """Converts what the publisher distributes, below ``root``, to what this class reads; what is there already is left alone.

        Returns:
            Lines that say what was done.

        Raises:
            DataError: a file is missing, damaged or of something else.
        """
        return []

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 ``[H, W, 3]`` RGB and label uint8 ``[H, W]`` with values ``0 .. num_classes-1`` and 255."""
        raise NotImplementedError

    def load_image(self, index: int) -> np.ndarray:
        """The image alone; nothing of the label is read where the two are separate files."""
        return self.load(self._check(index))[0]

    def name(self, index: int) -> str:
        """The stem of item ``index``: what a file that shows it should be called."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.load(self._check(index))

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"{type(self).__name__}(split={self.split!r}, items={len(self)}, classes={self.num_classes})"

    def _check(self, index: int) -> int:
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} out of range for {self!r}")
        return int(index) % self._length


class PairedFiles(SegmentationDataset):
    """Image files with mask files. Existence is checked by whoever builds the pairs; contents are checked at each load.

    Args:
        pairs: (image, mask) paths; a mask of None is all 255 (images whose labels are not published).
        classes, colors, split: see :class:`SegmentationDataset`.
        root: for ``repr``.
        void_ids: ids in the masks that become 255 (255 itself always does).
        ids: for each id in the masks the class; without it they are the classes.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path | None]],
        classes: Sequence[str],
        colors: np.ndarray,
        split: str,
        root: Path,
        void_ids: Sequence[int] = (),
        ids: Mapping[int, int] | None = None,
    ):
        super().__init__(classes, colors, split, len(pairs))
        self.pairs = list(pairs)
        self.root = root
        self._ids = ids or {value: value for value in range(self.num_classes)}
        self._void_ids = tuple(void_ids)
        self._remap = np.full(256, IGNORE_INDEX, np.uint8)
        self._valid = np.zeros(256, bool)
        self._remap[list(self._ids)] = list(self._ids.values())
        self._valid[[*self._ids, *self._void_ids, IGNORE_INDEX]] = True
        self._remap[list(self._void_ids)] = IGNORE_INDEX

    def name(self, index: int) -> str:
        return self.pairs[self._check(index)][0].stem

    def load_image(self, index: int) -> np.ndarray:
        return read_image(self.pairs[self._check(index)][0])

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As the base class. Raises DataError for files that are unreadable, truncated, of different sizes, or hold a
        label outside the classes (with its value and position)."""
        image_path, mask_path = self.pairs[self._check(index)]
        image = self.load_image(index)
        if mask_path is None:
            return image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8)
        label = read_mask(mask_path)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{mask_path}: the mask is {label.shape[1]}x{label.shape[0]} (width x height) but its image "
                f"{image_path} is {image.shape[1]}x{image.shape[0]}; expected equal sizes"
            )
        outside = ~self._valid[label]
        if outside.any():
            rows, columns = np.nonzero(outside)
            void = ", ".join(str(value) for value in sorted({*self._void_ids, IGNORE_INDEX}))
            raise DataError(
                f"{mask_path}: label {label[rows[0], columns[0]]} at row {rows[0]}, column {columns[0]} "
                f"({rows.size} such pixels); expected {min(self._ids)}..{max(self._ids)} "
                f"({self.classes[0]} .. {self.classes[-1]}) or void ({void})"
            )
        return image, self._remap[label]

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, root={str(self.root)!r})"
