"""Reading every file of a data set once, and comparing its size with what was published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segmodels.data import create_dataset, dataset_kind
from segmodels.data.files import DataError
from segmodels.data.prepare import Progress


@dataclass
class SplitReport:
    """What was found in one split.

    Attributes:
        split: its name.
        published: number of images as published, None where unknown.
        images: number of images, None where the split could not be opened.
        read: how many of them were read.
        bad: the messages of the first bad files.
        bad_count: how many there are.
        absent: classes that no pixel has, of the files that were read.
    """

    split: str
    published: int | None
    images: int | None = None
    read: int = 0
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    absent: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return self.images is not None and not self.bad_count and self.published in (None, self.images)

    def __str__(self) -> str:
        if self.images is None:
            return f"{self.split}: {self.bad[0]}"
        expected = "" if self.published is None else f" of {self.published} published" if self.fine else (
            f", published {self.published}" if self.published != self.images else ""
        )  # fmt: skip
        lines = [f"{self.split}: {self.images} images{expected}, {self.read} read, {self.bad_count} bad"]
        lines += [f"  {message}" for message in self.bad]
        if self.bad_count > len(self.bad):
            lines.append(f"  and {self.bad_count - len(self.bad)} more")
        if self.absent:
            lines.append(f"  no pixel of {', '.join(self.absent)}")
        return "\n".join(lines)


def check_split(
    name: str, root: str | Path | None, split: str, progress: Progress, show: int = 10, every: int = 1, **options: Any
) -> SplitReport:
    """Opens a split and reads its files.

    Args:
        name, root, split, options: as for :func:`segmodels.data.create_dataset`.
        progress: told after every file.
        show: how many bad files are named.
        every: read one file of so many.
    """
    counts = dataset_kind(name).COUNTS
    report = SplitReport(split, counts.get(split) if counts else None)
    try:
        dataset = create_dataset(name, root, split, **options)
    except DataError as error:
        report.bad, report.bad_count = [str(error)], 1
        return report
    report.images = len(dataset)
    pixels = np.zeros(256, np.int64)
    for index in range(0, len(dataset), every):
        progress(split, index, len(dataset))
        report.read += 1
        try:
            pixels += np.bincount(dataset[index][1].ravel(), minlength=256)
        except DataError as error:
            report.bad_count += 1
            if len(report.bad) < show:
                report.bad.append(str(error))
    if pixels[:255].any():
        report.absent = [name for name, count in zip(dataset.classes, pixels, strict=False) if not count]
    return report


def check(
    name: str, root: str | Path | None, splits: Sequence[str], progress: Progress, show: int = 10, every: int = 1, **options: Any
) -> tuple[list[SplitReport], bool]:
    """Checks splits of a data set.

    Args:
        splits: which; empty for all that are there.
        others: as for :func:`check_split`.

    Returns:
        The reports, and whether all is fine: every split that was asked for or is there, and at least one.
    """
    known = dataset_kind(name).COUNTS or {"train": None, "val": None}
    reports = [check_split(name, root, split, progress, show, every, **options) for split in splits or known]
    there = [report for report in reports if splits or report.images is not None]
    return reports, bool(there) and all(report.fine for report in there)
