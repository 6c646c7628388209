"""Data sets as tar files: the same items, orders that resume, and half-written files."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import random_label, write_image, write_mask

from segmodels.data import DataError, create_dataset
from segmodels.data.__main__ import main
from segmodels.data.loader import build_loader
from segmodels.data.shards import Shards, ShardSampler


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    for k in range(7):
        write_image(tmp_path / "camvid" / "train" / "images" / f"f{k}.jpg", seed=k)
        write_mask(tmp_path / "camvid" / "train" / "labels" / f"f{k}.png", random_label(11, 11, seed=k))
    return tmp_path / "camvid"


@pytest.fixture
def root(camvid: Path, tmp_path: Path) -> Path:
    assert main(["shard", "camvid", str(camvid), str(tmp_path / "shards"), "--items", "3"]) == 0
    return tmp_path / "shards"


def test_the_same_items(camvid: Path, root: Path):
    assert sorted(path.name for path in root.iterdir()) == [f"train-{k:06d}.tar" for k in range(3)] + ["train.json"]
    plain, packed = create_dataset("camvid", camvid), create_dataset("shards", root)
    assert packed.classes == plain.classes
    np.testing.assert_array_equal(packed.colors, plain.colors)
    assert len(packed) == len(plain) == 7
    for index in range(7):
        assert packed.name(index) == plain.name(index)
        for ours, theirs in zip(packed[index], plain[index], strict=True):
            np.testing.assert_array_equal(ours, theirs)  # JPEG bytes are copied, so equal to the bit
    assert main(["check", "shards", str(root), "--split", "train"]) == 0


def test_writing_again_continues_and_gives_the_same_bytes(camvid: Path, root: Path, tmp_path: Path):
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    kept = (root / "train-000000.tar").stat().st_mtime_ns
    (root / "train-000001.tar").unlink()
    (root / "train.json").unlink()
    call = ["shard", "camvid", str(camvid), str(root), "--items"]
    assert main([*call, "3"]) == 0
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    assert (root / "train-000000.tar").stat().st_mtime_ns == kept
    with pytest.raises(DataError, match=r"train-000000\.tar: holds other items than this data set"):
        main([*call, "2"])


def test_an_interrupted_call_leaves_no_half_shard(camvid: Path, tmp_path: Path):
    path = camvid / "train" / "images" / "f4.jpg"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"f4\.jpg: truncated JPEG"):
        main(["shard", "camvid", str(camvid), str(tmp_path / "out"), "--items", "3"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("cut", ["end", "middle", "missing"])
def test_half_written_shards_are_named(root: Path, cut: str, with_index: bool):
    path = root / "train-000001.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    if cut == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: last if cut == "end" else last - 200])
    if not with_index:
        (root / "train.json").unlink()
        if cut == "missing":
            assert len(create_dataset("shards", root, classes=["a"] * 11)) == 4
            return
    with pytest.raises(DataError, match=r"train-000001\.tar: .*(half-written|missing)"):
        create_dataset("shards", root, classes=None if with_index else ["a"] * 11)


def test_damage_inside_a_shard_is_named_with_its_item(root: Path):
    path = root / "train-000002.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember("f6.seg.png")
    data = bytearray(path.read_bytes())
    data[member.offset_data : member.offset_data + 8] = b"notaPNG!"
    path.write_bytes(bytes(data))
    dataset = create_dataset("shards", root)
    dataset[5]
    with pytest.raises(DataError, match=r"train-000002\.tar:f6: cannot be decoded as a mask"):
        dataset[6]


def test_tar_files_of_others(tmp_path: Path):
    """Folders inside, other suffixes, further files, no JSON."""
    write_image(tmp_path / "a.png")
    write_mask(tmp_path / "l.png", random_label(3, 255, seed=0))
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for key in ("x/1", "y/1"):
            for suffix, source in (("JSON", "l.png"), ("mask.png", "l.png"), ("png", "a.png")):
                tar.add(tmp_path / source, f"{key}.{suffix}")
    with pytest.raises(DataError, match=r"classes\.txt: missing"):
        create_dataset("shards", tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    dataset = create_dataset("shards", tmp_path)
    assert [dataset.name(k) for k in range(len(dataset))] == ["x/1", "y/1"]
    np.testing.assert_array_equal(dataset[1][1], random_label(3, 255, seed=0))
    with pytest.raises(DataError, match=r"train-0\.tar:x/1: label 2; expected 0\.\.1"):
        create_dataset("shards", tmp_path, classes=["a", "b"])[0]
    with tarfile.open(tmp_path / "train-1.tar", "w") as tar:
        member = tarfile.TarInfo("z.jpg")
        tar.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match=r"train-1\.tar: item 'z' has jpg; expected an image and a label"):
        create_dataset("shards", tmp_path)
    shutil.copy(tmp_path / "a.png", tmp_path / "val-0.tar")
    with pytest.raises(DataError, match=r"val-0\.tar: a half-written or damaged shard"):
        create_dataset("shards", tmp_path, "val")
    with pytest.raises(DataError, match=r"neither test\.json nor test-\*\.tar"):
        create_dataset("shards", tmp_path, "test")


def test_the_order_is_shard_after_shard_and_a_permutation(root: Path):
    dataset = create_dataset("shards", root, shuffle_buffer=3)
    assert isinstance(dataset, Shards)
    sampler = ShardSampler(dataset, seed=1, drop_last=False)
    orders = [sampler.order(epoch) for epoch in range(6)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(7))
        shards = np.searchsorted(dataset.starts, order, "right")
        # Windows of three: none reaches beyond two neighbouring shards of the epoch's sequence.
        assert max(len(set(shards[k : k + 3])) for k in (0, 3, 6)) <= 2
    assert len({tuple(order) for order in orders}) > 1
    np.testing.assert_array_equal(orders[2], ShardSampler(dataset, seed=1, drop_last=False).order(2))
    other = create_dataset("shards", root, shuffle_buffer=4)
    with pytest.raises(ValueError, match="shuffle_buffer was 3 and is now 4"):
        ShardSampler(other, seed=1, drop_last=False).load_state_dict(sampler.state_dict())


def test_loading_resumes_to_the_same_bits_with_workers(root: Path):
    def loader(workers: int):
        dataset = create_dataset("shards", root, shuffle_buffer=4)
        return build_loader(dataset, cache=True, workers=workers, sampler=ShardSampler(dataset, 3, batch_size=2))

    whole = loader(0)
    expected = [batch for _ in range(2) for batch in whole]
    first = loader(2)
    iterator = iter(first)
    got = [next(iterator) for _ in range(2)]
    state = first.state_dict()
    del iterator, first
    second = loader(1)
    second.load_state_dict(state)
    got += [batch for _ in range(2) for batch in second]
    assert len(got) == len(expected) == 6
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert whole.dataset._cache is None  # sets larger than memory
