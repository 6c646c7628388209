"""Augmentation: exact sizes, known labels, aligned pairs, seeded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segmodels.data.transforms import (
    FILL,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorJitter,
    Compose,
    PadTo,
    RandomBlur,
    RandomCrop,
    RandomFlip,
    RandomRotation,
    RandomScale,
    Resize,
    to_tensor,
)

LABELS = (0, 1, 4, 7, 255)


def pair(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.choice(np.array(LABELS, np.uint8), (height, width))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), label


def run(transform, image, label, seed: int = 0):
    return transform(image, label, np.random.default_rng(seed))


ALL = [
    RandomScale(),
    RandomScale(0.5, 2, 0.25),
    RandomCrop((33, 47)),
    RandomCrop((33, 47), cat_max_ratio=0.5),
    RandomFlip(),
    RandomRotation(),
    RandomBlur(),
    ColorJitter(),
    PadTo((70, 90)),
    PadTo(multiple=16),
    Resize((20, 30)),
    Compose([RandomScale(), RandomCrop(40), RandomFlip(), ColorJitter()]),
]


@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 80), width=st.integers(1, 80), seed=st.integers(0, 99))
@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_every_transform(transform, height: int, width: int, seed: int):
    """Types, equal sizes, no invented labels, inputs untouched, and equal generators give equal bits."""
    image, label = pair(height, width)
    before = image.copy(), label.copy()
    image.flags.writeable = label.flags.writeable = False  # as the cache hands them out
    new_image, new_label = run(transform, image, label, seed)
    assert new_image.dtype == new_label.dtype == np.uint8
    assert new_image.shape == (*new_label.shape, 3)
    assert set(np.unique(new_label)) <= set(LABELS)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])
    again_image, again_label = run(transform, image, label, seed)
    np.testing.assert_array_equal(new_image, again_image)
    np.testing.assert_array_equal(new_label, again_label)


@pytest.mark.parametrize("size", [(16, 16), (60, 20), (20, 60), (100, 120)])
def test_crop_has_exactly_its_size_and_is_a_window_of_the_padded_image(size: tuple[int, int]):
    image, label = pair(50, 50)
    for seed in range(10):
        new_image, new_label = run(RandomCrop(size), image, label, seed)
        assert new_label.shape == size
        # Mark where the padding is by its colour: a random image has no pixel of exactly it (checked here).
        assert not (image == FILL).all(-1).any()
        padding = (new_image == FILL).all(-1)
        assert padding.sum() == size[0] * size[1] - min(50, size[0]) * min(50, size[1])
        assert (new_label[padding] == 255).all()


def test_crop_keeps_image_and_label_aligned():
    label = np.arange(60 * 80).reshape(60, 80) % 251
    image = np.repeat(label[..., None], 3, 2).astype(np.uint8)
    for seed in range(5):
        new_image, new_label = run(RandomCrop((30, 90)), image, label.astype(np.uint8), seed)
        inside = ~(new_image == FILL).all(-1)
        np.testing.assert_array_equal(new_image[..., 0][inside], new_label[inside])


def test_crop_reaches_every_place():
    image, label = pair(12, 12)
    label = np.arange(144, dtype=np.uint8).reshape(12, 12)
    rng = np.random.default_rng(0)
    crop = RandomCrop(10)
    corners = {int(crop(image, label, rng)[1][0, 0]) for _ in range(200)}
    # 9 places, 200 draws: each one is missed with probability (8/9)^200 < 1e-10
    assert corners == {12 * row + column for row in range(3) for column in range(3)}


def test_crop_prefers_varied_windows():
    label = np.zeros((40, 400), np.uint8)
    label[:, 180:220] = 1  # the only place where a 40-wide window is not all class 0
    image = np.zeros((40, 400, 3), np.uint8)
    varied = [
        np.mean([len(np.unique(run(RandomCrop(40, r), image, label, s)[1])) > 1 for s in range(100)]) for r in (1, 0.9)
    ]
    # One window in about 4.6 is varied (0.22); ten tries find one with probability 1 - 0.78^10 = 0.92.
    assert varied[0] < 0.5 < 0.75 < varied[1]


def test_crop_of_void_only_does_not_hang():
    image, label = pair(20, 20)
    assert run(RandomCrop(10, 0.75), image, np.full_like(label, 255))[1].shape == (10, 10)


def test_flip_twice_is_the_identity():
    image, label = pair(31, 40)
    once = run(RandomFlip(1), image, label)
    assert (once[1] == label[:, ::-1]).all()
    twice = run(RandomFlip(1), *once)
    np.testing.assert_array_equal(twice[0], image)
    np.testing.assert_array_equal(twice[1], label)
    assert run(RandomFlip(0), image, label)[0] is image


def test_scale_keeps_the_label_set_of_large_regions():
    label = np.repeat(np.repeat(np.array([[0, 4], [7, 255]], np.uint8), 16, 0), 16, 1)
    for seed in range(20):
        new = run(RandomScale(0.5, 2), np.zeros((32, 32, 3), np.uint8), label, seed)[1]
        assert set(np.unique(new)) == {0, 4, 7, 255}


def test_scale_steps_and_bounds():
    image, label = pair(40, 80)
    stepped = {run(RandomScale(0.5, 2, 0.25), image, label, seed)[1].shape for seed in range(200)}
    # 7 factors, 200 draws: one is missed with probability below 7 (6/7)^200 < 1e-12
    assert stepped == {(round(40 * f), round(80 * f)) for f in (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)}
    heights = [run(RandomScale(0.5, 2), image, label, seed)[1].shape[0] for seed in range(200)]
    assert 20 <= min(heights) < 30 < 70 < max(heights) <= 80


def test_image_and_label_are_resampled_on_one_grid():
    """A step edge stays in one place in both: at half size the edge of the label is the middle grey of the image."""
    label = np.zeros((64, 64), np.uint8)
    label[:, 31:] = 1
    image = np.repeat(label[..., None] * 255, 3, 2)
    for size in (32, 48, 96, 128, 101):
        new_image, new_label = run(Resize(size), image, label)
        # Bilinear and nearest on one grid differ only where bilinear is half-way between the two sides.
        clear = np.abs(new_image[..., 0].astype(int) - 127.5) > 3
        np.testing.assert_array_equal((new_image[..., 0] > 127)[clear], (new_label == 1)[clear])
        assert clear.mean() > 0.9


def test_pad_to():
    image, label = pair(30, 50)
    new_image, new_label = run(PadTo(multiple=16), image, label)
    assert new_label.shape == (32, 64)
    np.testing.assert_array_equal(new_image[:30, :50], image)
    np.testing.assert_array_equal(new_label[:30, :50], label)
    assert (new_label[30:] == 255).all()
    assert (new_image[:, 50:] == FILL).all()
    assert run(PadTo(40), image, label)[1].shape == (40, 50)


def test_colour_jitter_is_mild_and_leaves_labels():
    image, label = pair(40, 40)
    for seed in range(20):
        new_image, new_label = run(ColorJitter(0.2, 0.2, 0.2), image, label, seed)
        assert new_label is label
        # The three factors together move the mean by 20 % of brightness at most, and saturate a little at 255.
        assert abs(new_image.mean() / image.mean() - 1) < 0.25
    np.testing.assert_array_equal(run(ColorJitter(0, 0, 0), image, label)[0], image)


def test_to_tensor():
    image, label = pair(9, 13)
    x, y = to_tensor(image, label)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert x.is_contiguous()
    assert y.is_contiguous()
    expected = (image / 255 - IMAGENET_MEAN) / IMAGENET_STD
    # Float32 rounds the scale, the product and the sum, of magnitudes up to 5: a few units of 2^-22.
    np.testing.assert_allclose(x.numpy(), expected.transpose(2, 0, 1), atol=2e-6)
    np.testing.assert_array_equal(y.numpy(), label)
    raw = to_tensor(image, label, mean=(0, 0, 0), std=(1 / 255,) * 3)[0].numpy()
    np.testing.assert_allclose(raw, image.transpose(2, 0, 1), atol=1e-4)  # 255 * 2^-23, three roundings


def test_padding_is_near_zero_after_normalisation():
    # FILL rounds the mean to whole grey levels: half a level, divided by the smallest deviation.
    x, _ = to_tensor(np.full((2, 2, 3), FILL, np.uint8), np.zeros((2, 2), np.uint8))
    assert x.abs().max() <= 0.5 / 255 / min(IMAGENET_STD) + 1e-6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomScale(2, 0.5), r"RandomScale\(2, 0.5, step=None\): expected 0 < minimum <= maximum"),
        (lambda: RandomScale(0.5, 2, 0), "step > 0"),
        (lambda: RandomCrop(0), "RandomCrop size is 0; expected positive"),
        (lambda: RandomCrop(8, cat_max_ratio=0), "cat_max_ratio is 0; expected 0 < ratio <= 1"),
        (lambda: RandomFlip(1.5), "probability is 1.5; expected 0 to 1"),
        (lambda: ColorJitter(contrast=-1), "contrast is -1; expected 0 to 1"),
        (lambda: PadTo(), "expected exactly one of the two"),
        (lambda: PadTo(8, multiple=8), "expected exactly one of the two"),
        (lambda: PadTo(multiple=0), "multiple is 0; expected positive"),
        (lambda: Resize((10, -1)), r"Resize size is \(10, -1\); expected positive"),
    ],
)
def test_wrong_arguments(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_rotation_turns_image_and_label_alike() -> None:
    """A disc off the centre: both are where the angle puts it, and what comes in from outside is void."""
    rows, columns = np.mgrid[:81, :101]
    label = (((rows - 40) ** 2 + (columns - 75) ** 2) < 100).astype(np.uint8)
    image = np.repeat(label[..., None] * np.uint8(200), 3, 2)
    new_image, new_label = run(RandomRotation(180, probability=1), image, label, seed=3)
    angle = np.random.default_rng(3)
    angle.random()
    turn = np.deg2rad(angle.uniform(-180, 180))
    center = 40 - 25 * np.sin(turn), 50 + 25 * np.cos(turn)  # counter-clockwise; rows point down
    found = np.argwhere(new_label == 1).mean(0)
    assert np.abs(found - center).max() < 0.5  # pixels
    known = new_label != 255
    assert ((new_image[..., 0] > 100) == (new_label == 1))[known].mean() > 0.99  # half a pixel along the disc
    assert new_label[0, 0] == 255
    assert tuple(new_image[0, 0]) == FILL
    unchanged = run(RandomRotation(0, probability=1), image, label)
    assert all(np.array_equal(a, b) for a, b in zip(unchanged, (image, label), strict=True))


def test_blur_keeps_the_label_and_the_mean() -> None:
    image, label = pair(40, 50)
    new_image, new_label = run(RandomBlur(1), image, label)
    assert np.array_equal(new_label, label)
    assert new_image.std() < 0.5 * image.std()
    assert abs(float(new_image.mean()) - float(image.mean())) < 2
    with pytest.raises(ValueError, match="RandomBlur probability is 2; expected 0 to 1"):
        RandomBlur(2)
    with pytest.raises(ValueError, match="RandomRotation degrees is 200; expected 0 to 180"):
        RandomRotation(200)
