"""Published data sets: from what their publishers distribute through ``prepare`` to ``check``, and the answers to damage."""

from __future__ import annotations

import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import official
import pytest
from miniature import random_label, write_mask
from PIL import Image

from segmodels.data import DATASETS, DataError, class_names, create_dataset, read_mask
from segmodels.data.__main__ import main, rows
from segmodels.data.cityscapes import LABEL_IDS
from segmodels.data.nyudv2 import FAR, NEAR
from segmodels.data.pascal_context import CLASSES as CONTEXT
from segmodels.data.polygons import decode_runs, region
from segmodels.data.prepare import unpack


def quiet(what: str, done: int, total: int | None) -> None:
    pass


def needs(name: str) -> None:
    if name in official.MATLAB:
        pytest.importorskip("scipy")
    if name == "nyudv2":
        pytest.importorskip("h5py")


@pytest.fixture
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The miniature of the data set named by the parameter."""
    needs(request.param)
    official.MINIATURES[request.param][0](tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(("name", "raw"), [(name, name) for name in official.MINIATURES], indirect=["raw"])
def test_prepare_then_check(name: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """From an archive with folders around it, twice (the second time nothing is left to do), then every split is read."""
    archive, root, counts = tmp_path / "archive.tar.gz", tmp_path / "out", official.MINIATURES[name][1]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(raw, "some/folder")
    assert main(["prepare", name, str(root), str(archive)]) == 0
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert main(["prepare", name, str(root), str(archive)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert not [path for path in root.rglob("*") if "partial" in path.name]

    assert main(["check", name, str(root)]) == 1  # the miniature is smaller than what was published
    monkeypatch.setattr(DATASETS[name], "COUNTS", counts)
    capsys.readouterr()
    assert main(["check", name, str(root)]) == 0
    printed = capsys.readouterr().out
    for split, count in counts.items():
        assert f"{split}: {count} images of {count} published, {count} read, 0 bad" in printed
    dataset = create_dataset(name, root, next(iter(counts)))
    names, colors = class_names(name)
    assert dataset.classes == names
    assert colors.shape == (len(names), 3)
    assert len(np.unique(colors, axis=0)) == (149 if name == "ade20k" else len(names))
    if name != "coco":  # its picture has three classes
        assert set(np.unique(np.concatenate([dataset[k][1].ravel() for k in range(len(dataset))]))) == {*range(len(names)), 255}


@pytest.mark.parametrize("raw", ["voc"], indirect=True)
def test_voc_and_sbd(raw: Path):
    DATASETS["voc"].prepare(raw, quiet)
    folder = raw / "ImageSets" / "Segmentation"
    assert (folder / "train_aug.txt").read_text().split() == ["a", "b", "e", "f"]
    assert (folder / "reduced_val.txt").read_text().split() == ["d"]
    train = create_dataset("voc", raw, "train_aug")
    assert 255 in train[1][1]  # b: the mask of VOC with its border, not that of SBD
    np.testing.assert_array_equal(train[2][1], random_label(21, 0, seed=12))
    image, label = create_dataset("voc", raw, "test")[0]
    assert (label == 255).all()
    assert label.shape == image.shape[:2]


@pytest.mark.parametrize("raw", ["voc"], indirect=True)
def test_a_damaged_file_of_sbd_is_named_and_the_rest_continues_later(raw: Path):
    path = raw / "dataset" / "cls" / "e.mat"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"e\.mat: not readable as a MATLAB file .*interrupted download"):
        DATASETS["voc"].prepare(raw, quiet)
    done = {path.name: path.stat().st_mtime_ns for path in (raw / "SegmentationClassAug").iterdir()}
    assert set(done) == {"b.png", "c.png"}
    path.write_bytes(whole)
    DATASETS["voc"].prepare(raw, quiet)
    for name, time in done.items():
        assert (raw / "SegmentationClassAug" / name).stat().st_mtime_ns == time
    path.unlink()
    with pytest.raises(DataError, match=r"e\.mat: missing, 1 of 4 listed files of SBD are"):
        DATASETS["voc"].prepare(raw, quiet)
    official.mat(path, GTinst=np.zeros(3))
    (raw / "SegmentationClassAug" / "e.png").unlink()
    with pytest.raises(DataError, match=r"e\.mat: no variable 'GTcls'"):
        DATASETS["voc"].prepare(raw, quiet)


@pytest.mark.parametrize("raw", ["cityscapes"], indirect=True)
def test_cityscapes_label_ids_become_train_ids(raw: Path):
    dataset = create_dataset("cityscapes", raw, "val")
    stored = read_mask(raw / "gtFine" / "val" / "ulm" / "ulm_0_1_gtFine_labelIds.png")
    label = dataset[0][1]
    for index, value in enumerate(LABEL_IDS):
        np.testing.assert_array_equal(label == index, stored == value)
    np.testing.assert_array_equal(DATASETS["cityscapes"].SUBMISSION_IDS[label[label != 255]], stored[np.isin(stored, LABEL_IDS)])
    write_mask(raw / "gtFine" / "val" / "ulm" / "ulm_0_1_gtFine_labelIds.png", np.full(label.shape, 34, np.uint8))
    with pytest.raises(DataError, match=r"label 34 at row 0.*; expected 7\.\.33 \(road \.\. bicycle\) or void \(0, 1, 2"):
        dataset[0]
    (raw / "gtCoarse" / "train_extra" / "ulm" / "ulm_0_1_gtCoarse_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"ulm_0_1_gtCoarse_labelIds\.png: missing, the mask of .*1 of 1 images"):
        create_dataset("cityscapes", raw, "train_extra")


@pytest.mark.parametrize("raw", ["ade20k"], indirect=True)
def test_ade20k_zero_is_unlabelled(raw: Path):
    stored = read_mask(raw / "annotations" / "training" / "ADE_0.png")
    np.testing.assert_array_equal(create_dataset("ade20k", raw)[0][1], np.where(stored == 0, 255, stored.astype(int) - 1))
    np.testing.assert_array_equal(DATASETS["ade20k"].SUBMISSION_IDS[[0, 149]], [1, 150])


@pytest.mark.parametrize("raw", ["pascal_context"], indirect=True)
def test_pascal_context_with_and_without_background(raw: Path):
    DATASETS["pascal_context"].prepare(raw, quiet)
    values = random_label(60, 60, seed=0)  # the publisher's ids: 1 is accordion, then the 59 in alphabetical order
    expected = np.full(values.shape, 255)
    for index, name in enumerate(CONTEXT):
        expected[values == sorted(CONTEXT).index(name) + 2] = index
    label = create_dataset("pascal_context", raw)[0][1]
    np.testing.assert_array_equal(label, expected)
    with_background = create_dataset("pascal_context", raw, background=True)
    assert with_background.num_classes == 60
    np.testing.assert_array_equal(with_background[0][1], np.where(expected == 255, 0, expected + 1))
    (raw / "labels.txt").write_text("1: accordion\n")
    with pytest.raises(DataError, match=r"labels\.txt: no class 'aeroplane' \(59 of 59 missing\)"):
        DATASETS["pascal_context"].prepare(raw, quiet)


@pytest.mark.parametrize("raw", ["nyudv2"], indirect=True)
def test_nyudv2_modalities(raw: Path):
    import h5py

    DATASETS["nyudv2"].prepare(raw, quiet)
    with h5py.File(raw / "nyu_depth_v2_labeled.mat") as file:
        images, depths, labels = (file[key][2] for key in ("images", "depths", "labels"))
    dataset = create_dataset("nyudv2", raw)
    assert dataset.name(1) == "0003"
    image, label = dataset[1]
    np.testing.assert_array_equal(image, images.transpose(2, 1, 0))
    np.testing.assert_array_equal(label, np.where(labels.T == 0, 255, (labels.T.astype(int) - 1) % 40))
    depth = create_dataset("nyudv2", raw, modality="depth")[1][0]
    expected = 255 * np.log(depths.T * 1000 / NEAR) / np.log(FAR / NEAR)
    np.testing.assert_allclose(depth[..., 0], expected, atol=0.6)  # half a level, and half a millimetre before the logarithm
    with pytest.raises(DataError, match="hha not found"):
        create_dataset("nyudv2", raw, modality="hha")
    with pytest.raises(ValueError, match=r"modality 'xyz'.*expected one of rgb, depth, hha"):
        create_dataset("nyudv2", raw, modality="xyz")
    cut = raw / "nyu_depth_v2_labeled.mat"
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"labeled\.mat: not readable as HDF5 .*interrupted download"):
        DATASETS["nyudv2"].prepare(raw, quiet)


@pytest.mark.parametrize("raw", ["siftflow"], indirect=True)
def test_siftflow_geometric_labels(raw: Path):
    DATASETS["siftflow"].prepare(raw, quiet)
    dataset = create_dataset("siftflow", raw, "test", labels="geometric")
    assert (dataset.name(0), dataset.classes) == ("street_2", ["sky", "horizontal", "vertical"])
    stored = random_label(5, 4, seed=1).astype(int) - 1
    np.testing.assert_array_equal(dataset[0][1], np.where(stored <= 0, 255, stored - 1))
    assert class_names("siftflow", {"labels": "geometric"})[0] == dataset.classes


# ---- COCO


@pytest.mark.parametrize("raw", ["coco"], indirect=True)
def test_coco_masks_and_the_rule_of_1000_pixels(raw: Path):
    DATASETS["coco"].prepare(raw, quiet)
    assert (raw / "voc_masks" / "train2017.txt").read_text().split() == ["000000000007"]
    label = create_dataset("coco", raw, "train2017")[0][1]
    expected = np.zeros((80, 100), np.uint8)
    expected[10:60, 10:60] = 15
    expected[20:30, 20:30] = 255  # a person and a cat
    expected[5:25, 90] = expected[5:25, 91] = 2  # the crowd, in two columns
    np.testing.assert_array_equal(label, expected)
    path = raw / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"instances_val2017\.json: not readable as JSON .*interrupted download"):
        DATASETS["coco"].prepare(raw, quiet)


def test_polygons_cover_the_pixels_whose_centres_they_hold():
    star = [50 + r * f(a) for k, r in enumerate([45, 18] * 7) for a in [0.3 + k * np.pi / 7] for f in (np.cos, np.sin)]
    found = region([star], 100, 100)
    points = np.array(star, np.float32).reshape(-1, 1, 2)
    inside = [[cv2.pointPolygonTest(points, (x + 0.5, y + 0.5), False) > 0 for x in range(100)] for y in range(100)]
    np.testing.assert_array_equal(found, inside)
    outside = region([[-20.0, -20, 130, -20, 130, 7, -20, 7]], 100, 100)
    assert outside[:7].all()
    assert not outside[7:].any()
    with pytest.raises(ValueError, match="a polygon of 4 numbers"):
        region([[1, 2, 3, 4]], 10, 10)


def test_run_lengths_as_text():
    # [6, 1, 40, 4, 5, 4, 5, 4, 21]: the first three as they are, then differences to the run before the last, five bits a sign
    counts, text = [6, 1, 40, 4, 5, 4, 5, 4, 21], bytearray()
    for k, count in enumerate(counts):
        value = count - counts[k - 2] if k > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(48 + bits + 32 * more)
            if not more:
                break
    assert decode_runs(text.decode()) == counts
    mask = region({"size": [9, 10], "counts": text.decode()}, 9, 10)
    assert mask.sum() == 1 + 4 + 4 + 4
    assert mask[6, 0]
    with pytest.raises(ValueError, match="run lengths add up to 90: expected 5 x 10"):
        region({"counts": counts}, 5, 10)


# ---- archives


def test_archives_that_are_cut_or_of_something_else(tmp_path: Path):
    source, root = tmp_path / "source", tmp_path / "root"
    official.ade20k(source)
    members = DATASETS["ade20k"].MEMBERS
    whole, compressed, packed = tmp_path / "a.tar", tmp_path / "a.tgz", tmp_path / "a.zip"
    for path, mode in ((whole, "w"), (compressed, "w:gz")):
        with tarfile.open(path, mode) as tar:
            tar.add(source, "ADEChallengeData2016")
    with zipfile.ZipFile(packed, "w") as archive:
        for path in source.rglob("*"):
            archive.write(path, f"ADEChallengeData2016/{path.relative_to(source)}")
    with tarfile.open(whole) as tar:
        boundary = tar.getmembers()[-1].offset  # cut between two files: tarfile itself takes that for the end
    for path, length in ((whole, boundary), (whole, boundary + 700), (compressed, 3000), (packed, 2000)):
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(path.read_bytes()[:length])
        with pytest.raises(DataError, match=rf"cut\{path.suffix}: damaged or cut off after \d files.*interrupted download"):
            unpack(cut, root, members, "ade20k", quiet)
    for path in (whole, packed, source):
        shutil.rmtree(root, ignore_errors=True)
        assert unpack(path, root, members, "ade20k", quiet) == 5
        assert unpack(path, root, members, "ade20k", quiet) == 0
        assert len(create_dataset("ade20k", root)) == 1
    with pytest.raises(DataError, match=r"a\.tar: not an archive of the data set 'kitti'; expected files .*Training_00"):
        unpack(whole, root, DATASETS["kitti"].MEMBERS, "kitti", quiet)
    (tmp_path / "page.html").write_text("<html>403</html>")
    with pytest.raises(DataError, match=r"page\.html: damaged or cut off after 0 files"):
        unpack(tmp_path / "page.html", root, members, "ade20k", quiet)
    with pytest.raises(DataError, match="nowhere: does not exist"):
        unpack(tmp_path / "nowhere", root, members, "ade20k", quiet)


def test_nothing_is_written_outside_the_root(tmp_path: Path):
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("images/training/../../../../escaped.jpg", b"x")
        archive.writestr("images/training/a.jpg", b"x")
    unpack(evil, tmp_path / "root", r"images/.+", "ade20k", quiet)
    assert [path.name for path in tmp_path.rglob("*.jpg")] == ["a.jpg"]


# ---- check


@pytest.mark.parametrize("raw", ["ade20k"], indirect=True)
def test_check_names_bad_files_and_counts(raw: Path, capsys):
    for k in range(2, 6):
        shutil.copy(raw / "images" / "training" / "ADE_0.jpg", raw / "images" / "training" / f"ADE_{k}.jpg")
        shutil.copy(raw / "annotations" / "training" / "ADE_0.png", raw / "annotations" / "training" / f"ADE_{k}.png")
    annotations = raw / "annotations" / "training"
    (raw / "images" / "training" / "ADE_2.jpg").write_bytes(b"\xff\xd8 cut")
    write_mask(annotations / "ADE_3.png", random_label(150, 0, seed=0, size=(30, 40)))
    write_mask(annotations / "ADE_4.png", np.full((24, 32), 200, np.uint8))
    assert main(["check", "ade20k", str(raw), "--split", "train", "--show", "2"]) == 1
    printed = capsys.readouterr().out
    assert "train: 5 images, published 20210, 5 read, 3 bad" in printed
    assert "ADE_2.jpg: truncated JPEG" in printed
    assert "ADE_3.png: the mask is 40x30" in printed
    assert "and 1 more" in printed
    assert "ADE_4" not in printed
    (annotations / "ADE_5.png").unlink()
    assert main(["check", "ade20k", str(raw), "--split", "train"]) == 1
    assert re.search(r"ADE_5\.png: missing, the mask of .*; 1 of 5 images have no mask", capsys.readouterr().out)


def test_classes_that_never_occur_are_told(tmp_path: Path, capsys):
    official.camvid(tmp_path)
    write_mask(tmp_path / "trainannot" / "train0.png", np.full((24, 32), 3, np.uint8))
    main(["check", "camvid", str(tmp_path), "--split", "train"])
    assert "no pixel of sky, building, pole, pavement" in capsys.readouterr().out


# ---- list


def test_list_and_the_documentation_agree(capsys):
    assert main(["list"]) == 0
    assert main(["list", "cityscapes"]) == 0
    assert "leftImg8bit/<split>/<city>" in capsys.readouterr().out
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name, classes, splits, title in rows():
        assert f"| `{name}` | {classes} | {splits} | {title} |" in text


def test_labels_are_written_as_palette_pictures(tmp_path: Path):
    from segmodels.data.prepare import write_label

    label = random_label(21, 255, seed=0)
    write_label(tmp_path / "a.png", label)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), label)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
