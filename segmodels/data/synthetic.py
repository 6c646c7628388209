"""Scenes drawn on the fly, made so that context decides.

An aerial view of water, road or grass with a paved deck on it. What stands on the deck is a *boat* where the deck lies in
water, a *car* beside a road and a *tent* in grass, though the three are drawn by the same code from the same
distribution: nothing inside the outline, and nothing on the deck around it, tells them apart. The deciding ground can be
most of the picture away, so a network without a wide view has to guess (the situation that motivates image-level features
in ParseNet, arXiv:1506.04579, and ASPP, arXiv:1706.05587). Lamp posts and their wires are one to three pixels wide.

Item ``i`` depends on ``(seed, split, i)`` alone. Geometry is in fixed point and pixels are integers throughout, so that
labels and images are the same in every process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from segmodels.data import textures
from segmodels.data.dataset import IGNORE_INDEX, SegmentationDataset

SPLITS = ("train", "val", "test")
MINIMUM_SIZE = 64  # below it the deck leaves no room for ground, so that nothing would decide

_CLASSES: dict[str, tuple[int, int, int]] = {
    "water": (52, 120, 200),
    "road": (110, 110, 122),
    "grass": (92, 168, 76),
    "deck": (222, 208, 176),
    "boat": (255, 255, 255),
    "car": (230, 60, 60),
    "tent": (250, 180, 40),
    "pole": (160, 60, 220),
}
WATER, ROAD, GRASS, DECK, BOAT, CAR, TENT, POLE = range(len(_CLASSES))
_ON_GROUND = {WATER: BOAT, ROAD: CAR, GRASS: TENT}
_GROUND_SHARE = (0.4, 0.35, 0.25)  # water, road, grass: the tent is the rare one of the three

_FRACTION = 4  # fractional bits of the coordinates given to OpenCV


@dataclass
class _Sprite:
    """A thing to draw: its class and its outline's centre, direction and length in pixels."""

    label: int
    x: float
    y: float
    angle: float
    length: float

    @property
    def width(self) -> float:
        return 0.5 * self.length

    def outline(self, points: Sequence[tuple[float, float]]) -> np.ndarray:
        """Points in units of half length and half width, forward and left, to fixed-point image coordinates."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        forward, left = 0.5 * self.length, 0.5 * self.width
        return _fixed(
            [(self.x + u * forward * cos - v * left * sin, self.y + u * forward * sin + v * left * cos) for u, v in points]
        )


# Outlines, counter-clockwise from the bow: pointed, blunt, rounded. Which one is drawn is independent of the class.
_HULLS = (
    [
        (1.0, 0.0),
        (0.62, 0.62),
        (0.1, 1.0),
        (-0.85, 0.88),
        (-1.0, 0.6),
        (-1.0, -0.6),
        (-0.85, -0.88),
        (0.1, -1.0),
        (0.62, -0.62),
    ],
    [(1.0, 0.55), (0.86, 0.95), (-0.86, 0.95), (-1.0, 0.6), (-1.0, -0.6), (-0.86, -0.95), (0.86, -0.95), (1.0, -0.55)],
    [(math.cos(k * math.pi / 9), math.sin(k * math.pi / 9)) for k in range(18)],
)
_CABINS = (
    [(0.3, 0.0), (0.15, 0.55), (-0.55, 0.55), (-0.55, -0.55), (0.15, -0.55)],
    [(0.35, 0.7), (-0.45, 0.7), (-0.45, -0.7), (0.35, -0.7)],
    [(0.55, 0.0), (0.0, 0.5), (-0.55, 0.0), (0.0, -0.5)],
)
_PAINTS = (
    (214, 62, 52),
    (238, 238, 232),
    (244, 184, 44),
    (44, 92, 170),
    (60, 64, 74),
    (236, 120, 44),
    (70, 150, 120),
    (150, 80, 150),
)


class Synthetic(SegmentationDataset):
    """Scenes of 8 classes with 255 on the outlines.

    Args:
        split: "train", "val" or "test"; different scenes at the same seed.
        size: ``(height, width)`` or one number, 64 or more. Decks, the largest sprites and posts grow with it; the smallest
            sprites, the widths of posts and the textures do not. At 128 a ResNet-18 sees the whole scene without ASPP.
        length: number of scenes; 4000 for "train" and 200 for the others unless given.
        seed: of the scenes.

    Raises:
        ValueError: an option is out of range.
    """

    TITLE = "scenes drawn on the fly, no files"
    CLASSES = tuple(_CLASSES)
    COLORS = np.array(list(_CLASSES.values()), np.uint8)
    COUNTS = dict.fromkeys(SPLITS)

    def __init__(self, split: str = "train", size: int | Sequence[int] = 256, length: int | None = None, seed: int = 0):
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < MINIMUM_SIZE:
            raise ValueError(f"synthetic size is {size}; expected (height, width) of {MINIMUM_SIZE} or more")
        if length is None:
            length = 4000 if split == "train" else 200
        if length < 1:
            raise ValueError(f"synthetic length is {length}; expected 1 or more")
        if seed < 0:
            raise ValueError(f"synthetic seed is {seed}; expected 0 or more")
        super().__init__(self.CLASSES, self.COLORS, split, length)
        self.size, self.seed = (int(height), int(width)), seed

    def name(self, index: int) -> str:
        return f"{self.split}_{self.seed}_{self._check(index):05d}"

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), self._check(index)])
        return draw_scene(rng, *self.size)


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image uint8 ``[height, width, 3]`` RGB and label uint8 ``[height, width]``."""
    if rng.random() < 0.65:
        image, label, sprites = _quay(rng, height, width)
    else:
        image, label, sprites = _islands(rng, height, width)
    poles = _place_poles(rng, height, width)
    angle = rng.uniform(0, 2 * math.pi)
    sun = (math.cos(angle), math.sin(angle))
    image = _cast_shadows(image, sprites, poles, sun)
    for sprite in sorted(sprites, key=lambda s: s.length):
        _draw_sprite(rng, image, label, sprite)
    _draw_poles(rng, image, label, poles)
    return textures.expose(rng, image), label


