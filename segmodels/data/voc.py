"""PASCAL VOC 2012 segmentation (Everingham et al. 2015) and any data set in its folder layout."""

from __future__ import annotations

from pathlib import Path

from segmodels.data.dataset import PairedFiles, voc_colormap
from segmodels.data.files import DataError, find_root, missing_mask

SPLITS = ("train", "train_aug", "val", "trainval")

# fmt: off
CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on


class VOC(PairedFiles):
    """``<root>/JPEGImages/*.jpg``, ``SegmentationClass/*.png``, ``ImageSets/Segmentation/<split>.txt``.

    21 classes, 255 is void. Masks are palette images and are read as indices. Images of the augmented set (Hariharan et
    al. 2011) may have their masks in ``SegmentationClassAug``; it is looked into where ``SegmentationClass`` has none.

    Args:
        root: the folder that holds ``JPEGImages`` (in the official archive ``VOCdevkit/VOC2012``).
        split: "train", "train_aug", "val" or "trainval".

    Raises:
        DataError: a folder or the list is missing, the list is empty, or a listed stem lacks its image or mask.
    """

    def __init__(self, root: str | Path | None, split: str = "train"):
        folder = find_root(root, "voc", "JPEGImages, SegmentationClass and ImageSets/Segmentation")
        images, masks = folder / "JPEGImages", folder / "SegmentationClass"
        lists = folder / "ImageSets" / "Segmentation"
        absent = [str(path.relative_to(folder)) for path in (images, masks, lists) if not path.is_dir()]
        if absent:
            present = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
            raise DataError(f"{folder}: not a VOC folder, {' and '.join(absent)} not found in it; found {present}")
        stems = _read_list(lists / f"{split}.txt")
        pairs = [(images / f"{stem}.jpg", masks / f"{stem}.png") for stem in stems]

        lost = [image for image, _ in pairs if not image.is_file()]
        if lost:
            listed = lists / f"{split}.txt"
            raise DataError(f"{lost[0]}: missing, but listed in {listed}; {len(lost)} of {len(pairs)} images are missing")
        augmented = folder / "SegmentationClassAug"
        pairs = [(i, m if m.is_file() else augmented / m.name) for i, m in pairs]
        without = [pair for pair in pairs if not pair[1].is_file()]
        if without:
            image, mask = without[0]
            raise missing_mask(image, masks / mask.name, len(without), len(pairs))
        super().__init__(pairs, CLASSES, voc_colormap(len(CLASSES)), split, folder)


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        present = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise DataError(f"{path}: missing, the list of the split {path.stem!r}; lists found here: {present}")
    stems = path.read_text().split()
    if not stems:
        raise DataError(f"{path}: the list is empty; expected one image stem per line")
    return stems
