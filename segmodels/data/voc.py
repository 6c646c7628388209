"""PASCAL VOC 2012 segmentation (Everingham et al. 2015) with the labels of SBD (Hariharan et al. 2011), and any data set in
this folder layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segmodels.data.dataset import PairedFiles, voc_colormap
from segmodels.data.files import DataError, find_root, list_by_stem, need_folders, pair_listed, read_list
from segmodels.data.prepare import Progress, convert, label_of, read_mat, write_list

# fmt: off
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


class VOC(PairedFiles):
    """``<root>/JPEGImages/*.jpg``, ``SegmentationClass/*.png``, ``ImageSets/Segmentation/<split>.txt``.

    21 classes, 255 is void. Masks are palette images and are read as indices. Masks of SBD lie in ``SegmentationClassAug``,
    which is looked into where ``SegmentationClass`` has none, so that the finer masks of VOC with their void borders win.

    Args:
        root: the folder that holds ``JPEGImages`` (in the official archive ``VOCdevkit/VOC2012``).
        split: "train", "val", "trainval" and "test" (no labels) are official; "train_aug" is train and all of SBD but val,
            "trainval_aug" has val besides, "sbd_train" is the training list of SBD (FCN), "reduced_val" is val without SBD
            (CRF-RNN), "seg11valid" is FCN's list, to be copied to the others by hand.

    Raises:
        DataError: a folder or the list is missing, the list is empty, or a listed stem lacks its image or mask.
    """

    TITLE = "PASCAL VOC 2012 with SBD"
    CLASSES = CLASSES
    COLORS = voc_colormap(len(CLASSES))
    COUNTS = {
        "train": 1464, "train_aug": 10582, "val": 1449, "trainval": 2913, "trainval_aug": 12031, "test": 1456,
        "sbd_train": 8498, "reduced_val": 346, "seg11valid": 736,
    }  # fmt: skip
    MEMBERS = (
        r"(?:JPEGImages|SegmentationClass|SegmentationObject)/[^/]+|ImageSets/Segmentation/[^/]+"
        r"|dataset/(?:cls/[^/]+|train\.txt|val\.txt)"
    )

    def __init__(self, root: str | Path | None, split: str = "train"):
        folder = find_root(root, "voc", "JPEGImages, SegmentationClass and ImageSets/Segmentation")
        masks = () if split == "test" else ("SegmentationClass",)
        need_folders(folder, "voc", ["JPEGImages", *masks, "ImageSets/Segmentation"])
        lists = folder / "ImageSets" / "Segmentation"
        parts = ("train_aug", "val") if split == "trainval_aug" else (split,)
        stems = [stem for part in parts for stem in read_list(lists / f"{part}.txt")]
        labels = [folder / name for name in masks] + [folder / "SegmentationClassAug"] * bool(masks)
        pairs = pair_listed(lists / f"{split}.txt", stems, folder / "JPEGImages", labels)
        super().__init__(pairs, self.CLASSES, self.COLORS, split, folder)

    @classmethod
    def prepare(cls, root: Path, progress: Progress) -> list[str]:
        """SBD's ``dataset/cls/*.mat`` to ``SegmentationClassAug/*.png``, and the lists that follow from those of VOC and SBD."""
        lists = root / "ImageSets" / "Segmentation"
        need_folders(root, "voc", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "dataset/cls"])
        voc_train, voc_val = read_list(lists / "train.txt"), read_list(lists / "val.txt")
        sbd_train, sbd_val = read_list(root / "dataset" / "train.txt"), read_list(root / "dataset" / "val.txt")
        sbd = sorted({*sbd_train, *sbd_val})
        found = list_by_stem(root / "dataset" / "cls", (".mat",), "label files")
        lost = [stem for stem in sbd if stem not in found]
        if lost:
            raise DataError(
                f"{root / 'dataset' / 'cls' / lost[0]}.mat: missing, {len(lost)} of {len(sbd)} listed files of SBD are"
            )
        jobs = [(found[stem], root / "SegmentationClassAug" / f"{stem}.png") for stem in sbd]
        report = [f"{convert('SBD', jobs, _sbd_label, progress)} of {len(jobs)} label files written to SegmentationClassAug"]
        derived = {
            "train_aug": voc_train + [stem for stem in sbd if stem not in {*voc_train, *voc_val}],
            "sbd_train": sbd_train,
            "reduced_val": [stem for stem in voc_val if stem not in set(sbd)],
        }
        for split, stems in derived.items():
            write_list(lists / f"{split}.txt", stems)
            report.append(f"{lists / split}.txt: {len(stems)} images, published {cls.COUNTS[split]}")
        return report


def _sbd_label(path: Path) -> np.ndarray:
    try:
        values = read_mat(path, "GTcls")["Segmentation"][0, 0]
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"{path}: GTcls has no field Segmentation; expected a file of SBD's folder cls") from error
    return label_of(values, path, 20)
