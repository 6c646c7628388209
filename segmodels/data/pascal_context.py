"""PASCAL-Context (Mottaghi et al. 2014): the images of VOC 2010, every pixel labelled, the 59 most frequent classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segmodels.data.dataset import PairedFiles, voc_colormap
from segmodels.data.files import DataError, find_root, list_by_stem, need_folders, pair_listed, read_list
from segmodels.data.prepare import Progress, convert, label_of, read_mat

MASKS = "SegmentationClassContext"

# Three names are those of the publisher's list of all classes, in place of its list of 59: table (diningtable), cloth
# (clothes) and bedclothes (bedcloth).
# fmt: off
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor", "bag", "bed", "bench", "book", "building",
    "cabinet", "ceiling", "cloth", "computer", "cup", "door", "fence", "floor", "flower", "food", "grass", "ground",
    "keyboard", "light", "mountain", "mouse", "curtain", "platform", "sign", "plate", "road", "rock", "shelves", "sidewalk",
    "sky", "snow", "bedclothes", "track", "tree", "truck", "wall", "water", "window", "wood",
)
# fmt: on


class PascalContext(PairedFiles):
    """``<root>/JPEGImages/*.jpg`` and ``ImageSets/Main/<split>.txt`` of VOC 2010, with ``SegmentationClassContext/*.png`` (0 for
    every other class, 1 to 59), which ``prepare`` makes of the publisher's ``trainval/*.mat`` and ``labels.txt``.

    Args:
        root: the folder that holds ``JPEGImages`` (in the official archive ``VOCdevkit/VOC2010``).
        split: "train" or "val".
        background: make class 0 of what is in none of the 59 classes (60 classes); by default it is void.

    Raises:
        DataError: a folder or list is missing (not prepared), or an image or a mask.
    """

    TITLE = "PASCAL-Context, 59 classes, or 60 with background=true"
    CLASSES = CLASSES
    COLORS = voc_colormap(60)[1:]
    COUNTS = {"train": 4998, "val": 5105}
    MEMBERS = rf"(?:JPEGImages|{MASKS})/[^/]+|ImageSets/Main/(?:train|val)\.txt|trainval/[^/]+\.mat|labels\.txt"

    def __init__(self, root: str | Path | None, split: str = "train", background: bool = False):
        folder = find_root(root, "pascal_context", f"JPEGImages, ImageSets/Main and {MASKS}")
        need_folders(folder, "pascal_context", ["JPEGImages", "ImageSets/Main", MASKS])
        listed = folder / "ImageSets" / "Main" / f"{split}.txt"
        pairs = pair_listed(listed, read_list(listed), folder / "JPEGImages", [folder / MASKS])
        classes, colors = self.labelling(background=background)
        ids = {value + 1: value for value in range(59)}
        if background:
            super().__init__(pairs, classes, colors, split, folder)
        else:
            super().__init__(pairs, classes, colors, split, folder, (0,), ids)

    @classmethod
    def labelling(cls, **options: Any) -> tuple[Sequence[str], np.ndarray]:
        if options.get("background"):
            return ("background", *CLASSES), voc_colormap(60)
        return cls.CLASSES, cls.COLORS

    @classmethod
    def prepare(cls, root: Path, progress: Progress) -> list[str]:
        """``trainval/*.mat`` (variable LabelMap, the publisher's ids of all classes) to ids of the 59."""
        need_folders(root, "pascal_context", ["trainval"])
        table = _table(root / "labels.txt")

        def read(path: Path) -> np.ndarray:
            values = read_mat(path, "LabelMap")
            if values.size and values.max() >= len(table):
                raise DataError(f"{path}: label {values.max()}; expected at most {len(table) - 1}, the last of labels.txt")
            return label_of(table[values], path, 59)

        found = list_by_stem(root / "trainval", (".mat",), "label files")
        jobs = [(path, root / MASKS / f"{stem}.png") for stem, path in found.items()]
        return [f"{convert('labels', jobs, read, progress)} of {len(jobs)} label files written to {MASKS}"]


def _table(path: Path) -> np.ndarray:
    """For each id of the publisher's list, whose lines are ``12: name``, the id of the 59 or 0."""
    if not path.is_file():
        raise DataError(f"{path}: missing, the publisher's list of all classes")
    names = {}
    for line in path.read_text().splitlines():
        number, colon, name = line.partition(":")
        if colon and number.strip().isdigit():
            names[name.replace(" ", "")] = int(number)
    lost = [name for name in CLASSES if name not in names]
    if lost:
        raise DataError(f"{path}: no class {lost[0]!r} ({len(lost)} of 59 missing); expected lines such as '2: aeroplane'")
    table = np.zeros(max(names.values()) + 1, np.uint8)
    for index, name in enumerate(CLASSES):
        table[names[name]] = index + 1
    return table
