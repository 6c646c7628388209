"""Data sets: ``create_dataset(name, root, split)``; transforms and loaders in the modules of those names.

``python -m segmodels.data list`` shows them, ``check`` examines one on disk, ``prepare`` converts what its publisher
distributes, ``shard`` packs it into tar files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segmodels.data.ade20k import ADE20K
from segmodels.data.camvid import CamVid
from segmodels.data.cityscapes import Cityscapes
from segmodels.data.coco import COCO
from segmodels.data.dataset import IGNORE_INDEX, SegmentationDataset, voc_colormap
from segmodels.data.files import DataError, read_image, read_mask
from segmodels.data.folder import Folder
from segmodels.data.kitti import KITTI
from segmodels.data.nyudv2 import NYUDv2
from segmodels.data.pascal_context import PascalContext
from segmodels.data.person_part import PersonPart
from segmodels.data.shards import Shards
from segmodels.data.siftflow import SIFTFlow
from segmodels.data.synthetic import Synthetic
from segmodels.data.voc import VOC

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

DATASETS: dict[str, type[SegmentationDataset]] = {
    "ade20k": ADE20K,
    "camvid": CamVid,
    "cityscapes": Cityscapes,
    "coco": COCO,
    "folder": Folder,
    "kitti": KITTI,
    "nyudv2": NYUDv2,
    "pascal_context": PascalContext,
    "person_part": PersonPart,
    "shards": Shards,
    "siftflow": SIFTFlow,
    "synthetic": Synthetic,
    "voc": VOC,
}


def class_names(name: str, options: dict[str, Any] | None = None) -> tuple[list[str], np.ndarray]:
    """Names and colours (uint8 ``[C, 3]``) of the classes of a data set whose files need not be here.

    Args:
        name: of the data set.
        options: as for :func:`create_dataset`; some choose among labellings.

    Raises:
        ValueError: unknown name, or the classes of this data set are known only when it is opened.
    """
    classes, colors = dataset_kind(name).labelling(**(options or {}))
    if not classes:
        known = ", ".join(sorted(key for key, kind in DATASETS.items() if kind.CLASSES))
        raise ValueError(f"data.name={name!r}: expected {known}, whose classes are known without a checkpoint")
    return list(classes), colors


def dataset_kind(name: str) -> type[SegmentationDataset]:
    """The class of a data set. Raises ValueError that lists the names there are."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; expected one of {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def create_dataset(name: str, root: str | Path | None = None, split: str = "train", **options: Any) -> SegmentationDataset:
    """Opens a data set.

    Args:
        name: one of ``DATASETS``.
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
    kind = dataset_kind(name)
    if kind.COUNTS is not None and split not in kind.COUNTS:
        raise ValueError(f"unknown split {split!r} of dataset {name!r}; expected one of {', '.join(kind.COUNTS)}")
    if root is not None or name != "synthetic":
        options["root"] = root
    return kind(split=split, **options)
