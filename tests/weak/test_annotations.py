"""Tags and boxes from label maps, their file, and label maps from boxes."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segmodels.data import DataError, SegmentationDataset, create_dataset
from segmodels.engine.cli import run_command
from segmodels.weak import Annotation, WeakDataset, WeakLabels, derive, rectangles, segments
from segmodels.weak.__main__ import main
from segmodels.weak.boxes import _core
from segmodels.weak.dataset import draw_strong
from segmodels.weak.sampler import MixedSampler

NAMES = ["background", "cat", "dog"]


class Maps(SegmentationDataset):
    """Label maps given as arrays, under grey images."""

    def __init__(self, labels):
        super().__init__(NAMES, np.zeros((3, 3)), "train", len(labels))
        self.labels = labels

    def load(self, index):
        return np.full((*self.labels[index].shape, 3), 90, np.uint8), self.labels[index]

    def name(self, index):
        return f"image{index}"


def two_cats_and_a_dog() -> np.ndarray:
    label = np.zeros((20, 30), np.uint8)
    label[2:8, 3:9] = label[12:18, 20:29] = 1
    label[10, 1:3] = 1  # a splinter
    label[1:6, 15:25] = 2
    label[0] = 255
    return label


def test_tags_and_boxes_of_components_and_instances(tmp_path) -> None:
    maps = Maps([two_cats_and_a_dog(), np.zeros((4, 5), np.uint8)])
    found = derive(maps, "maps")
    assert found.images["image0"] == Annotation((20, 30), (1, 2), ((1, 20, 12, 29, 18), (1, 3, 2, 9, 8), (2, 15, 1, 25, 6)))
    assert found.images["image1"] == Annotation((4, 5), (), ())
    assert len(derive(maps, "maps", min_area=1).images["image0"].boxes) == 4
    assert [box[0] for box in derive(maps, "maps", background=None, min_area=10**6).images["image0"].boxes] == [0, 1, 2]
    # one object in two pieces, the other cat, and the dog
    objects = np.zeros((20, 30), np.uint8)
    objects[2:8, 3:9] = objects[10, 1:3] = 1
    objects[12:18, 20:29], objects[1:6, 15:25] = 2, 3
    cv2.imwrite(str(tmp_path / "image0.png"), objects)
    cv2.imwrite(str(tmp_path / "image1.png"), np.zeros((4, 5), np.uint8))
    boxes = derive(maps, "maps", instances=tmp_path).images["image0"].boxes
    assert boxes == ((1, 20, 12, 29, 18), (1, 1, 2, 9, 11), (2, 15, 1, 25, 6))
    cv2.imwrite(str(tmp_path / "image1.png"), np.zeros((5, 5), np.uint8))
    with pytest.raises(DataError, match=r"image1\.png: 5x5 \(width x height\); expected 5x4"):
        derive(maps, "maps", instances=tmp_path)


def test_the_file_keeps_everything_and_names_what_is_wrong(tmp_path) -> None:
    maps = Maps([two_cats_and_a_dog(), two_cats_and_a_dog()])
    labels = derive(maps, "maps")
    path = tmp_path / "labels.json"
    labels.save(path)
    assert WeakLabels.load(path) == labels
    assert len(path.read_text().splitlines()) == 4, "one image a line"
    good = path.read_text()

    def change(**values):
        content = json.loads(good)
        for key, value in values.items():
            (content if key in content else content["images"]["image1"])[key] = value
        path.write_text(json.dumps(content))

    for values, message in (
        ({"format": 2}, "format 2; expected 1"),
        ({"background": 7}, "background 7; expected 0 to 2, or null"),
        ({"tags": [1, 3]}, "image 'image1': tag 3; expected 0 to 2"),
        ({"tags": [0]}, "tag 0; expected 0 to 2, without the background"),
        ({"tags": [1]}, r"box \[2, 15, 1, 25, 6\]; expected .* a class of the tags \[1\]"),
        ({"size": [20, 28]}, r"box \[1, 20, 12, 29, 18\]; expected .* left < right <= 28"),
        ({"size": [20]}, r"size \[20\]; expected \[height, width\]"),
        ({"boxes": [[1, 2, 3, 4.5, 6]]}, r"box \[1, 2, 3, 4\.5, 6\]"),
        ({"boxes": None}, "expected the lists size, tags and boxes"),
    ):
        change(**values)
        with pytest.raises(DataError, match=message):
            WeakLabels.load(path)
    for text, message in (("[]", "format 'list'"), ("{", "not JSON"), ('{"format": 1}', "no 'dataset' in it")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            WeakLabels.load(path)
    with pytest.raises(DataError, match=r"cannot be read.*python -m segmodels\.weak"):
        WeakLabels.load(tmp_path / "none.json")


def test_labels_of_another_data_set_are_refused() -> None:
    maps = Maps([two_cats_and_a_dog()])
    labels, weak = derive(maps, "maps"), np.array([True, True])
    with pytest.raises(DataError, match=r"nothing on 1 of the 2 images.*first 'image1'"):
        WeakDataset(Maps([two_cats_and_a_dog()] * 2), labels, weak, "em_adapt")
    other = Maps([two_cats_and_a_dog()])
    other.classes = ["background", "cat", "horse"]
    with pytest.raises(DataError, match="horse"):
        WeakDataset(other, labels, weak[:1], "em_adapt")
    with pytest.raises(DataError, match=r"'image0' is 20x30 .* there and 19x30"):
        WeakDataset(Maps([two_cats_and_a_dog()[1:]]), labels, weak[:1], "em_adapt")[0]
    no_background = derive(maps, "maps", background=None)
    with pytest.raises(DataError, match="no background class; bbox_rect needs one"):
        WeakDataset(maps, no_background, weak[:1], "bbox_rect")
    empty = Maps([np.full((3, 3), 255, np.uint8)])
    with pytest.raises(DataError, match="'image0' has no tags"):
        WeakDataset(empty, derive(empty, "maps", background=None), weak[:1], "em_fixed")


def test_masks_of_weak_images_are_never_read(tmp_path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    for name in "ab":
        cv2.imwrite(str(tmp_path / "train/images" / f"{name}.png"), np.repeat(two_cats_and_a_dog()[..., None] % 255 * 90, 3, 2))
        cv2.imwrite(str(tmp_path / "train/masks" / f"{name}.png"), two_cats_and_a_dog())
    out = tmp_path / "weak" / "labels.json"
    command = ["folder", str(tmp_path), "--out", str(out), "--option", "classes=[background, cat, dog]"]
    assert main(command) == 0
    assert run_command(main, [*command, "--background", "horse"]) == 1
    labels = WeakLabels.load(out)
    assert labels.background == 0
    (tmp_path / "train/masks/b.png").write_bytes(b"no picture")
    dataset = create_dataset("folder", tmp_path, "train", classes=NAMES)
    weak = np.array([False, True])
    for method, inside in (("em_adapt", 0), ("bbox_rect", 1), ("bbox_em_fixed", 1), ("bbox_seg", 1)):
        made = WeakDataset(dataset, labels, weak, method)
        assert np.array_equal(made[0][1], two_cats_and_a_dog())
        image, label = made[1]
        assert (image.shape, label[15, 25], label[19, 0]) == ((20, 30, 3), inside, 0)


annotations = st.builds(
    lambda size, boxes: Annotation(
        size,
        tuple(sorted({box[0] for box in boxes})),
        tuple((c, int(x * size[1] * 0.99), int(y * size[0] * 0.99), size[1] - int(r * (size[1] - 1 - int(x * size[1] * 0.99))),
               size[0] - int(b * (size[0] - 1 - int(y * size[0] * 0.99)))) for c, x, y, r, b in boxes),
    ),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.tuples(st.integers(1, 4), *[st.floats(0, 1)] * 4), max_size=4),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(annotations, st.integers(0, 2**31))
def test_boxes_are_respected(annotation, seed) -> None:
    allowed = np.zeros((5, *annotation.size), bool)
    allowed[0] = True
    for c, left, top, right, bottom in annotation.boxes:
        assert left < right
        assert top < bottom
        allowed[c, top:bottom, left:right] = True
    image = np.random.default_rng(seed).integers(0, 256, (*annotation.size, 3), dtype=np.uint8)
    filled, segmented = rectangles(annotation, 0), segments(annotation, 0, image)
    for label in (filled, segmented):
        assert label.dtype == np.uint8
        assert label.shape == annotation.size
        assert np.take_along_axis(allowed, label[None].astype(int), 0).all()
    assert np.array_equal(filled == 0, ~allowed[1:].any(0)), "a filled box has no background"


def test_bbox_seg_finds_the_object_that_bbox_rect_does_not() -> None:
    rows, columns = np.mgrid[:60, :80]
    truth = ((rows - 30) ** 2 / 20**2 + (columns - 40) ** 2 / 28**2 < 1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 20, (60, 80, 3))
    image = (np.where(truth[..., None], (200, 60, 40), (40, 120, 60)) + noise).astype(np.uint8)
    annotation = derive(Maps([truth]), "maps").images["image0"]
    wrong_rect = (rectangles(annotation, 0) != truth).mean()
    wrong_seg = (segments(annotation, 0, image) != truth).mean()
    assert wrong_rect > 0.08
    assert wrong_seg < 0.01


def test_cores() -> None:
    assert _core((1, 0, 0, 100, 40)) == (1, 14, 14, 86, 26)  # 72 x 12 = 864; with one rim less 74 x 14 = 1036, above a quarter
    assert _core((1, 5, 5, 14, 25)) == (1, 5, 5, 14, 25), "too narrow"


def test_smaller_boxes_lie_on_top() -> None:
    annotation = Annotation((6, 6), (1, 2), ((2, 2, 2, 4, 4), (1, 0, 0, 5, 5)))
    label = rectangles(annotation, 0)
    assert (label[3, 3], label[1, 1], label[5, 5]) == (2, 1, 0)


def test_the_draw_of_strong_images() -> None:
    few, many = draw_strong(50, 10, 3), draw_strong(50, 20, 3)
    assert few.sum() == 10
    assert many[few].all()
    assert not np.array_equal(few, draw_strong(50, 10, 4))
    with pytest.raises(ValueError, match=r"weak\.strong=51"):
        draw_strong(50, 51, 0)


def test_mixed_batches_and_where_they_continue() -> None:
    strong, weak = np.array([3, 9, 5]), np.array([0, 1, 2, 4, 6, 7, 8])
    sampler = MixedSampler(strong, weak, 2, 5, seed=1)
    assert sampler.epoch_size == 10, "the seven weak images fill two batches"
    keys = []
    for _ in range(7):
        keys += list(sampler)
        sampler.advance(len(sampler))
    batches = np.array([index for _, index in keys]).reshape(-1, 5)
    assert np.isin(batches[:, :2], strong).all()
    assert np.isin(batches[:, 2:], weak).all()
    # each kind is passed through from end to end, in a new order each time
    assert all(sorted(batches[:, 2:].ravel()[k : k + 7]) == sorted(weak) for k in (0, 7, 14, 21, 28, 35))
    assert all(sorted(batches[:, :2].ravel()[k : k + 3]) == sorted(strong) for k in range(0, 27, 3))
    assert len(set(keys)) == len(keys), "no augmentation is drawn twice"
    # from the middle of the second epoch
    again = MixedSampler(strong, weak, 2, 5, seed=1)
    again.load_state_dict({**again.state_dict(), "epoch": 1, "position": 5})
    assert list(again) == keys[15:20]
    assert [index for _, index in keys[10:20]] == again.order(1).tolist()
    with pytest.raises(ValueError, match="length was 10 and is now 15"):
        MixedSampler(strong, weak, 3, 5, seed=1).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="expected 1 to 4"):
        MixedSampler(strong, weak, 5, 5)
