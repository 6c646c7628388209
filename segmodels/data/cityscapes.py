"""Cityscapes (Cordts et al. 2016): 19 classes of 34 label ids, fine and coarse annotations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segmodels.data.dataset import PairedFiles
from segmodels.data.files import DataError, find_root, missing_mask, need_folders

# class -> (label id in the files and on the server, colour); the other ids of 0..33 are void, as is 255 (licence plate, -1)
_CLASSES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
LABEL_IDS = tuple(label for label, _ in _CLASSES.values())

# split -> (folders of images, kind of annotation)
_SPLITS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "train": (("train",), "gtFine"),
    "val": (("val",), "gtFine"),
    "trainval": (("train", "val"), "gtFine"),
    "test": (("test",), None),
    "train_extra": (("train_extra",), "gtCoarse"),
    "train_coarse": (("train",), "gtCoarse"),
}


class Cityscapes(PairedFiles):
    """``<root>/leftImg8bit/<split>/<city>/*_leftImg8bit.png`` with ``gtFine/<split>/<city>/*_gtFine_labelIds.png``, and
    ``gtCoarse/.../*_gtCoarse_labelIds.png``, as in the official archives; label ids become the 19 train ids when read.

    Args:
        root: the folder that holds ``leftImg8bit``.
        split: "train", "val", "trainval" with fine labels, "test" (no labels), "train_extra" and "train_coarse" (the images
            of train) with coarse ones.

    Raises:
        DataError: a folder is missing or holds no images, or an image has no label file.
    """

    TITLE = "Cityscapes, 19 classes, fine and coarse"
    CLASSES = tuple(_CLASSES)
    COLORS = np.array([color for _, color in _CLASSES.values()], np.uint8)
    COUNTS = {"train": 2975, "val": 500, "trainval": 3475, "test": 1525, "train_extra": 19998, "train_coarse": 2975}
    MEMBERS = r"leftImg8bit/\w+/\w+/[^/]+\.png|gt(?:Fine|Coarse)/\w+/\w+/[^/]+_labelIds\.png"
    SUBMISSION_IDS = np.array(LABEL_IDS, np.uint8)

    def __init__(self, root: str | Path | None, split: str = "train"):
        folder = find_root(root, "cityscapes", "leftImg8bit and gtFine")
        parts, kind = _SPLITS[split]
        needed = [f"leftImg8bit/{part}" for part in parts] + [f"{kind}/{part}" for part in parts if kind]
        need_folders(folder, "cityscapes", needed)
        images = [image for part in parts for image in sorted((folder / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))]
        if not images:
            raise DataError(f"{folder / needed[0]}: no images here; expected CITY/*_leftImg8bit.png")
        pairs: list[tuple[Path, Path | None]] = [(image, None) for image in images]
        if kind:
            masks = [_mask(folder, image, kind) for image in images]
            lost = [pair for pair in zip(images, masks, strict=True) if not pair[1].is_file()]
            if lost:
                raise missing_mask(*lost[0], len(lost), len(images))
            pairs = list(zip(images, masks, strict=True))
        ids = {label: index for index, label in enumerate(LABEL_IDS)}
        void = [label for label in range(34) if label not in ids]
        super().__init__(pairs, self.CLASSES, self.COLORS, split, folder, void, ids)


def _mask(root: Path, image: Path, kind: str) -> Path:
    part, city = image.parts[-3:-1]
    return root / kind / part / city / image.name.replace("_leftImg8bit", f"_{kind}_labelIds")
