"""Loading that resumes to the same bits.

Order and augmentation are functions of ``(seed, epoch, index)`` alone: neither the number of workers nor an
interruption changes what the network sees. The position is counted where batches are handed to the training loop, not
where workers prefetch, so a checkpoint taken after step ``k`` continues with batch ``k + 1``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from segmodels.data.dataset import SegmentationDataset
from segmodels.data.files import DataError
from segmodels.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Pair, Transform, to_tensor

Tensors = tuple[torch.Tensor, torch.Tensor]


class TransformedDataset(Dataset[Tensors]):
    """A data set seen through transforms and :func:`to_tensor`.

    Item ``i`` of epoch ``e`` is drawn with a generator seeded by ``(seed, e, i)``. The epoch comes with the index, as
    :class:`ResumableSampler` gives it (``dataset[e, i]``), or from :meth:`set_epoch` for a plain index.

    Args:
        dataset: items ``(image, label)`` as in :class:`SegmentationDataset`.
        transforms: ``(image, label, rng) -> (image, label)`` or None.
        seed: of the augmentation.
        mean, std: of :func:`to_tensor`.
        cache: keep decoded images in memory (4 bytes per pixel), so that each file is decoded once; as many as fit into half of
            the machine's memory.
        max_skipped: an item that cannot be read is replaced by the next one that can, while their number is not above this share
            of the data set (one is always allowed); 0 raises at the first.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transforms: Transform | None = None,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        cache: bool = False,
        max_skipped: float = 0.0,
    ):
        if seed < 0:
            raise ValueError(f"seed is {seed}; expected 0 or more")
        if not 0 <= max_skipped <= 1:
            raise ValueError(f"max_skipped is {max_skipped}; expected 0 to 1")
        self.dataset, self.transforms, self.seed = dataset, transforms, seed
        self.mean, self.std = tuple(mean), tuple(std)
        self.epoch = 0
        self._cache: dict[int, Pair] | None = {} if cache and dataset.CACHEABLE else None
        self._room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        self.allowed = max(1, int(max_skipped * len(dataset))) if max_skipped else 0
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # worker processes note them here

    def set_epoch(self, epoch: int) -> None:
        """The epoch of plain indices. Has no effect on worker processes that are already running."""
        self.epoch = epoch

    def preload(self) -> None:
        """Fills the cache now, so that worker processes forked later share it instead of each decoding its own."""
        if self._cache is not None:
            for index in range(len(self)):
                if self._room <= 0:
                    return
                self._read_or_next(index)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensors:
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        image, label = self._read_or_next(index)
        if self.transforms is not None:
            image, label = self.transforms(image, label, np.random.default_rng([self.seed, epoch, index]))
        return to_tensor(image, label, self.mean, self.std)

    def _read_or_next(self, index: int) -> Pair:
        for other in range(index, index + len(self)):
            other %= len(self)
            if self.unreadable[other]:
                continue
            try:
                return self._read(other)
            except DataError as error:
                if not self.allowed:
                    raise
                self.unreadable[other] = True
                count = int(self.unreadable.sum())
                if count > self.allowed:
                    raise DataError(
                        f"{count} of {len(self)} items cannot be read, more than the {self.allowed} that may be skipped; "
                        f"the last one: {error}"
                    ) from error
        raise DataError(f"none of the {len(self)} items can be read")

    def _read(self, index: int) -> Pair:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image, label = self.dataset[index]
        if self._cache is not None and self._room > 0:
            # A transform that writes in place would spoil all later epochs; make it fail instead.
            image.flags.writeable = label.flags.writeable = False
            self._cache[index] = image, label
            self._room -= image.nbytes + label.nbytes
        return image, label


