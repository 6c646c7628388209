"""Synthetic scenes: the same everywhere, all classes there, and only the ground tells boat, car and tent apart."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from segmodels.data import create_dataset
from segmodels.data.synthetic import BOAT, CAR, DECK, GRASS, MINIMUM_SIZE, POLE, ROAD, TENT, WATER

SCENES = 60

_HASHES = """
import hashlib
from segmodels.data import create_dataset
for split in ("train", "val"):
    dataset = create_dataset("synthetic", split=split, seed=11)
    for index in (0, 5, 17):
        image, label = dataset[index]
        print(hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    dataset = create_dataset("synthetic", split="val", length=SCENES)
    return [dataset[index] for index in range(SCENES)]


def digest(item: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(item[0].tobytes() + item[1].tobytes()).hexdigest()


def test_contract():
    dataset = create_dataset("synthetic", length=5)
    assert len(dataset) == 5
    assert dataset.num_classes == len(dataset.classes) == len(dataset.colors) == 8
    assert dataset.name(3) == "train_0_00003"
    image, label = dataset[4]
    assert image.shape == (256, 256, 3)
    assert label.shape == (256, 256)
    assert image.dtype == label.dtype == np.uint8
    with pytest.raises(IndexError, match="index 5 out of range"):
        dataset[5]


@pytest.mark.parametrize("size", [64, (65, 131), (200, 96), 256])
def test_sizes(size):
    image, label = create_dataset("synthetic", size=size, length=1)[0]
    assert label.shape == ((size, size) if isinstance(size, int) else size)
    assert image.shape == (*label.shape, 3)
    assert set(np.unique(label)) <= {*range(8), 255}


def test_equal_in_another_process_and_when_read_again():
    # Another hash seed and thread count, so that neither can have a part in the scenes.
    environment = {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", _HASHES], capture_output=True, text=True, env=environment, check=True)
    here = []
    for split in ("train", "val"):
        dataset = create_dataset("synthetic", split=split, seed=11)
        here += [digest(dataset[index]) for index in (0, 5, 17)]
        assert digest(dataset[5]) == here[-2]  # after other items
    assert result.stdout.split() == here


def test_splits_seeds_and_indices_give_different_scenes():
    digests = [
        digest(create_dataset("synthetic", split=split, seed=seed)[index])
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert len(set(digests)) == len(digests)


def test_all_classes_occur_and_pole_and_tent_are_rare(scenes):
    counts = sum(np.bincount(label.ravel(), minlength=256) for _, label in scenes)
    share = counts / counts.sum()
    assert counts[8:255].sum() == 0
    assert (share[:8] > 0.002).all()
    assert share[POLE] < 0.03  # thin
    assert share[TENT] < 0.04  # on the rarest of the three grounds
    assert 0.02 < share[255] < 0.12
    presence = [np.mean([(label == k).any() for _, label in scenes]) for k in range(8)]
    assert min(presence) > 0.2


def test_the_ground_of_a_scene_decides_its_sprites(scenes):
    """With one ground, only its class occurs; all three occur over the scenes."""
    seen = set()
    for _, label in scenes:
        present = set(np.unique(label).tolist())
        grounds = present & {WATER, ROAD, GRASS}
        for thing, ground in ((BOAT, WATER), (CAR, ROAD), (TENT, GRASS)):
            assert thing not in present or ground in grounds
        if len(grounds) == 1:
            seen |= {(ground, thing) for ground in grounds for thing in present & {BOAT, CAR, TENT}}
    assert seen == {(WATER, BOAT), (ROAD, CAR), (GRASS, TENT)}


def test_sprites_look_alike_whatever_their_class():
    """Colours inside the outlines of boats, cars and tents come from one distribution."""
    dataset = create_dataset("synthetic", length=300, size=96, seed=3)
    colours: dict[int, list[np.ndarray]] = {BOAT: [], CAR: [], TENT: []}
    for image, label in dataset:
        for thing, values in colours.items():
            if (inside := label == thing).any():
                values.append(image[inside].mean(0))
    means = {thing: np.mean(values, 0) for thing, values in colours.items()}
    errors = {thing: np.std(values, 0) / len(values) ** 0.5 for thing, values in colours.items()}
    for one, other in ((BOAT, CAR), (CAR, TENT), (BOAT, TENT)):
        # Nine differences of means, in units of their standard error: beyond 4 by chance once in about two thousand runs.
        distance = np.abs(means[one] - means[other]) / np.hypot(errors[one], errors[other])
        assert distance.max() < 4


def test_the_deciding_ground_is_far_away(scenes):
    """Where a sprite stands on the deck, the ground is mostly out of sight of a receptive field of 49 pixels."""
    far = total = 0
    for _, label in scenes:
        ground = np.argwhere(label <= GRASS)
        for row, column in np.argwhere((label >= BOAT) & (label <= TENT))[::160]:
            distance = np.abs(ground - (row, column)).max(1).min()
            far, total = far + (distance > 24), total + 1
    assert total > 300
    assert far / total > 0.5


def test_every_scene_shows_ground_and_deck_of_some_size(scenes):
    for _, label in scenes:
        assert np.isin(label, (WATER, ROAD, GRASS)).mean() > 0.01
        assert (label == DECK).mean() > 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=32), f"synthetic size is 32; expected .* of {MINIMUM_SIZE} or more"),
        (dict(size=(128, 10)), r"synthetic size is \(128, 10\)"),
        (dict(length=0), "synthetic length is 0; expected 1 or more"),
        (dict(seed=-1), "synthetic seed is -1; expected 0 or more"),
    ],
)
def test_wrong_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create_dataset("synthetic", **options)


def test_needs_no_root():
    with pytest.raises(TypeError, match="root"):
        create_dataset("synthetic", "/data")
