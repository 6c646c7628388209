"""Pictures of label maps: overlays, a legend, and sheets of image | truth | prediction. All images are uint8 RGB."""

from __future__ import annotations

import os
from collections.abc import Sequence

import cv2
import numpy as np

from segmodels.engine.checkpoints import atomic_write

IGNORE_INDEX = 255
VOID_COLOR = (255, 255, 255)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def colorize(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, 3]`` of a map uint8 ``[H, W]``; 255 is white, other values without a colour are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    table[IGNORE_INDEX] = VOID_COLOR
    return table[label]


def overlay(image: np.ndarray, label: np.ndarray, colors: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """The image with the label's colours blended over it (``alpha`` of them) and dark lines between the classes.

    Raises:
        ValueError: image ``[H, W, 3]`` and label ``[H, W]`` of different sizes, or alpha outside 0..1.
    """
    if image.shape[:2] != label.shape:
        raise ValueError(f"image {list(image.shape[:2])} and label {list(label.shape)}: expected equal sizes")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: expected 0 to 1")
    blended = cv2.addWeighted(image, 1 - alpha, colorize(label, colors), alpha, 0)
    edges = np.zeros(label.shape, bool)
    edges[:, 1:] |= label[:, 1:] != label[:, :-1]
    edges[1:] |= label[1:] != label[:-1]
    return np.where(edges[..., None], blended // 2, blended).astype(np.uint8)


def legend(classes: Sequence[str], colors: np.ndarray, width: int) -> np.ndarray:
    """A strip ``[h, width, 3]`` with a coloured box and the name of every class, in as many rows as it takes."""
    row, box, gap = 22, 14, 10
    places: list[tuple[int, int]] = []
    x = y = 0
    for name in classes:
        needed = box + 4 + cv2.getTextSize(name, _FONT, 0.42, 1)[0][0] + gap
        if x and x + needed > width:
            x, y = 0, y + row
        places.append((x, y))
        x += needed
    strip = np.full((y + row, width, 3), 255, np.uint8)
    for name, color, (x, y) in zip(classes, colors, places, strict=True):
        corner = (x + 2, y + 4)
        cv2.rectangle(strip, corner, (corner[0] + box, corner[1] + box), [int(c) for c in color], cv2.FILLED)
        cv2.rectangle(strip, corner, (corner[0] + box, corner[1] + box), (60, 60, 60), 1)
        cv2.putText(strip, name, (x + box + 6, y + 15), _FONT, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def sheet(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    colors: np.ndarray,
    *,
    cell: int = 360,
    titles: tuple[str, str, str] = ("image", "truth", "prediction"),
) -> np.ndarray:
    """Rows of image | truth | prediction with a header and the legend below.

    Args:
        rows: (image ``[H, W, 3]``, truth ``[H, W]``, prediction ``[H, W]``), of any sizes.
        classes, colors: of the data set.
        cell: width of one picture.
        titles: of the columns.
    """
    if not rows:
        raise ValueError("sheet: expected one row or more")
    gap = 4
    width = 3 * cell + 2 * gap
    header = np.full((24, width, 3), 255, np.uint8)
    for column, text in enumerate(titles):
        cv2.putText(header, text, (column * (cell + gap) + 4, 17), _FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    parts = [header]
    for image, truth, prediction in rows:
        height = max(1, round(image.shape[0] * cell / image.shape[1]))
        pictures = [image, overlay(image, truth, colors, 0.7), overlay(image, prediction, colors, 0.7)]
        resized = [cv2.resize(picture, (cell, height), interpolation=cv2.INTER_AREA) for picture in pictures]
        space = np.full((height, gap, 3), 255, np.uint8)
        parts += [np.concatenate([resized[0], space, resized[1], space, resized[2]], 1)]
        parts += [np.full((gap, width, 3), 255, np.uint8)]
    return np.concatenate([*parts, legend(classes, colors, width)], 0)


def write_png(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """Writes RGB ``[H, W, 3]`` or a map ``[H, W]``, uint8, atomically. Raises OSError as :func:`atomic_write` does."""
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    encoded, data = cv2.imencode(".png", picture)
    if not encoded:
        raise OSError(f"cannot encode a picture of shape {list(picture.shape)} as PNG")
    atomic_write(path, data.tobytes())
