"""Miniature copies of the layouts on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from miniature import random_label, write_image, write_mask, write_palette_mask


@pytest.fixture
def camvid_root(tmp_path: Path) -> Path:
    root = tmp_path / "camvid"
    for split, count in (("train", 3), ("val", 2)):
        for k in range(count):
            write_image(root / split / "images" / f"{split}{k}.jpg", seed=k)
            write_mask(root / split / "labels" / f"{split}{k}.png", random_label(11, 11, seed=k))
    return root


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    lists = {"train": ["2007_000001", "2007_000002"], "val": ["2007_000003"], "trainval": [], "train_aug": ["2008_1"]}
    lists["trainval"] = lists["train"] + lists["val"]
    for k, stem in enumerate(lists["trainval"] + lists["train_aug"]):
        write_image(root / "JPEGImages" / f"{stem}.jpg", seed=k)
        folder = "SegmentationClassAug" if stem in lists["train_aug"] else "SegmentationClass"
        write_palette_mask(root / folder / f"{stem}.png", random_label(21, 255, seed=k))
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, stems in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return root


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    for k, suffix in enumerate((".png", ".jpg", ".JPEG")):
        write_image(root / "images" / f"photo{k}{suffix}", seed=k)
        write_mask(root / "masks" / f"photo{k}.png", random_label(3, 255, seed=k))
    (root / "classes.txt").write_text("ground\nthing\n\nother thing\n")
    (root / "train.txt").write_text("photo2\nphoto0\n")
    return root


@pytest.fixture
def truncate() -> Callable[[Path, float], None]:
    """Cuts a file to a share of its length."""

    def cut(path: Path, share: float) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return cut


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data sets; the test skips where it is not there."""
    shared = Path(os.environ.get("ATROUS_SHARED") or Path(__file__).resolve().parents[2].parent / "shared")
    if not (shared / "data").is_dir():
        pytest.skip(f"no real data: {shared / 'data'} does not exist (set ATROUS_SHARED to the folder that holds data/)")
    return shared / "data"