def _quay(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray, list[_Sprite]]:
    """One ground, seen only along one side; the deck fills the rest. The far view decides."""
    ground = _pick_ground(rng)
    image = textures.GROUNDS[ground](rng, height, width)
    label = np.full((height, width), ground, np.uint8)
    deck, joint = textures.deck(rng, height, width)

    # In coordinates turned so that the ground lies at the far end of the u axis; the extent covers the image at any angle.
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    extent = 0.5 * (abs(cos) * width + abs(sin) * height)
    # Seen cornerwise, a strip of equal depth would show much less ground.
    depth = rng.uniform(0.2, 0.32) + 0.12 * abs(math.sin(2 * angle))
    edge = extent - depth * min(height, width)
    jag = rng.uniform(0, 0.1) * min(height, width)
    wide = float(height + width)
    steps = np.linspace(-0.5 * wide, 0.5 * wide, int(rng.integers(9, 15)))
    quay = [(-wide, -0.5 * wide)]
    for start, stop in itertools.pairwise(steps.tolist()):
        recess = jag * rng.random()
        quay += [(edge + recess, start), (edge + recess, stop)]
    quay.append((-wide, 0.5 * wide))
    outline = _fixed([(0.5 * width + u * cos - v * sin, 0.5 * height + u * sin + v * cos) for u, v in quay])
    _lay(image, label, outline, deck, joint)

    sprites: list[_Sprite] = []
    if rng.random() < 0.3:  # one giant, wider than a small receptive field
        length = rng.uniform(0.45, 0.75) * min(height, width)
        u, v = -extent * rng.uniform(0.1, 0.4), rng.uniform(-0.2, 0.2) * min(height, width)
        x, y = 0.5 * width + u * cos - v * sin, 0.5 * height + u * sin + v * cos
        sprites.append(_Sprite(_ON_GROUND[ground], x, y, rng.uniform(0, 2 * math.pi), length))
    _scatter(rng, sprites, label, ground, count=int(rng.integers(2, 6)), longest=0.42 * min(height, width))
    return image, label, sprites


