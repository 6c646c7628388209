"""Miniature copies of the published data sets as their publishers distribute them: one function each, ``(root) -> None``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from miniature import SIZE, random_label, write_image, write_mask, write_palette_mask

from segmodels.data.kitti import KITTI
from segmodels.data.pascal_context import CLASSES as CONTEXT
from segmodels.data.siftflow import INNER


def lists(folder: Path, **splits: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, stems in splits.items():
        (folder / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def mat(path: Path, **content: object) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content, do_compression=True)


def camvid(root: Path) -> None:
    for split in ("train", "val", "test"):
        write_image(root / split / f"{split}0.png")
        write_mask(root / f"{split}annot" / f"{split}0.png", random_label(11, 11, seed=0))


def ade20k(root: Path) -> None:
    for k, part in enumerate(("training", "validation")):
        write_image(root / "images" / part / f"ADE_{k}.jpg", seed=k)
        write_mask(root / "annotations" / part / f"ADE_{k}.png", random_label(151, 0, seed=k))
    write_image(root / "release_test" / "testing" / "ADE_test.jpg")


def cityscapes(root: Path) -> None:
    for part in ("train", "val", "test", "train_extra"):
        write_image(root / "leftImg8bit" / part / "ulm" / "ulm_0_1_leftImg8bit.png")
        for kind in ("gtFine", "gtCoarse"):
            write_mask(root / kind / part / "ulm" / f"ulm_0_1_{kind}_labelIds.png", random_label(34, 255, seed=0))
            write_mask(root / kind / part / "ulm" / f"ulm_0_1_{kind}_instanceIds.png", random_label(34, 255, seed=0))


def voc(root: Path) -> None:
    """VOC: train a, b and val c, d. SBD: train b, e and val c, f."""
    for k, stem in enumerate("abcdef"):
        write_image(root / "JPEGImages" / f"{stem}.jpg", seed=k)
    for k, stem in enumerate("abcd"):
        write_palette_mask(root / "SegmentationClass" / f"{stem}.png", random_label(21, 255, seed=k))
    write_image(root / "JPEGImages" / "t.jpg")
    lists(root / "ImageSets" / "Segmentation", train=["a", "b"], val=["c", "d"], trainval=list("abcd"), test=["t"])
    for k, stem in enumerate("bcef"):
        content = {"Boundaries": np.zeros((20, 1)), "Segmentation": random_label(21, 0, seed=10 + k)}
        mat(root / "dataset" / "cls" / f"{stem}.mat", GTcls=content)
    lists(root / "dataset", train=["b", "e"], val=["c", "f"])


def coco(root: Path) -> None:
    """A large person with a hole that a cat fills, an object of another class, a crowd; and a picture with nothing of VOC."""
    square = [10.0, 10.0, 60.0, 10.0, 60.0, 60.0, 10.0, 60.0]
    hole = [20.0, 20.0, 30.0, 20.0, 30.0, 30.0, 20.0, 30.0]
    crowd = {"size": [80, 100], "counts": [80 * 90 + 5, 20, 60, 20, 695]}
    things = [(1, square), (17, hole), (77, square), (2, crowd)]
    annotations = [
        {"id": k, "image_id": 7, "category_id": category, "segmentation": shape if isinstance(shape, dict) else [shape]}
        for k, (category, shape) in enumerate(things)
    ]
    for part in ("train2017", "val2017"):
        images = [{"id": k, "file_name": f"{k:012d}.jpg", "height": 80, "width": 100} for k in (7, 8)]
        for image in images:
            write_image(root / part / image["file_name"], (80, 100))
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def pascal_context(root: Path) -> None:
    names = ["accordion", *sorted(CONTEXT)]
    (root / "JPEGImages").mkdir(parents=True)
    (root / "labels.txt").write_text("".join(f"{k + 1}: {name}\n" for k, name in enumerate(names)))
    for k, stem in enumerate(("2008_1", "2008_2")):
        write_image(root / "JPEGImages" / f"{stem}.jpg", seed=k)
        mat(root / "trainval" / f"{stem}.mat", LabelMap=random_label(60, 60, seed=k).astype(np.uint16))
    lists(root / "ImageSets" / "Main", train=["2008_1"], val=["2008_2"])


def person_part(root: Path) -> None:
    for k, stem in enumerate(("2008_1", "2008_2")):
        write_image(root / "JPEGImages" / f"{stem}.jpg", seed=k)
        write_palette_mask(root / "pascal_person_part_gt" / f"{stem}.png", random_label(7, 255, seed=k))
    lists(root / "pascal_person_part_trainval_list", train=["2008_1"], val=["2008_2"])


def nyudv2(root: Path) -> None:
    import h5py

    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = rng.integers(0, 256, (3, 3, SIZE[1], SIZE[0]), dtype=np.uint8)
        file["depths"] = rng.uniform(0.5, 10, (3, SIZE[1], SIZE[0])).astype(np.float32)
        file["labels"] = rng.integers(0, 895, (3, SIZE[1], SIZE[0]), dtype=np.uint16)
    mat(root / "classMapping40.mat", mapClass=(np.arange(894) % 40 + 1).astype(np.uint8)[None])
    mat(root / "splits.mat", trainNdxs=np.array([[1], [3]], np.uint16), testNdxs=np.array([[2]], np.uint16))


def siftflow(root: Path) -> None:
    for k, stem in enumerate(("coast_1", "street_2")):
        write_image(root / "Images" / INNER / f"{stem}.jpg", seed=k)
        mat(root / "SemanticLabels" / INNER / f"{stem}.mat", S=random_label(34, 33, seed=k))
        mat(root / "GeoLabels" / INNER / f"{stem}.mat", S=random_label(5, 4, seed=k).astype(np.int16) % 5 - 1)
    (root / "TestSet1.txt").write_text(f"{INNER}\\street_2.jpg\r\n")


def kitti(root: Path) -> None:
    colors = np.concatenate([KITTI.COLORS, [[0, 0, 0]]]).astype(np.uint8)
    for k, part in enumerate(("Training_00", "Validation_07")):
        write_image(root / part / "RGB" / f"{k:06d}.png", seed=k)
        (root / part / "GT").mkdir(parents=True)
        picture = colors[random_label(11, 11, seed=k)]
        cv2.imwrite(str(root / part / "GT" / f"{k:06d}.png"), picture[..., ::-1])


# name -> writer, images per split after prepare
MINIATURES: dict[str, tuple[Callable[[Path], None], dict[str, int]]] = {
    "ade20k": (ade20k, {"train": 1, "val": 1, "test": 1}),
    "camvid": (camvid, {"train": 1, "val": 1, "test": 1}),
    "cityscapes": (cityscapes, {"train": 1, "val": 1, "trainval": 2, "test": 1, "train_extra": 1, "train_coarse": 1}),
    "coco": (coco, {"train2017": 1, "val2017": 1, "train2017_all": 2, "val2017_all": 2}),
    "kitti": (kitti, {"train": 1, "test": 1}),
    "nyudv2": (nyudv2, {"train": 2, "test": 1}),
    "pascal_context": (pascal_context, {"train": 1, "val": 1}),
    "person_part": (person_part, {"train": 1, "val": 1}),
    "siftflow": (siftflow, {"train": 1, "test": 1}),
    "voc": (
        voc,
        {"train": 2, "train_aug": 4, "val": 2, "trainval": 4, "trainval_aug": 6, "test": 1, "sbd_train": 2, "reduced_val": 1},
    ),
}
MATLAB = {"voc", "pascal_context", "nyudv2", "siftflow"}
