"""MS-COCO (Lin et al. 2014) with the classes of PASCAL VOC, as networks are pre-trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from segmodels.data import voc
from segmodels.data.dataset import PairedFiles, voc_colormap
from segmodels.data.files import DataError, find_root, need_folders, pair_listed, read_list, read_mask
from segmodels.data.polygons import region
from segmodels.data.prepare import Progress, write_label, write_list

MASKS = "voc_masks"
PARTS = ("train2017", "val2017", "train2014", "val2014")
MINIMUM_PIXELS = 1000

# COCO's category of each class of VOC but background, in VOC's order
CATEGORIES = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)


class COCO(PairedFiles):
    """``<root>/train2017/*.jpg`` (or ``val2017``, ``train2014``, ``val2014``) with ``voc_masks/train2017/*.png`` and the list
    ``voc_masks/train2017.txt``, which ``prepare`` makes of ``annotations/instances_train2017.json``.

    21 classes as in VOC. Pixels on which objects of different classes overlap are 255.

    Args:
        root: the folder that holds the folders of images and ``annotations``.
        split: "train2017", "val2017", "train2014", "val2014" or "trainval2014": the images with more than 1000 pixels of VOC's
            classes (Chen et al. 2017, arXiv:1706.05587, section 4.1); with "_all" behind: all images.

    Raises:
        DataError: a folder or list is missing (not prepared), or an image or a mask.
    """

    TITLE = "MS-COCO with the classes of VOC"
    CLASSES = voc.CLASSES
    COLORS = voc_colormap(len(voc.CLASSES))
    COUNTS = {
        "train2017": None, "val2017": None, "train2014": None, "val2014": None, "trainval2014": None,
        "train2017_all": 118287, "val2017_all": 5000, "train2014_all": 82783, "val2014_all": 40504,
    }  # fmt: skip
    MEMBERS = r"(?:train|val)20(?:14|17)/[^/]+|annotations/instances_\w+\.json"

    def __init__(self, root: str | Path | None, split: str = "train2017"):
        folder = find_root(root, "coco", f"train2017, annotations and {MASKS}")
        pairs = []
        for part in ("train2014", "val2014") if split == "trainval2014" else (split.removesuffix("_all"),):
            need_folders(folder, "coco", [part, f"{MASKS}/{part}"])
            listed = folder / MASKS / f"{split if split.endswith('_all') else part}.txt"
            pairs += pair_listed(listed, read_list(listed), folder / part, [folder / MASKS / part])
        super().__init__(pairs, self.CLASSES, self.COLORS, split, folder)

    @classmethod
    def prepare(cls, root: Path, progress: Progress) -> list[str]:
        """Draws the masks of every ``annotations/instances_*.json`` there is and lists the images of more than 1000 pixels."""
        present = [part for part in PARTS if (root / "annotations" / f"instances_{part}.json").is_file()]
        if not present:
            raise DataError(f"{root / 'annotations'}: no instances_{PARTS[0]}.json or the like; expected COCO's annotations here")
        report = []
        for part in present:
            images, annotations = _read(root / "annotations" / f"instances_{part}.json")
            stems, enough = [], []
            for done, image in enumerate(images):
                progress(part, done, len(images))
                stem = Path(image["file_name"]).stem
                target = root / MASKS / part / f"{stem}.png"
                if target.is_file():
                    label = read_mask(target)
                else:
                    label = draw(annotations.get(image["id"], []), image["height"], image["width"])
                    write_label(target, label)
                stems.append(stem)
                if ((label > 0) & (label < 255)).sum() > MINIMUM_PIXELS:
                    enough.append(stem)
            write_list(root / MASKS / f"{part}_all.txt", stems)
            write_list(root / MASKS / f"{part}.txt", enough)
            report.append(
                f"{part}: {len(stems)} masks, {len(enough)} images with more than {MINIMUM_PIXELS} pixels of VOC's classes"
            )
        return report


def draw(annotations: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """The objects of one image as a label map uint8 ``[height, width]``."""
    label = np.zeros((height, width), np.uint8)
    for annotation in annotations:
        try:
            inside = region(annotation["segmentation"], height, width)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"annotation {annotation.get('id')} of image {annotation['image_id']}: {error}") from error
        mine = CATEGORIES.index(annotation["category_id"]) + 1
        label[inside] = np.where((label[inside] == 0) | (label[inside] == mine), mine, 255)
    return label


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]]]:
    """The images, and by image the annotations of VOC's classes."""
    try:
        content = json.loads(path.read_bytes())
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            if annotation["category_id"] in CATEGORIES:
                by_image.setdefault(annotation["image_id"], []).append(annotation)
        return content["images"], by_image
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); an interrupted download?") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: no images and annotations with categories in it; expected COCO's instances") from error