class ResumableSampler(Sampler[tuple[int, int]]):
    """Yields the ``(epoch, index)`` keys of the rest of the current epoch, permuted as ``(seed, epoch)`` says.

    Iterating does not move the position; :meth:`advance` does, called with the number of samples that were used.

    Args:
        length: number of items.
        seed: of the permutations.
        shuffle: False for ascending order.
        batch_size, drop_last: with ``drop_last`` an epoch ends after its last full batch.
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True, batch_size: int = 1, drop_last: bool = False):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        size = length - length % batch_size if drop_last else length
        if size < 1:
            raise ValueError(f"{length} items give no batch of {batch_size} with drop_last={drop_last}; expected one or more")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.batch_size, self.drop_last, self.epoch_size = batch_size, drop_last, size
        self.parts: tuple[int, ...] = (batch_size,)  # sizes of the kinds of items in a batch, one behind the other
        self.world = 1
        self._mine = np.ones(batch_size, bool)
        self.epoch = 0
        self.position = 0

    def split(self, rank: int, world: int) -> None:
        """From now on, yields what process ``rank`` of ``world`` computes: of every batch, an equal share of each part.

        Length, position and state go on counting whole batches, so the order, and a state, hold for any number of processes.

        Raises:
            ValueError: a batch that cannot be shared out equally.
        """
        if any(part % world for part in self.parts) or (world > 1 and not self.drop_last):
            shown = " + ".join(map(str, self.parts))
            raise ValueError(f"batches of {shown} images in {world} processes: expected multiples of {world}, and full batches")
        self.world = world
        owner = np.concatenate([np.arange(part) * world // part for part in self.parts])
        self._mine = owner == rank

    def __len__(self) -> int:
        """Samples left in this epoch."""
        return self.epoch_size - self.position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        for index in self.order(epoch)[self._places()]:
            yield epoch, int(index)

    def next_batch(self) -> np.ndarray:
        """The indices that come next: this process's share of a batch."""
        return self.order(self.epoch)[self._places()[: self.batch_size // self.world]]

    def _places(self) -> np.ndarray:
        """Places in this epoch's order, from the current position on, of what this process computes."""
        places = np.arange(self.position, self.epoch_size)
        return places[self._mine[places % self.batch_size]]

    def order(self, epoch: int) -> np.ndarray:
        """The indices of an epoch, int64 ``[epoch_size]``."""
        if not self.shuffle:
            return np.arange(self.epoch_size)
        # The third number keeps this stream apart from the augmentation's (seed, epoch, index).
        return np.random.default_rng([self.seed, epoch, self.length, 1]).permutation(self.length)[: self.epoch_size]

    def advance(self, samples: int) -> None:
        """Counts ``samples`` of the current epoch as used; after the last one the next epoch begins."""
        if not 0 <= samples <= len(self):
            raise ValueError(f"cannot advance by {samples} samples: {len(self)} are left in epoch {self.epoch}")
        self.position += samples
        if self.position == self.epoch_size:
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where we are, and what the order depends on."""
        return {"epoch": self.epoch, "position": self.position, **self._order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state`` was taken. Raises ValueError where the order would not be the same."""
        for key, mine in self._order_settings().items():
            if state[key] != mine:
                raise ValueError(
                    f"cannot resume the sampler: {key} was {state[key]!r} and is now {mine!r}; expected the same, else the "
                    "order changes"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _order_settings(self) -> dict[str, Any]:
        return {"length": self.length, "seed": self.seed, "shuffle": self.shuffle, "epoch_size": self.epoch_size}


class ResumableLoader:
    """Iterates over the batches left in the current epoch: float32 ``[N, 3, H, W]`` and int64 ``[N, H, W]``.

    A batch counts as used from the moment it is handed out. ``for batch in loader`` ends with the epoch; the next
    ``for`` begins the next one. ``len(loader)`` is the number of batches of a whole epoch.
    """

    def __init__(self, dataset: TransformedDataset, sampler: ResumableSampler, workers: int = 0, pin_memory: bool = False):
        if workers < 0:
            raise ValueError(f"workers is {workers}; expected 0 or more")
        self.dataset, self.sampler, self.batch_size = dataset, sampler, sampler.batch_size
        if workers:
            dataset.preload()
        self._loader = DataLoader(
            dataset,
            batch_size=sampler.batch_size // sampler.world,
            sampler=sampler,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
            generator=torch.Generator(),  # its own, so that starting workers does not draw from the global generator
        )

    def __len__(self) -> int:
        return -(-self.sampler.epoch_size // self.batch_size)

    def __iter__(self) -> Iterator[Tensors]:
        try:
            for image, label in self._loader:
                self.sampler.advance(len(image) * self.sampler.world)
                yield image, label
        except DataError as error:
            self._end_workers()
            # A worker wraps the message in a traceback of its own; its last paragraph is the message.
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error

    def _end_workers(self) -> None:
        """Before an error is passed on, whose traceback may keep the iterator, and with it its workers, alive to the very end."""
        if self._loader._iterator is not None and self._loader.num_workers:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self.sampler.epoch

    def skipped(self) -> list[int]:
        """Items that could not be read and were replaced, so far and by all workers."""
        return [int(index) for index in self.dataset.unreadable.nonzero().ravel()]

    def state_dict(self) -> dict[str, Any]:
        return {**self.sampler.state_dict(), "skipped": self.skipped()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        self.dataset.unreadable[state.get("skipped", [])] = True


#: Seconds that a worker lives on after SIGTERM.
GRACE = 30


def _quiet_worker(_: int) -> None:
    cv2.setNumThreads(0)  # workers are the parallelism; OpenCV's threads on top of them only fight for the cores
    # Ctrl-C and torchrun reach the workers too, but the training process still wants what they hold when it stops cleanly. It
    # has as long as torchrun gives it; a worker that is left over then ends by itself, for whoever exits waits for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def build_loader(
    dataset: SegmentationDataset,
    transforms: Transform | None = None,
    *,
    batch_size: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    workers: int = 0,
    cache: bool = False,
    pin_memory: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    sampler: ResumableSampler | None = None,
    max_skipped: float = 0.0,
    rank: int = 0,
    world: int = 1,
) -> ResumableLoader:
    """A resumable loader of ``(image float32 [N, 3, H, W], label int64 [N, H, W])`` batches.

    Args:
        dataset: see :func:`segmodels.data.create_dataset`.
        transforms: must give equal sizes where ``batch_size > 1``.
        batch_size, shuffle, drop_last: as usual; the order depends on ``seed`` and the epoch only.
        seed: of order and augmentation.
        workers: loading processes; 0 loads in this one.
        cache: keep decoded images in memory; read before the workers start, so that they share it.
        pin_memory: as in ``torch.utils.data.DataLoader``.
        mean, std: of the normalisation.
        sampler: another order, with a batch size of its own; ``batch_size``, ``shuffle`` and ``drop_last`` then have no effect.
        max_skipped: see :class:`TransformedDataset`.
        rank, world: of several processes, each of which loads its share of every batch (:meth:`ResumableSampler.split`).
    """
    transformed = TransformedDataset(dataset, transforms, seed, mean, std, cache, max_skipped)
    if sampler is None:
        sampler = ResumableSampler(len(dataset), seed=seed, shuffle=shuffle, batch_size=batch_size, drop_last=drop_last)
    sampler.split(rank, world)
    return ResumableLoader(transformed, sampler, workers=workers, pin_memory=pin_memory)
