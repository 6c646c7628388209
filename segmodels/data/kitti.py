"""KITTI road scenes with the 11 classes of Ros et al. (2015), as in Yu and Koltun (2016)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segmodels.data.dataset import PairedFiles
from segmodels.data.files import IMAGE_SUFFIXES, DataError, find_root, list_by_stem, match_masks, need_folders, read_image
from segmodels.data.prepare import Progress, convert

FOLDERS = {"train": "Training_00", "test": "Validation_07"}

_PALETTE: dict[str, tuple[int, int, int]] = {
    "building": (128, 0, 0),
    "tree": (128, 128, 0),
    "sky": (128, 128, 128),
    "car": (64, 0, 128),
    "sign": (192, 128, 128),
    "road": (128, 64, 128),
    "pedestrian": (64, 64, 0),
    "fence": (64, 64, 128),
    "pole": (192, 192, 128),
    "sidewalk": (0, 0, 192),
    "bicyclist": (0, 128, 192),
}


class KITTI(PairedFiles):
    """``<root>/Training_00`` and ``Validation_07``, each with ``RGB/*.png`` and ``labels/*.png`` (class ids, 255 is void), which
    ``prepare`` makes of the colours in ``GT/*.png``.

    Args:
        root: the folder that holds these two.
        split: "train" or "test".

    Raises:
        DataError: a folder is missing (not prepared), or an image has no mask.
    """

    TITLE = "KITTI, 11 classes"
    CLASSES = tuple(_PALETTE)
    COLORS = np.array(list(_PALETTE.values()), np.uint8)
    COUNTS = {"train": 100, "test": 46}
    MEMBERS = r"(?:Training_00|Validation_07)/(?:RGB|GT)/[^/]+"

    def __init__(self, root: str | Path | None, split: str = "train"):
        folder = find_root(root, "kitti", f"{FOLDERS['train']} and {FOLDERS['test']}")
        part = FOLDERS[split]
        need_folders(folder, "kitti", [f"{part}/RGB", f"{part}/labels"])
        pairs = match_masks(list_by_stem(folder / part / "RGB", IMAGE_SUFFIXES, "images"), folder / part / "labels")
        super().__init__(pairs, self.CLASSES, self.COLORS, split, folder)

    @classmethod
    def prepare(cls, root: Path, progress: Progress) -> list[str]:
        """``GT`` to ``labels``: the colours of the classes to their ids, other colours to 255."""
        report = []
        for part in FOLDERS.values():
            need_folders(root, "kitti", [f"{part}/GT"])
            found = list_by_stem(root / part / "GT", IMAGE_SUFFIXES, "label pictures")
            jobs = [(path, root / part / "labels" / f"{stem}.png") for stem, path in found.items()]
            report.append(f"{part}: {convert(part, jobs, _ids_of_colors, progress)} of {len(jobs)} label files written")
        return report


def _ids_of_colors(path: Path) -> np.ndarray:
    packed = read_image(path).astype(np.int32) @ (1 << 16, 1 << 8, 1)
    label = np.full(packed.shape, 255, np.uint8)
    for index, (red, green, blue) in enumerate(_PALETTE.values()):
        label[packed == (red << 16 | green << 8 | blue)] = index
    if (label == 255).all():
        raise DataError(f"{path}: no pixel has the colour of a class; expected a label picture such as (128, 64, 128) for road")
    return label
