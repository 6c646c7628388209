"""PASCAL-Person-Part (Chen et al. 2014; the six parts of Chen et al. 2016)."""

from __future__ import annotations

from pathlib import Path

from segmodels.data.dataset import PairedFiles, voc_colormap
from segmodels.data.files import find_root, need_folders, pair_listed, read_list

MASKS = "pascal_person_part_gt"
LISTS = "pascal_person_part_trainval_list"


class PersonPart(PairedFiles):
    """``<root>/JPEGImages/*.jpg`` of VOC 2010 with ``pascal_person_part_gt/*.png`` and
    ``pascal_person_part_trainval_list/<split>.txt``, as the archive of the six parts holds them. 7 classes, 255 is void.

    Args:
        root: the folder that holds these three.
        split: "train" or "val".

    Raises:
        DataError: a folder or list is missing, or an image or a mask.
    """

    TITLE = "PASCAL-Person-Part, 6 parts and background"
    CLASSES = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
    COLORS = voc_colormap(7)
    COUNTS = {"train": 1716, "val": 1817}
    MEMBERS = rf"(?:JPEGImages|{MASKS}|{LISTS})/[^/]+"

    def __init__(self, root: str | Path | None, split: str = "train"):
        folder = find_root(root, "person_part", f"JPEGImages, {MASKS} and {LISTS}")
        need_folders(folder, "person_part", ["JPEGImages", MASKS, LISTS])
        listed = folder / LISTS / f"{split}.txt"
        pairs = pair_listed(listed, read_list(listed), folder / "JPEGImages", [folder / MASKS])
        super().__init__(pairs, self.CLASSES, self.COLORS, split, folder)