def _islands(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray, list[_Sprite]]:
    """Two grounds along a winding line, each with a small deck in it. The nearer of the two grounds decides."""
    first = _pick_ground(rng)
    second = (first + int(rng.integers(1, 3))) % 3
    image = textures.GROUNDS[first](rng, height, width)
    label = np.full((height, width), first, np.uint8)
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    wide = float(height + width)
    sway, phase, wave = rng.uniform(3, 9), rng.uniform(0, 2 * math.pi), rng.uniform(50, 110)
    shore = [(sway * math.sin(phase + v / wave * 2 * math.pi), v) for v in np.linspace(-0.5 * wide, 0.5 * wide, 41)]
    shore += [(wide, 0.5 * wide), (wide, -0.5 * wide)]
    x0, y0 = width * rng.uniform(0.42, 0.58), height * rng.uniform(0.42, 0.58)
    outline = _fixed([(x0 + u * cos - v * sin, y0 + u * sin + v * cos) for u, v in shore])
    _lay(image, label, outline, textures.GROUNDS[second](rng, height, width), (206, 196, 160), second)

    deck, joint = textures.deck(rng, height, width)
    sprites: list[_Sprite] = []
    for ground, side in ((first, -1.0), (second, 1.0)):
        half = rng.uniform(0.15, 0.23) * min(height, width)
        distance = side * (half + sway + rng.uniform(2, 0.12 * min(height, width)))
        along = rng.uniform(-0.28, 0.28) * min(height, width)
        x, y = x0 + distance * cos - along * sin, y0 + distance * sin + along * cos
        corners = 4 if rng.random() < 0.5 else 16
        turn = angle + (math.pi / 4 if corners == 4 else 0)
        ring = [2 * math.pi * k / corners + turn for k in range(corners)]
        _lay(image, label, _fixed([(x + half * math.cos(a), y + half * math.sin(a)) for a in ring]), deck, joint)
        length = half * rng.uniform(0.6, 1.2)
        sprites.append(_Sprite(_ON_GROUND[ground], x, y, rng.uniform(0, 2 * math.pi), length))
        _scatter(rng, sprites, label, ground, count=int(rng.integers(0, 2)), longest=0.3 * min(height, width), only=ground)
    return image, label, sprites


def _pick_ground(rng: np.random.Generator) -> int:
    return int(np.searchsorted(np.cumsum(_GROUND_SHARE), rng.random(), side="right"))


def _lay(
    image: np.ndarray,
    label: np.ndarray,
    outline: np.ndarray,
    texture: np.ndarray,
    curb: tuple[int, int, int],
    value: int = DECK,
) -> None:
    """Fills an outline with a texture and a class; its border is a curb in the image and void in the label."""
    mask = np.zeros(label.shape, np.uint8)
    cv2.fillPoly(mask, [outline], 255, cv2.LINE_8, _FRACTION)
    cv2.copyTo(texture, mask, image)
    cv2.polylines(image, [outline], True, curb, 2, cv2.LINE_AA, _FRACTION)
    cv2.fillPoly(label, [outline], value, cv2.LINE_8, _FRACTION)
    cv2.polylines(label, [outline], True, IGNORE_INDEX, 2, cv2.LINE_8, _FRACTION)


def _scatter(
    rng: np.random.Generator,
    sprites: list[_Sprite],
    label: np.ndarray,
    ground: int,
    count: int,
    longest: float,
    only: int | None = None,
) -> None:
    """Adds sprites of 8 pixels to ``longest`` where they touch no other; ``only`` restricts their centres to one class."""
    height, width = label.shape
    for _ in range(count):
        length = 8 * (longest / 8) ** rng.random()
        for _ in range(8):
            x, y = rng.uniform(0.04, 0.96) * width, rng.uniform(0.04, 0.96) * height
            clear = all(math.hypot(x - s.x, y - s.y) > 0.55 * (length + s.length) for s in sprites)
            if clear and only in (None, int(label[int(y), int(x)])):
                sprites.append(_Sprite(_ON_GROUND[ground], x, y, rng.uniform(0, 2 * math.pi), length))
                break


