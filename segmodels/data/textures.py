"""Surfaces and light of the synthetic scenes, in integer arithmetic so that they are equal on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

Color = tuple[int, int, int]


def noise(rng: np.random.Generator, height: int, width: int, cell_height: int, cell_width: int) -> np.ndarray:
    """Smooth value noise, int16 ``[height, width]`` in -128 .. 127, with features of about the given cell."""
    grid = rng.integers(0, 256, (height // cell_height + 2, width // cell_width + 2), dtype=np.uint8)
    size = (grid.shape[1] * cell_width, grid.shape[0] * cell_height)
    # The EXACT variant is fixed-point on every platform; plain INTER_LINEAR may use whatever the processor has.
    smooth = cv2.resize(grid, size, interpolation=cv2.INTER_LINEAR_EXACT)
    return smooth[cell_height // 2 :, cell_width // 2 :][:height, :width].astype(np.int16) - 128


def _tint(color: Color, *layers: tuple[np.ndarray, int]) -> np.ndarray:
    """A colour modulated by noise layers with strengths in 1/128 of their amplitude; uint8 ``[H, W, 3]``."""
    total = sum((layer * strength) >> 7 for layer, strength in layers)
    return np.clip(np.asarray(color, np.int16) + np.asarray(total)[..., None], 0, 255).astype(np.uint8)


def _vary(rng: np.random.Generator, color: Color, spread: int) -> Color:
    red, green, blue = (int(value + rng.integers(-spread, spread + 1)) for value in color)
    return red, green, blue


def water(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Deep and shallow blue with short crests of light."""
    ripples = noise(rng, height, width, 2, 9)
    image = _tint(_vary(rng, (36, 98, 142), 12), (noise(rng, height, width, 40, 40), 22), (ripples, 16))
    crests = (ripples + noise(rng, height, width, 5, 14)) > 118
    image[crests] += np.array((46, 44, 36), np.uint8)  # stays below 256: the base leaves more headroom than that
    return image


def road(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Asphalt with grain, worn patches and a broken lane line."""
    grain = rng.integers(-64, 64, (height, width), dtype=np.int16)
    image = _tint(_vary(rng, (74, 75, 80), 8), (noise(rng, height, width, 24, 24), 16), (grain, 14))
    angle = rng.uniform(0, math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    pitch, reach = rng.uniform(22, 32), height + width
    paint = (212, 208, 190) if rng.random() < 0.7 else (214, 178, 76)
    lanes, starts = np.meshgrid(np.arange(-reach, reach, pitch), np.arange(-reach, reach, 16.0))
    along = starts[..., None] + (0, 8)
    x, y = width / 2 - lanes[..., None] * sin + along * cos, height / 2 + lanes[..., None] * cos + along * sin
    dashes = np.round(np.stack((x, y), -1)).astype(np.int32).reshape(-1, 2, 2)
    near = ((dashes > -20) & (dashes < (width + 20, height + 20))).all((1, 2))
    cv2.polylines(image, list(dashes[near]), False, paint, 2, cv2.LINE_AA)
    return image


def grass(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Meadow: patches, tufts and a few flowers."""
    grain = rng.integers(-64, 64, (height, width), dtype=np.int16)
    layers = ((noise(rng, height, width, 28, 28), 26), (noise(rng, height, width, 5, 5), 18), (grain, 24))
    image = _tint(_vary(rng, (88, 128, 56), 10), *layers)
    flowers = rng.integers(0, (height, width), (int(rng.integers(4, 26)), 2))
    image[flowers[:, 0], flowers[:, 1]] = _vary(rng, (232, 214, 120), 20)
    return image


GROUNDS: tuple[Callable[[np.random.Generator, int, int], np.ndarray], ...] = (water, road, grass)


def deck(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, Color]:
    """Paving slabs, every one a little different, and the colour of its curb. Says nothing about the ground it lies on."""
    color = _vary(rng, (172, 164, 150), 14)
    slab, shift = int(rng.integers(9, 16)), int(rng.integers(9))
    rows, columns = (np.arange(n) + shift for n in (height, width))
    tone = rng.integers(-64, 64, (height // slab + 3, width // slab + 3), dtype=np.int16)
    grain = rng.integers(-64, 64, (height, width), dtype=np.int16)
    slabs = tone[(rows // slab)[:, None], (columns // slab)[None]]
    image = _tint(color, (slabs, 16), (grain, 12), (noise(rng, height, width, 36, 36), 18))
    joints = (rows % slab == 0)[:, None] | (columns % slab == 0)[None]
    image[joints] -= 24  # the darkest slab is far above it
    red, green, blue = (value + 34 for value in color)
    return image, (red, green, blue)


def expose(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light and camera: exposure, a colour cast, a falling-off to one side, cloud shade, sensor noise."""
    height, width = image.shape[:2]
    exposure = int(rng.integers(196, 290))
    cast = rng.integers(-14, 15, 3)
    slope_y, slope_x = (int(value) for value in rng.integers(-44, 45, 2))
    ramp = slope_y * (2 * np.arange(height)[:, None] - height) // height
    ramp = ramp + slope_x * (2 * np.arange(width)[None] - width) // width
    gain = (exposure + ramp + (noise(rng, height, width, 48, 48) >> 2)).astype(np.int32)
    lit = image.astype(np.int32)
    lit *= gain[..., None] + cast.astype(np.int32)
    lit >>= 8
    lit += rng.integers(-7, 8, image.shape, dtype=np.int8)
    return np.clip(lit, 0, 255, out=lit).astype(np.uint8)
