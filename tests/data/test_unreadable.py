"""Images that cannot be read in the middle of an epoch: stop, or skip and count; never a hanging worker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from miniature import random_label, write_image, write_mask

from segmodels.data import DataError, create_dataset
from segmodels.data.loader import build_loader


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images, of which f3 and f4 are cut."""
    for k in range(10):
        write_image(tmp_path / "train" / "images" / f"f{k}.jpg", seed=k)
        write_mask(tmp_path / "train" / "labels" / f"f{k}.png", random_label(11, 11, seed=k))
    for k in (3, 4):
        path = tmp_path / "train" / "images" / f"f{k}.jpg"
        path.write_bytes(path.read_bytes()[:100])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_stop_names_the_file(root: Path, workers: int):
    """The message is the same from a worker, whose own is a traceback."""
    with pytest.raises(DataError) as caught:
        list(build_loader(create_dataset("camvid", root), batch_size=2, workers=workers))
    assert re.fullmatch(rf"{root}/train/images/f[34]\.jpg: truncated JPEG, .* end-of-image marker \(FF D9\)", str(caught.value))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_skip_takes_the_next_one_and_counts(root: Path, workers: int, cache: bool):
    options = dict(batch_size=5, shuffle=False, max_skipped=0.2, cache=cache)
    loader = build_loader(create_dataset("camvid", root), workers=workers, **options)
    plain = create_dataset("camvid", root)
    for _ in range(2):
        labels = torch.cat([label for _, label in loader])
        for position, index in enumerate([0, 1, 2, 5, 5, 5, 6, 7, 8, 9]):
            assert torch.equal(labels[position], torch.from_numpy(plain[index][1]).long())
        assert loader.skipped() == [3, 4]
    resumed = build_loader(create_dataset("camvid", root), **options)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.skipped() == [3, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_stop(root: Path, workers: int):
    loader = build_loader(create_dataset("camvid", root), batch_size=2, workers=workers, max_skipped=0.1)
    message = r"2 of 10 items cannot be read, more than the 1 that may be skipped; the last one: .*f[34]\.jpg: truncated JPEG"
    with pytest.raises(DataError, match=message):
        list(loader)


def test_all_unreadable(root: Path):
    for path in (root / "train" / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 10 items can be read"):
        list(build_loader(create_dataset("camvid", root), max_skipped=1.0))


def test_a_share_outside_0_to_1(root: Path):
    with pytest.raises(ValueError, match=r"max_skipped is 1\.5; expected 0 to 1"):
        build_loader(create_dataset("camvid", root), max_skipped=1.5)
