"""CamVid road scenes (Brostow et al. 2009), the 11-class task of SegNet (Badrinarayanan et al. 2017)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segmodels.data.dataset import PairedFiles
from segmodels.data.files import IMAGE_SUFFIXES, find_root, first_layout, list_by_stem, match_masks

VOID_ID = 11

# Colours of the CamVid label palette; where SegNet merges several of its 32 classes, the colour of the largest one.
_PALETTE: dict[str, tuple[int, int, int]] = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign_symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


class CamVid(PairedFiles):
    """CamVid in the layout ``<root>/<split>/images + labels``, or as the SegNet tutorial ships it
    (``<root>/<split> + <split>annot``). Masks hold 0..10; 11 is void and becomes 255.

    Args:
        root: the folder that holds the splits.
        split: "train", "val" or "test".

    Raises:
        DataError: the layout is not there, or an image has no mask.
    """

    TITLE = "CamVid, the 11 classes and the frames of SegNet"
    CLASSES = tuple(_PALETTE)
    COLORS = np.array(list(_PALETTE.values()), np.uint8)
    COUNTS = {"train": 367, "val": 101, "test": 233}
    MEMBERS = r"(?:train|val|test)(?:annot|/images|/labels)?/[^/]+\.(?:png|jpg)"

    def __init__(self, root: str | Path | None, split: str = "train"):
        folder = find_root(root, "camvid", f"{split}/images and {split}/labels")
        images, masks = first_layout(folder, "camvid", [(f"{split}/images", f"{split}/labels"), (split, f"{split}annot")])
        pairs = match_masks(list_by_stem(images, IMAGE_SUFFIXES, "images"), masks)
        super().__init__(pairs, self.CLASSES, self.COLORS, split, folder, void_ids=(VOID_ID,))
