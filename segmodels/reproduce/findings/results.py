"""From rows to what they say about a finding."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from segmodels.reproduce.findings.definitions import FINDINGS, Finding
from segmodels.reproduce.findings.statistics import Difference, overall, paired

Rows = dict[tuple[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A pair of arms that the paper orders: its difference and ours, in points."""

    above: str
    below: str
    published: float | None
    ours: Difference


@dataclass(frozen=True)
class Result:
    """A finding with the scores of its arms, in %, by seed."""

    finding: Finding
    scores: dict[str, dict[int, float]]
    comparisons: list[Comparison]

    @property
    def verdict(self) -> str:
        """``"holds"``, ``"does not hold"`` or ``"undecided"``; ``"not run"`` where no pair has been compared."""
        compared = [comparison.ours for comparison in self.comparisons if comparison.ours.pairs]
        if not compared:
            return "not run"
        return overall([comparison.ours.verdict for comparison in self.comparisons])

    @property
    def in_order(self) -> int:
        """Comparisons whose mean difference has the paper's sign."""
        return sum(comparison.ours.mean > 0 for comparison in self.comparisons)

    def mean(self, arm: str) -> float:
        """Over the seeds; nan without any."""
        values = list(self.scores[arm].values())
        return statistics.fmean(values) if values else math.nan


def score(row: dict[str, Any], metric: str | tuple[str, ...]) -> float:
    """In %: mIoU, or the mean IoU of some classes (those that occur)."""
    if isinstance(metric, str):
        return 100 * row[metric]
    known = [row["iou"][name] for name in metric if row["iou"][name] is not None]
    return 100 * statistics.fmean(known) if known else math.nan


def result_of(finding: Finding, rows: Rows) -> Result:
    scores: dict[str, dict[int, float]] = {arm: {} for arm in finding.arms}
    for (arm, seed), row in sorted(rows.items(), key=lambda item: item[0]):
        if arm in scores:
            scores[arm][seed] = score(row, finding.metric)
    comparisons = []
    for above, below in finding.order:
        high, low = finding.arms[above], finding.arms[below]
        published = None if high is None or low is None else high - low
        comparisons.append(Comparison(above, below, published, paired(scores[above], scores[below])))
    return Result(finding, scores, comparisons)


def results(rows: Rows) -> dict[str, Result]:
    """Every finding, by name."""
    return {name: result_of(finding, rows) for name, finding in FINDINGS.items()}
