"""Data sets: ``create_dataset(name, root, split)``; transforms and loaders in the modules of those names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segmodels.data import camvid, folder, synthetic, voc
from segmodels.data.dataset import IGNORE_INDEX, SegmentationDataset, voc_colormap
from segmodels.data.files import DataError, read_image, read_mask

__all__ = [
    "DATASETS",
    "IGNORE_INDEX",
    "DataError",
    "SegmentationDataset",
    "class_names",
    "create_dataset",
    "read_image",
    "read_mask",
    "voc_colormap",
]

# name -> (class, its splits; None where the user's folder decides)
DATASETS: dict[str, tuple[type[SegmentationDataset], tuple[str, ...] | None]] = {
    "camvid": (camvid.CamVid, camvid.SPLITS),
    "voc": (voc.VOC, voc.SPLITS),
    "folder": (folder.Folder, None),
    "synthetic": (synthetic.Synthetic, synthetic.SPLITS),
}


def class_names(name: str) -> tuple[list[str], np.ndarray]:
    """Names and colours (uint8 ``[C, 3]``) of the classes of "camvid" or "voc", whose files need not be here.

    Raises:
        ValueError: the classes of this data set are known only when it is opened.
    """
    if name == "camvid":
        return list(camvid.COLORS), np.array(list(camvid.COLORS.values()), np.uint8)
    if name == "voc":
        return list(voc.CLASSES), voc_colormap(len(voc.CLASSES))
    raise ValueError(f"data.name={name!r}: expected camvid or voc, whose classes are known without a checkpoint")


def create_dataset(name: str, root: str | Path | None = None, split: str = "train", **options: Any) -> SegmentationDataset:
    """Opens a data set.

    Args:
        name: "camvid", "voc", "folder" or "synthetic".
        root: its folder; "synthetic" needs none.
        split: one of the data set's splits.
        options: what the data set's class takes besides (see its docstring).

    Returns:
        A map-style data set of ``(image uint8 [H, W, 3] RGB, label uint8 [H, W])``.

    Raises:
        ValueError: unknown name or split; the message lists the valid ones.
        TypeError: an option this data set does not have.
        DataError: the folder is not what it should be.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; expected one of {', '.join(sorted(DATASETS))}")
    kind, splits = DATASETS[name]
    if splits is not None and split not in splits:
        raise ValueError(f"unknown split {split!r} of dataset {name!r}; expected one of {', '.join(splits)}")
    if root is not None or name != "synthetic":
        options["root"] = root
    return kind(split=split, **options)