def _draw_sprite(rng: np.random.Generator, image: np.ndarray, label: np.ndarray, sprite: _Sprite) -> None:
    kind = int(rng.integers(len(_HULLS)))
    paint, trim = (_PAINTS[int(k)] for k in rng.choice(len(_PAINTS), 2, replace=False))
    hull, cabin = sprite.outline(_HULLS[kind]), sprite.outline(_CABINS[kind])
    dark = tuple(value * 5 // 9 for value in paint)
    cv2.fillPoly(image, [hull], paint, cv2.LINE_AA, _FRACTION)
    if sprite.length >= 14:
        stripe = sprite.outline([(0.8, 0.16), (-0.95, 0.16), (-0.95, -0.16), (0.8, -0.16)])
        cv2.fillPoly(image, [stripe], trim, cv2.LINE_AA, _FRACTION)
    cv2.fillPoly(image, [cabin], tuple(value * 3 // 4 for value in trim), cv2.LINE_AA, _FRACTION)
    if sprite.length >= 20:
        cv2.polylines(image, [cabin], True, dark, 1, cv2.LINE_AA, _FRACTION)
    cv2.polylines(image, [hull], True, dark, 1, cv2.LINE_AA, _FRACTION)
    cv2.polylines(label, [hull], True, IGNORE_INDEX, 3, cv2.LINE_8, _FRACTION)
    cv2.fillPoly(label, [hull], sprite.label, cv2.LINE_8, _FRACTION)


@dataclass
class _Pole:
    """A lamp post seen from above at a slant: foot, head and lamp radius in pixels, and the thickness given to OpenCV,
    which draws 1 as one pixel and 2 as three."""

    foot: tuple[float, float]
    head: tuple[float, float]
    width: int
    lamp: float


def _place_poles(rng: np.random.Generator, height: int, width: int) -> list[_Pole]:
    count = int(rng.integers(1, 4)) if rng.random() < 0.75 else 0
    size = min(height, width)
    lean = rng.uniform(-0.5, 0.5)  # all posts of a scene lean the same way, as from one camera
    poles = []
    for _ in range(count):
        x, y = width * rng.uniform(0.08, 0.92), height * rng.uniform(0.4, 0.98)
        length = size * rng.uniform(0.25, 0.5)
        head = (x + length * math.sin(lean), y - length * math.cos(lean))
        poles.append(_Pole((x, y), head, int(rng.integers(1, 3)), size * rng.uniform(0.025, 0.055)))
    return sorted(poles, key=lambda pole: pole.head[0])


def _draw_poles(rng: np.random.Generator, image: np.ndarray, label: np.ndarray, poles: list[_Pole]) -> None:
    steel = 36 + int(rng.integers(24))
    lines = [(_fixed([pole.foot, pole.head]), pole.width) for pole in poles]
    if rng.random() < 0.5:
        for left, right in itertools.pairwise(poles):
            sag = 0.12 * math.hypot(right.head[0] - left.head[0], right.head[1] - left.head[1])
            wire = [
                (
                    left.head[0] + t * (right.head[0] - left.head[0]),
                    left.head[1] + t * (right.head[1] - left.head[1]) + 4 * sag * t * (1 - t),
                )
                for t in np.linspace(0, 1, 13)
            ]
            lines.append((_fixed(wire), 1))
    lamps = [(_fixed([pole.head])[0], round(pole.lamp * 2**_FRACTION)) for pole in poles]
    for line, thickness in lines:
        cv2.polylines(label, [line], False, IGNORE_INDEX, thickness + 2, cv2.LINE_8, _FRACTION)
    for centre, radius in lamps:
        cv2.circle(label, centre.tolist(), radius + 2**_FRACTION, IGNORE_INDEX, -1, cv2.LINE_8, _FRACTION)
    for line, thickness in lines:
        cv2.polylines(image, [line], False, (steel, steel, steel + 8), thickness, cv2.LINE_AA, _FRACTION)
        cv2.polylines(label, [line], False, POLE, thickness, cv2.LINE_8, _FRACTION)
    for centre, radius in lamps:
        cv2.circle(image, centre.tolist(), radius, (steel, steel, steel + 8), -1, cv2.LINE_AA, _FRACTION)
        cv2.circle(image, centre.tolist(), radius * 5 // 8, (255, 240, 190), -1, cv2.LINE_AA, _FRACTION)
        cv2.circle(label, centre.tolist(), radius, POLE, -1, cv2.LINE_8, _FRACTION)


def _cast_shadows(image: np.ndarray, sprites: list[_Sprite], poles: list[_Pole], sun: tuple[float, float]) -> np.ndarray:
    shade = np.zeros(image.shape[:2], np.uint8)
    for sprite in sprites:
        reach = 1.5 + 0.07 * sprite.length
        moved = _Sprite(sprite.label, sprite.x + reach * sun[0], sprite.y + reach * sun[1], sprite.angle, sprite.length)
        cv2.fillPoly(shade, [moved.outline(_HULLS[1])], 255, cv2.LINE_AA, _FRACTION)
    for pole in poles:
        length = 0.6 * math.hypot(pole.head[0] - pole.foot[0], pole.head[1] - pole.foot[1])
        tip = (pole.foot[0] + length * sun[0], pole.foot[1] + length * sun[1])
        cv2.polylines(shade, [_fixed([pole.foot, tip])], False, 255, pole.width, cv2.LINE_AA, _FRACTION)
    gain = 256 - ((shade.astype(np.uint16) * 100) >> 8)
    return ((image * gain[..., None]) >> 8).astype(np.uint8)


def _fixed(points: Sequence[tuple[float, float]]) -> np.ndarray:
    return np.round(np.asarray(points, np.float64) * 2**_FRACTION).astype(np.int32)
