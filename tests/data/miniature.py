"""Writes small files for the miniature data sets of the fixtures."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segmodels.data import voc_colormap

SIZE = (24, 32)


def write_image(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    """A smooth random picture, so that JPEG keeps its colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(coarse, size[::-1]))


def write_mask(path: Path, label: np.ndarray) -> None:
    """One grey channel of class ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(path)


def write_palette_mask(path: Path, label: np.ndarray) -> None:
    """Indices with the VOC palette, as the challenge ships them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(label).convert("P")
    picture.putdata(label.ravel().tolist())
    picture.putpalette(voc_colormap(256).ravel().tolist())
    picture.save(path)


def random_label(classes: int, void: int, seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Every class and void at least once."""
    label = np.random.default_rng(seed).integers(0, classes, size).astype(np.uint8)
    label.flat[: classes + 1] = [*range(classes), void]
    return label
