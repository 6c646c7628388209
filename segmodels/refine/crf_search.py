"""Search of the CRF's parameters on a validation list, coarse to fine (Chen et al., arXiv:1606.00915, section 4.1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from segmodels.engine.metrics import ConfusionMatrix
from segmodels.engine.progress import Reporter
from segmodels.refine.dense_crf import DenseCRF

# Energies [1, C, H, W], image [1, c, H, W] and labels [1, H, W] of one image; a function, so that not all need be in memory.
Example = Callable[[], tuple[Tensor, Tensor, Tensor]]


class Trial(NamedTuple):
    """One combination of parameters and what it scored."""

    parameters: dict[str, float]
    miou: float


class Found(NamedTuple):
    """The outcome of a search: trials in the order of the grid."""

    best: DenseCRF
    miou: float
    unrefined_miou: float
    trials: list[Trial]


def search(
    crf: DenseCRF,
    grid: Mapping[str, Sequence[float]],
    examples: Sequence[Example],
    num_classes: int,
    *,
    seconds: float = 30.0,
) -> Found:
    """Every combination of the grid over every example; the best mean IoU wins, the first among equals.

    Args:
        crf: what the parameters outside the grid are taken from.
        grid: values to try by the name of a parameter, for example ``{"w1": (5, 10), "sigma_beta": range(3, 11)}``. DeepLab v1
            searches w1 5 and 10, sigma_alpha 50 to 100 by 10 and sigma_beta 3 to 10 on 100 images.
        examples: validation images; labels of 255 do not count.
        num_classes: C.
        seconds: between the lines of progress where there is no terminal for a bar.

    Raises:
        ValueError: an empty grid or no example; a name that is no parameter; as :class:`DenseCRF` and :class:`ConfusionMatrix`.
    """
    if not examples:
        raise ValueError("examples: expected one or more")
    names = list(grid)
    known = ("w1", "sigma_alpha", "sigma_beta", "w2", "sigma_gamma", "iterations")
    for name in names:
        if name not in known:
            raise ValueError(f"grid names {name!r}: expected one of {', '.join(known)}")
        if not len(grid[name]):
            raise ValueError(f"grid[{name!r}] is empty: expected values to try")
    candidates = [crf.replace(**dict(zip(names, values, strict=True))) for values in itertools.product(*grid.values())]
    matrices = [ConfusionMatrix(num_classes) for _ in candidates]
    unrefined = ConfusionMatrix(num_classes)
    done = 0
    with Reporter("search", len(examples) * len(candidates), seconds=seconds) as reporter:
        for example in examples:  # outermost, so that each is made once
            unary, image, labels = example()
            unrefined.update(unary.argmin(1), labels)
            for candidate, matrix in zip(candidates, matrices, strict=True):
                matrix.update(candidate(unary, image).argmax(1), labels)
                done += 1
                reporter.update(done, f"best mIoU {max(_score(m) for m in matrices):.4f}")
    trials = [
        Trial({name: getattr(candidate, name) for name in names}, _score(matrix))
        for candidate, matrix in zip(candidates, matrices, strict=True)
    ]
    best = max(range(len(trials)), key=lambda i: trials[i].miou)
    return Found(candidates[best], trials[best].miou, _score(unrefined), trials)


def _score(matrix: ConfusionMatrix) -> float:
    """Mean IoU, -1 before anything was counted."""
    value = matrix.scores()["miou"]
    return -1.0 if math.isnan(value) else value
