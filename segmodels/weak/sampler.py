"""Batches of a fixed number of strong and of weak images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from segmodels.data.loader import ResumableSampler


class MixedSampler(ResumableSampler):
    """Every batch has its strong images first, then its weak ones, each drawn from an endless row of permutations of its kind.

    An epoch ends when the kind that takes longer has been seen once, but for what does not fill a batch.

    Args:
        strong, weak: indices of the images.
        strong_per_batch: below ``batch_size``, 1 or more.
        batch_size, seed: as in the base class.

    Raises:
        ValueError: no image of a kind, or a batch without one.
    """

    def __init__(self, strong: np.ndarray, weak: np.ndarray, strong_per_batch: int, batch_size: int, seed: int = 0):
        if not 1 <= strong_per_batch < batch_size:
            raise ValueError(f"{strong_per_batch} strong images in a batch of {batch_size}: expected 1 to {batch_size - 1}")
        if not (len(strong) and len(weak)):
            raise ValueError(f"{len(strong)} strong and {len(weak)} weak images: expected one or more of each")
        self.kinds = (np.asarray(strong), strong_per_batch), (np.asarray(weak), batch_size - strong_per_batch)
        batches = max(1, *(len(indices) // share for indices, share in self.kinds))
        super().__init__(batches * batch_size, seed, True, batch_size, True)
        self.parts = tuple(share for _, share in self.kinds)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        passes, indices = self._keys(self.epoch)
        for key in self._places():
            yield int(passes[key]), int(indices[key])

    def order(self, epoch: int) -> np.ndarray:
        return self._keys(epoch)[1]

    def _keys(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place in an epoch, how often its kind has been passed through before, which the augmentation is drawn from,
        and the image; int64 ``[epoch_size]`` both."""
        batches = self.epoch_size // self.batch_size
        parts = []
        for kind, (indices, share) in enumerate(self.kinds):
            places = np.arange(epoch * batches * share, (epoch + 1) * batches * share)
            passes, within = np.divmod(places, len(indices))
            image = np.empty_like(places)
            for one in np.unique(passes):
                # The last number keeps these streams apart from each other and from those of the loader.
                row = np.random.default_rng([self.seed, int(one), len(indices), 2 + kind]).permutation(indices)
                image[passes == one] = row[within[passes == one]]
            parts.append((passes.reshape(batches, share), image.reshape(batches, share)))
        passes, indices = (np.concatenate([part[row] for part in parts], 1).ravel() for row in (0, 1))
        return passes, indices

    def _order_settings(self) -> dict[str, Any]:
        return {**super()._order_settings(), "kinds": [[len(indices), share] for indices, share in self.kinds]}
