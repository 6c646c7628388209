"""Weak labels of a data set: which classes an image shows (tags) and where its objects are (boxes), without their outlines.

The file is JSON, one image a line: ``{"format", "dataset", "split", "classes", "background", "images": {name: {"size": [height,
width], "tags": [class, ...], "boxes": [[class, left, top, right, bottom], ...]}}}``. Boxes are in pixels, right and bottom
exclusive. Tags leave the background out; ``background`` is its class, or null where the data set has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segmodels.data import IGNORE_INDEX, DataError, SegmentationDataset, read_mask
from segmodels.engine.checkpoints import atomic_write

FORMAT = 1
Box = tuple[int, int, int, int, int]  # class, left, top, right, bottom


@dataclass(frozen=True)
class Annotation:
    """What is known of one image of ``size`` (height, width)."""

    size: tuple[int, int]
    tags: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class WeakLabels:
    """The annotations of the images of a split, by name."""

    dataset: str
    split: str
    classes: tuple[str, ...]
    background: int | None
    images: Mapping[str, Annotation]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file atomically. Raises OSError."""
        head = {
            "format": FORMAT, "dataset": self.dataset, "split": self.split, "classes": list(self.classes),
            "background": self.background,
        }  # fmt: skip
        lines = [
            f"{json.dumps(name)}: " + json.dumps({"size": found.size, "tags": found.tags, "boxes": found.boxes})
            for name, found in self.images.items()
        ]
        text = json.dumps(head)[:-1] + ', "images": {\n' + ",\n".join(lines) + "\n}}\n"
        atomic_write(path, text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeakLabels:
        """Reads what :meth:`save` wrote. Raises DataError that names the file, the image and what is wrong with it."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); python -m segmodels.weak writes it") from error
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); expected a file of python -m segmodels.weak") from error
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        if found != FORMAT:
            raise DataError(f"{path}: format {found!r}; expected {FORMAT}, a file of python -m segmodels.weak")
        missing = [key for key in ("dataset", "split", "classes", "background", "images") if key not in content]
        if missing:
            raise DataError(f"{path}: no {missing[0]!r} in it; expected a file of python -m segmodels.weak")
        classes, background = tuple(content["classes"]), content["background"]
        if background is not None and not _is_int(background, 0, len(classes) - 1):
            raise DataError(f"{path}: background {background!r}; expected 0 to {len(classes) - 1}, or null")
        images = {
            name: _annotation(f"{path}: image {name!r}", entry, len(classes), background)
            for name, entry in content["images"].items()
        }
        return cls(content["dataset"], content["split"], classes, background, images)

    def check_fits(self, dataset: SegmentationDataset, source: str) -> None:
        """Raises DataError, naming ``source``, where the labels are not those of this data set."""
        if list(self.classes) != dataset.classes:
            raise DataError(f"{source}: classes {list(self.classes)}; expected those of {dataset!r}, {dataset.classes}")
        lost = [name for name in map(dataset.name, range(len(dataset))) if name not in self.images]
        if lost:
            raise DataError(
                f"{source}: nothing on {len(lost)} of the {len(dataset)} images of {dataset!r}, first {lost[0]!r}; it was made "
                f"from the split {self.split!r} of {self.dataset!r}"
            )


def derive(
    dataset: SegmentationDataset,
    name: str,
    *,
    background: int | None = 0,
    instances: Path | None = None,
    min_area: int = 16,
    progress: Callable[[int, int], object] | None = None,
) -> WeakLabels:
    """Reduces the label maps of a data set to tags and boxes.

    Args:
        dataset, name: the split, and what it is called in the file.
        background: the class without tags and boxes, or None.
        instances: folder with a map ``<image name>.png`` per image, whose values tell objects apart; without it every
            connected component (of 8 neighbours) of a class has a box.
        min_area: smaller pieces, in pixels, get no box, except the largest piece of a class.
        progress: called with (done, total) after each image.

    Raises:
        DataError: an instance map is missing, unreadable or of another size, or two images share a name.
    """
    images: dict[str, Annotation] = {}
    for index in range(len(dataset)):
        _, label = dataset[index]
        key = dataset.name(index)
        if key in images:
            raise DataError(f"{dataset!r}: two images are called {key!r}; expected names that tell them apart")
        objects = None if instances is None else read_mask(instances / f"{key}.png")
        if objects is not None and objects.shape != label.shape:
            raise DataError(
                f"{instances}/{key}.png: {objects.shape[1]}x{objects.shape[0]} (width x height); expected "
                f"{label.shape[1]}x{label.shape[0]}, the size of the label map"
            )
        tags = [int(c) for c in np.unique(label) if c not in (IGNORE_INDEX, background)]
        boxes = [(tag, *box) for tag in tags for box in _boxes(label == tag, objects, min_area)]
        images[key] = Annotation((label.shape[0], label.shape[1]), tuple(tags), tuple(boxes))
        if progress is not None:
            progress(index + 1, len(dataset))
    return WeakLabels(name, dataset.split, tuple(dataset.classes), background, images)


def _boxes(mask: np.ndarray, objects: np.ndarray | None, min_area: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the pieces of a mask, the largest piece first."""
    pieces: list[tuple[int, tuple[int, int, int, int]]] = []
    if objects is None:
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        pieces = [(int(a), (int(x), int(y), int(x + w), int(y + h))) for x, y, w, h, a in stats[1:]]
    else:
        for value in np.unique(objects[mask]):
            piece = mask & (objects == value)
            x, y, w, h = cv2.boundingRect(piece.astype(np.uint8))
            pieces.append((int(piece.sum()), (x, y, x + w, y + h)))
    pieces.sort(key=lambda piece: (-piece[0], piece[1]))
    return [box for rank, (area, box) in enumerate(pieces) if rank == 0 or area >= min_area]


def _annotation(where: str, entry: Any, classes: int, background: int | None) -> Annotation:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), list) for key in ("size", "tags", "boxes")):
        raise DataError(f"{where}: {entry!r}; expected the lists size, tags and boxes")
    size, tags, boxes = entry["size"], entry["tags"], entry["boxes"]
    if len(size) != 2 or not all(_is_int(side, 1) for side in size):
        raise DataError(f"{where}: size {size!r}; expected [height, width]")
    for tag in tags:
        if not _is_int(tag, 0, classes - 1) or tag == background:
            raise DataError(f"{where}: tag {tag!r}; expected 0 to {classes - 1}, without the background ({background})")
    for box in boxes:
        fits = isinstance(box, list) and len(box) == 5 and all(_is_int(value, 0) for value in box)
        if not fits or box[0] not in tags or not (box[1] < box[3] <= size[1] and box[2] < box[4] <= size[0]):
            raise DataError(
                f"{where}: box {box!r}; expected [class, left, top, right, bottom] with a class of the tags {tags}, "
                f"left < right <= {size[1]} and top < bottom <= {size[0]}"
            )
    return Annotation((size[0], size[1]), tuple(tags), tuple(tuple(box) for box in boxes))


def _is_int(value: Any, low: int, high: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
