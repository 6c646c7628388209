"""The real data sets, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segmodels.data import create_dataset

pytestmark = pytest.mark.real_data


@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_camvid(real_data: Path, split: str, count: int):
    dataset = create_dataset("camvid", real_data / "camvid", split)
    assert len(dataset) == count
    pixels = np.zeros(256, int)
    for index in range(0, count, count // 12):
        image, label = dataset[index]
        assert image.shape == (360, 480, 3)
        pixels += np.bincount(label.ravel(), minlength=256)
    assert pixels[11:255].sum() == 0
    assert (pixels[:11] > 0).all()
    assert pixels[255] > 0
    # Road and building are the two largest of the 11 classes together with sky, by the published class statistics.
    assert set(np.argsort(pixels[:11])[-3:]) <= {0, 1, 3, 5}


def test_camvid_has_no_test_split_here(real_data: Path):
    from segmodels.data import DataError

    with pytest.raises(DataError, match=r"looked for .*test/images \+ test/labels; test \+ testannot; found train/, val/"):
        create_dataset("camvid", real_data / "camvid", "test")


@pytest.mark.parametrize(("split", "count"), [("train_aug", 1000), ("train", 395), ("val", 160)])
def test_voc_subset(real_data: Path, split: str, count: int):
    dataset = create_dataset("voc", real_data / "voc2012_subset", split)
    assert len(dataset) == count
    seen: set[int] = set()
    for index in range(0, count, count // 20):
        image, label = dataset[index]
        assert max(image.shape) <= 500  # the challenge's longest side
        seen |= set(np.unique(label).tolist())
    assert seen <= {*range(21), 255}
    assert {0, 15, 255} <= seen


def test_voc_splits_are_disjoint(real_data: Path):
    names = [
        {d.name(i) for i in range(len(d))}
        for d in (create_dataset("voc", real_data / "voc2012_subset", split) for split in ("train_aug", "val"))
    ]
    assert not names[0] & names[1]
