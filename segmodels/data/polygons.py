"""COCO's two forms of a region as a mask: polygons, and run lengths (plain or as text)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def region(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The ``segmentation`` of an annotation as bool ``[height, width]``. Raises ValueError where it has neither form."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return runs_to_mask(decode_runs(counts) if isinstance(counts, (str, bytes)) else counts, height, width)
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        fill(mask, polygon)
    return mask


def fill(mask: np.ndarray, polygon: Sequence[float]) -> None:
    """Sets the pixels whose centres lie inside ``x0, y0, x1, y1, ...`` (even-odd rule; pixel (0, 0) spans 0 to 1)."""
    points = np.asarray(polygon, float)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise ValueError(f"a polygon of {points.size} numbers: expected three or more pairs")
    points = points.reshape(-1, 2)
    height, width = mask.shape
    rows = np.arange(max(0, int(points[:, 1].min())), min(height, int(points[:, 1].max()) + 1))
    if not rows.size:
        return
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, 0).T
    y = rows[:, None] + 0.5
    crossed = (y0 <= y) != (y1 <= y)  # half-open, so that a vertex counts once
    row, edge = np.nonzero(crossed)
    x = x0[edge] + (y[row, 0] - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    # Each crossing toggles all pixels whose centres are to its right.
    toggles = np.zeros((rows.size, width + 1), np.int32)
    np.add.at(toggles, (row, np.clip(np.ceil(x - 0.5), 0, width).astype(int)), 1)
    mask[rows] |= (np.cumsum(toggles, 1)[:, :width] & 1).astype(bool)


def runs_to_mask(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """Lengths of runs of 0 and 1 in turns, column by column, as bool ``[height, width]``."""
    runs = np.asarray(counts, np.int64)
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(f"run lengths add up to {runs.sum()}: expected {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def decode_runs(text: str | bytes) -> list[int]:
    """COCO's text of run lengths: groups of five bits, low ones first, with a sixth bit for "more follows"; from the third run
    on, differences to the run before the last."""
    counts: list[int] = []
    value = shift = 0
    for byte in text.encode() if isinstance(text, str) else text:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the text of run lengths ends in the middle of a number")
    return counts
