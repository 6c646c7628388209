"""Differences between two arms, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

#: Of the intervals.
CONFIDENCE = 0.95


class Difference(NamedTuple):
    """Score of one arm minus that of another, over the seeds that both have.

    Attributes:
        pairs: number of seeds.
        mean: of the differences; nan without pairs.
        low, high: of the interval in which their true mean lies with :data:`CONFIDENCE`, if they are normally distributed; nan
            with fewer than two pairs.
        above: number of seeds in which the first arm is above the second.
    """

    pairs: int
    mean: float
    low: float
    high: float
    above: int

    @property
    def verdict(self) -> str:
        """``"holds"`` where the whole interval is above 0, ``"does not hold"`` where it is below, otherwise ``"undecided"``."""
        if self.low > 0:
            return "holds"
        return "does not hold" if self.high < 0 else "undecided"


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Compares scores by seed. What a seed does to both arms alike (the order of the images) is not in the difference."""
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    count = len(differences)
    mean = sum(differences) / count if count else math.nan
    half = math.nan
    if count > 1:
        deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / (count - 1))
        half = quantile_t((1 + CONFIDENCE) / 2, count - 1) * deviation / math.sqrt(count)
    return Difference(count, mean, mean - half, mean + half, sum(value > 0 for value in differences))


def overall(verdicts: list[str]) -> str:
    """Of a finding from those of its pairs: it holds where all do, and does not where one does not."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "undecided"


def quantile_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, by bisection of its distribution function.

    Args:
        probability: 0.5 to below 1.
        freedom: degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while probability_t(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if probability_t(middle, freedom) < probability else (low, middle)
    return high


def probability_t(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, exactly: for whole degrees of freedom it is a finite sum (Abramowitz and Stegun, 26.7.3 and 4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    first = 3 if odd else 2
    for k in range(first, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if odd:
        inside = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    else:
        inside = sine * total
    return 0.5 + inside / 2
