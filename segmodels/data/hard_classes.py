"""Bootstrapping: training images that show hard classes come more often (DeepLabv3, Chen et al. 2017, arXiv:1706.05587, section
4.2: bicycle, chair, table, potted plant and sofa)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segmodels.data.dataset import SegmentationDataset


class HardClasses(SegmentationDataset):
    """All items of a data set and, behind them, ``copies - 1`` times those that show one of the classes. A copy is an item of its
    own, so that it is augmented on its own. All label maps are read once.

    Args:
        dataset: the training set.
        hard: names of classes.
        copies: how often their images come, 1 or more.

    Raises:
        ValueError: a name that is no class of the data set.
    """

    def __init__(self, dataset: SegmentationDataset, hard: Sequence[str], copies: int = 2):
        for name in hard:
            if name not in dataset.classes:
                raise ValueError(f"hard class {name!r}: expected a class of {dataset!r}, {', '.join(dataset.classes)}")
        ids = [dataset.classes.index(name) for name in hard]
        shows = [index for index in range(len(dataset)) if np.isin(dataset[index][1], ids).any()]
        self.dataset, self.indices = dataset, [*range(len(dataset)), *shows * (copies - 1)]
        super().__init__(dataset.classes, dataset.colors, dataset.split, len(self.indices))

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As the data set."""
        return self.dataset[self.indices[index]]

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[self._check(index)])
