"""Loading resumes to the same bits, whatever the number of workers."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from segmodels.data import SegmentationDataset, create_dataset
from segmodels.data.loader import ResumableSampler, TransformedDataset, build_loader
from segmodels.data.transforms import ColorJitter, Compose, RandomCrop, RandomFlip, RandomScale

AUGMENT = Compose([RandomScale(0.5, 2), RandomCrop((20, 24)), RandomFlip(), ColorJitter()])


class Numbers(SegmentationDataset):
    """Random images whose label says their index; counts how often it is read."""

    def __init__(self, length: int = 10):
        super().__init__([f"c{k}" for k in range(length)], np.zeros((length, 3), np.uint8), "train", length)
        self.reads = 0

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.reads += 1
        image = np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        return image, np.full((30, 40), index, np.uint8)


def indices(batch) -> list[int]:
    return [int(label[label != 255][0]) for label in batch[1]]


def assert_equal(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for (image, label), (image2, label2) in zip(ours, theirs, strict=True):
        assert torch.equal(image, image2)
        assert torch.equal(label, label2)


def epochs(loader, count: int) -> list:
    return [batch for _ in range(count) for batch in loader]


# ---- the transformed data set


def test_augmentation_depends_on_seed_epoch_and_index_only():
    data = TransformedDataset(Numbers(), AUGMENT, seed=3)
    forward = [data[2, i] for i in range(10)]
    backward = [data[2, i] for i in reversed(range(10))][::-1]
    assert_equal(forward, backward)
    assert not torch.equal(data[3, 0][0], data[2, 0][0])
    assert not torch.equal(TransformedDataset(Numbers(), AUGMENT, seed=4)[2, 0][0], data[2, 0][0])


def test_set_epoch_is_the_epoch_of_plain_indices():
    data = TransformedDataset(Numbers(), AUGMENT)
    data.set_epoch(5)
    assert torch.equal(data[4][0], data[5, 4][0])


def test_global_generators_are_left_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    epochs(build_loader(Numbers(), AUGMENT, batch_size=3), 1)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_cache_reads_once_and_changes_nothing():
    cached, plain = Numbers(), Numbers()
    assert_equal(
        epochs(build_loader(cached, AUGMENT, batch_size=2, cache=True), 3),
        epochs(build_loader(plain, AUGMENT, batch_size=2), 3),
    )
    assert cached.reads == 10
    assert plain.reads == 30


def test_cache_refuses_transforms_that_write_in_place():
    def scribble(image, label, rng):
        image += 1
        return image, label

    with pytest.raises(ValueError, match="read-only"):
        TransformedDataset(Numbers(), scribble, cache=True)[0, 0]


# ---- the sampler


def test_every_epoch_is_a_permutation_of_its_own():
    sampler = ResumableSampler(50, seed=1)
    orders = [sampler.order(epoch) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[2], ResumableSampler(50, seed=1).order(2))
    assert not np.array_equal(orders[0], ResumableSampler(50, seed=2).order(0))


def test_sampler_advances_over_the_end_of_an_epoch():
    sampler = ResumableSampler(10, batch_size=4, drop_last=True)
    assert len(sampler) == sampler.epoch_size == 8
    sampler.advance(4)
    assert (sampler.epoch, sampler.position, len(sampler)) == (0, 4, 4)
    np.testing.assert_array_equal([index for _, index in sampler], sampler.order(0)[4:])
    sampler.advance(4)
    assert (sampler.epoch, sampler.position) == (1, 0)
    assert {epoch for epoch, _ in sampler} == {1}
    with pytest.raises(ValueError, match="cannot advance by 9 samples: 8 are left in epoch 1"):
        sampler.advance(9)


def test_sampler_without_shuffling():
    assert [index for _, index in ResumableSampler(5, shuffle=False)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=11), "length was 10 and is now 11"),
        (dict(seed=1), "seed was 0 and is now 1"),
        (dict(shuffle=False), "shuffle was True"),
    ],
)
def test_resuming_another_order_is_refused(change: dict, message: str):
    state = ResumableSampler(10).state_dict()
    with pytest.raises(ValueError, match=f"cannot resume the sampler: {message}"):
        ResumableSampler(**{"length": 10, **change}).load_state_dict(state)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 or more"):
        ResumableSampler(10, batch_size=0)
    with pytest.raises(ValueError, match="3 items give no batch of 8 with drop_last=True"):
        ResumableSampler(3, batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="seed is -1"):
        TransformedDataset(Numbers(), seed=-1)
    with pytest.raises(ValueError, match="workers is -2"):
        build_loader(Numbers(), workers=-2)


# ---- the loader


@pytest.mark.parametrize(("drop_last", "batches"), [(False, 4), (True, 3)])
def test_batches_of_an_epoch(drop_last: bool, batches: int):
    loader = build_loader(Numbers(), AUGMENT, batch_size=3, drop_last=drop_last)
    got = list(loader)
    assert len(got) == len(loader) == batches
    assert got[0][0].shape == (3, 3, 20, 24)
    assert got[0][0].dtype == torch.float32
    assert got[0][1].dtype == torch.int64
    seen = [index for batch in got for index in indices(batch)]
    assert len(seen) == len(set(seen)) == (9 if drop_last else 10)
    assert loader.epoch == 1


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 5, 6, 7])
def test_resumes_to_the_same_bits(stop: int):
    """Two epochs of four batches, interrupted after each number of batches."""
    whole = epochs(build_loader(Numbers(), AUGMENT, batch_size=3, seed=7), 2)
    loader = build_loader(Numbers(), AUGMENT, batch_size=3, seed=7)
    before = []
    while len(before) < stop:
        for batch in loader:
            before.append(batch)
            if len(before) == stop:
                break
    state = copy.deepcopy(loader.state_dict())
    resumed = build_loader(Numbers(), AUGMENT, batch_size=3, seed=7)
    resumed.load_state_dict(state)
    after = []
    while len(after) < 8 - stop:
        after += list(resumed)
    assert_equal(before + after, whole)


def test_workers_change_nothing_and_prefetching_does_not_count():
    """Two workers prefetch up to four batches; the state counts those handed out."""
    options = dict(batch_size=2, seed=5, cache=True)
    whole = epochs(build_loader(Numbers(16), AUGMENT, **options), 2)
    loader = build_loader(Numbers(16), AUGMENT, workers=2, **options)
    iterator = iter(loader)
    before = [next(iterator) for _ in range(3)]
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (0, 6)
    del iterator, loader
    resumed = build_loader(Numbers(16), AUGMENT, workers=1, **options)
    resumed.load_state_dict(state)
    assert_equal(before + epochs(resumed, 2), whole)


def test_evaluation_order_and_sizes(camvid_root: Path):
    dataset = create_dataset("camvid", camvid_root, "val")
    batches = list(build_loader(dataset, shuffle=False))
    assert len(batches) == len(dataset)
    for (image, label), (_, expected) in zip(batches, dataset, strict=True):
        assert image.shape == (1, 3, *expected.shape)
        np.testing.assert_array_equal(label[0].numpy(), expected)
