"""SIFT Flow (Liu et al. 2011) as distributed by Tighe and Lazebnik (2010): 33 semantic classes and 3 geometric ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segmodels.data.dataset import PairedFiles, voc_colormap
from segmodels.data.files import IMAGE_SUFFIXES, DataError, find_root, list_by_stem, need_folders, pair_listed
from segmodels.data.prepare import Progress, convert, label_of, read_mat

INNER = "spatial_envelope_256x256_static_8outdoorcategories"
TEST_LIST = "TestSet1.txt"
SOURCES = {"semantic": "SemanticLabels", "geometric": "GeoLabels"}

# fmt: off
CLASSES = (
    "awning", "balcony", "bird", "boat", "bridge", "building", "bus", "car", "cow", "crosswalk", "desert", "door", "fence",
    "field", "grass", "moon", "mountain", "person", "plant", "pole", "river", "road", "rock", "sand", "sea", "sidewalk",
    "sign", "sky", "staircase", "streetlight", "sun", "tree", "window",
)
# fmt: on
GEOMETRIC = ("sky", "horizontal", "vertical")


class SIFTFlow(PairedFiles):
    """``<root>/Images/spatial_envelope_256x256_static_8outdoorcategories/*.jpg`` and ``TestSet1.txt`` of the official archive,
    with ``semantic/*.png`` and ``geometric/*.png`` (0 is void), which ``prepare`` makes of its ``SemanticLabels`` and
    ``GeoLabels``.

    Args:
        root: the folder that holds ``Images``.
        split: "test" (what ``TestSet1.txt`` lists) or "train" (the rest).
        labels: "semantic" or "geometric".

    Raises:
        DataError: a folder or the list is missing (not prepared), or an image or a mask.
        ValueError: other labels.
    """

    TITLE = "SIFT Flow, 33 classes; labels=geometric: 3"
    CLASSES = CLASSES
    COLORS = voc_colormap(34)[1:]
    COUNTS = {"train": 2488, "test": 200}
    MEMBERS = rf"(?:Images|SemanticLabels|GeoLabels)/{INNER}/[^/]+|{TEST_LIST}"

    def __init__(self, root: str | Path | None, split: str = "train", labels: str = "semantic"):
        if labels not in SOURCES:
            raise ValueError(f"labels {labels!r} of dataset 'siftflow'; expected one of {', '.join(SOURCES)}")
        folder = find_root(root, "siftflow", f"Images/{INNER}, {labels} and {TEST_LIST}")
        need_folders(folder, "siftflow", [f"Images/{INNER}", labels])
        images = folder / "Images" / INNER
        test = test_stems(folder / TEST_LIST)
        stems = test if split == "test" else [s for s in list_by_stem(images, IMAGE_SUFFIXES, "images") if s not in set(test)]
        pairs = pair_listed(folder / TEST_LIST, stems, images, [folder / labels])
        classes, colors = self.labelling(labels=labels)
        ids = {value + 1: value for value in range(len(classes))}
        super().__init__(pairs, classes, colors, split, folder, (0,), ids)

    @classmethod
    def labelling(cls, **options: Any) -> tuple[Sequence[str], np.ndarray]:
        if options.get("labels") == "geometric":
            return GEOMETRIC, voc_colormap(4)[1:]
        return cls.CLASSES, cls.COLORS

    @classmethod
    def prepare(cls, root: Path, progress: Progress) -> list[str]:
        """``SemanticLabels`` and ``GeoLabels`` (variable S; -1 and 0 are void) to PNG files."""
        report = []
        for name, source in SOURCES.items():
            need_folders(root, "siftflow", [f"{source}/{INNER}"])
            found = list_by_stem(root / source / INNER, (".mat",), "label files")
            highest = len(cls.labelling(labels=name)[0])

            def read(path: Path, highest: int = highest) -> np.ndarray:
                return label_of(np.maximum(read_mat(path, "S").astype(int), 0), path, highest)

            jobs = [(path, root / name / f"{stem}.png") for stem, path in found.items()]
            report.append(f"{name}: {convert(name, jobs, read, progress)} of {len(jobs)} label files written")
        return report


def test_stems(path: Path) -> list[str]:
    """The stems of the test list, whose lines are paths with backslashes."""
    if not path.is_file():
        raise DataError(f"{path}: missing, the list of test images of the official archive")
    return [Path(line.strip().replace("\\", "/")).stem for line in path.read_text().splitlines() if line.strip()]
