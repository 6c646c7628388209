"""Augmentation of an image with its label map.

Every transform is a callable ``(image, label, rng) -> (image, label)`` on ``uint8 [H, W, 3]`` RGB and ``uint8 [H, W]``.
All randomness comes from ``rng``, a ``numpy.random.Generator``, so equal generators give equal bits. Images are
resampled bilinearly, labels by the nearest neighbour on the same (half-pixel centred) grid. New pixels are the ImageNet
mean in the image (zero after normalisation) and 255 in the label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch

from segmodels.data.dataset import IGNORE_INDEX

Pair = tuple[np.ndarray, np.ndarray]
Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], Pair]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)


def _size(size: int | Sequence[int], what: str) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"{what} is {size}; expected positive (height, width)")
    return int(height), int(width)


def _resize(image: np.ndarray, label: np.ndarray, height: int, width: int) -> Pair:
    if label.shape == (height, width):
        return image, label
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    # INTER_NEAREST takes the top-left source pixel, half a pixel off INTER_LINEAR's grid; the EXACT one shares it.
    return image, cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _pad(image: np.ndarray, label: np.ndarray, top: int, bottom: int, left: int, right: int) -> Pair:
    if not (top or bottom or left or right):
        return image, label
    image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=FILL)
    return image, cv2.copyMakeBorder(label, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(IGNORE_INDEX,))


class Compose:
    """Applies transforms one after the other."""

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = list(transforms)

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        for transform in self.transforms:
            image, label = transform(image, label, rng)
        return image, label

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.transforms))})"


class Resize:
    """Resizes to a fixed ``(height, width)``, ignoring the aspect ratio."""

    def __init__(self, size: int | Sequence[int]):
        self.height, self.width = _size(size, "Resize size")

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        return _resize(image, label, self.height, self.width)

    def __repr__(self) -> str:
        return f"Resize(({self.height}, {self.width}))"


class RandomScale:
    """Resizes by a random factor, aspect ratio kept (Chen et al. 2017, arXiv:1706.05587, section 4: 0.5 to 2.0).

    Args:
        minimum, maximum: bounds of the factor.
        step: draw from ``minimum, minimum + step, .. maximum`` instead of from the whole interval.
    """

    def __init__(self, minimum: float = 0.5, maximum: float = 2.0, step: float | None = None):
        if not 0 < minimum <= maximum or (step is not None and step <= 0):
            given = f"RandomScale({minimum}, {maximum}, step={step})"
            raise ValueError(f"{given}: expected 0 < minimum <= maximum and step > 0")
        self.minimum, self.maximum, self.step = minimum, maximum, step

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        if self.step is None:
            factor = float(rng.uniform(self.minimum, self.maximum))
        else:
            # 1e-6: the quotient may come out just below a whole number, which would lose the maximum itself.
            steps = int((self.maximum - self.minimum) / self.step + 1e-6)
            factor = self.minimum + self.step * int(rng.integers(steps + 1))
        height, width = label.shape
        return _resize(image, label, max(1, round(height * factor)), max(1, round(width * factor)))

    def __repr__(self) -> str:
        return f"RandomScale({self.minimum}, {self.maximum}, step={self.step})"


class RandomCrop:
    """Cuts a window of exactly ``size`` at a random place; a smaller image is padded, on random sides, so that the
    position of the padding tells the network nothing.

    Args:
        size: ``(height, width)`` or one number.
        cat_max_ratio: draw again (``ATTEMPTS`` in all) while one class covers at least this share of the labelled
            pixels of the window; 1 takes the first.
    """

    ATTEMPTS = 10

    def __init__(self, size: int | Sequence[int], cat_max_ratio: float = 1.0):
        self.height, self.width = _size(size, "RandomCrop size")
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f"RandomCrop cat_max_ratio is {cat_max_ratio}; expected 0 < ratio <= 1")
        self.cat_max_ratio = cat_max_ratio

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        rows, columns = max(0, self.height - label.shape[0]), max(0, self.width - label.shape[1])
        above, left = int(rng.integers(rows + 1)), int(rng.integers(columns + 1))
        # Crop before padding, so that a wide image in a tall window is not padded where it is thrown away.
        attempts = self.ATTEMPTS if self.cat_max_ratio < 1 else 1
        for _ in range(attempts):
            top = int(rng.integers(max(0, label.shape[0] - self.height) + 1))
            start = int(rng.integers(max(0, label.shape[1] - self.width) + 1))
            window = np.s_[top : top + self.height, start : start + self.width]
            if attempts == 1 or self._varied(label[window]):
                break
        return _pad(image[window], label[window], above, rows - above, left, columns - left)

    def _varied(self, label: np.ndarray) -> bool:
        counts = np.bincount(label[label != IGNORE_INDEX])
        return counts.size > 0 and counts.max() < self.cat_max_ratio * counts.sum()

    def __repr__(self) -> str:
        return f"RandomCrop(({self.height}, {self.width}), cat_max_ratio={self.cat_max_ratio})"


class RandomFlip:
    """Mirrors left and right with the given probability."""

    def __init__(self, probability: float = 0.5):
        if not 0 <= probability <= 1:
            raise ValueError(f"RandomFlip probability is {probability}; expected 0 to 1")
        self.probability = probability

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        if rng.random() >= self.probability:
            return image, label
        return cv2.flip(image, 1), cv2.flip(label, 1)

    def __repr__(self) -> str:
        return f"RandomFlip({self.probability})"


class RandomRotation:
    """Rotates about the centre by an angle drawn from ``-degrees .. degrees``, with the given probability (PSPNet, Zhao et al.
    2017, arXiv:1612.01105, section 5.1: 10 degrees). The size stays; what comes in from outside is new."""

    def __init__(self, degrees: float = 10.0, probability: float = 0.5):
        if not 0 <= degrees <= 180:
            raise ValueError(f"RandomRotation degrees is {degrees}; expected 0 to 180")
        if not 0 <= probability <= 1:
            raise ValueError(f"RandomRotation probability is {probability}; expected 0 to 1")
        self.degrees, self.probability = degrees, probability

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        if rng.random() >= self.probability:
            return image, label
        height, width = label.shape
        center = (width - 1) / 2, (height - 1) / 2
        turn = cv2.getRotationMatrix2D(center, float(rng.uniform(-self.degrees, self.degrees)), 1.0)
        image = cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_LINEAR, borderValue=FILL)
        label = cv2.warpAffine(label, turn, (width, height), flags=cv2.INTER_NEAREST, borderValue=(IGNORE_INDEX,))
        return image, label

    def __repr__(self) -> str:
        return f"RandomRotation({self.degrees}, {self.probability})"


class RandomBlur:
    """Blurs the image with a Gaussian of 5 x 5 pixels (standard deviation 1.1), with the given probability (PSPNet, as
    :class:`RandomRotation`). Labels stay."""

    def __init__(self, probability: float = 0.5):
        if not 0 <= probability <= 1:
            raise ValueError(f"RandomBlur probability is {probability}; expected 0 to 1")
        self.probability = probability

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        if rng.random() >= self.probability:
            return image, label
        return cv2.GaussianBlur(image, (5, 5), 1.1), label

    def __repr__(self) -> str:
        return f"RandomBlur({self.probability})"


class ColorJitter:
    """Multiplies brightness, contrast (about the image's mean grey) and saturation by factors drawn from
    ``1 - x .. 1 + x``. Labels stay."""

    def __init__(self, brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2):
        for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            if not 0 <= value <= 1:
                raise ValueError(f"ColorJitter {name} is {value}; expected 0 to 1")
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        brightness, contrast, saturation = (
            1 + x * float(rng.uniform(-1, 1)) for x in (self.brightness, self.contrast, self.saturation)
        )
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        # Brightness and contrast are one straight line per pixel value: a table of 256 entries instead of float images.
        offset = brightness * float(grey.mean()) * (1 - contrast)
        table = np.clip(np.arange(256) * (brightness * contrast) + offset + 0.5, 0, 255).astype(np.uint8)
        image, grey = cv2.LUT(image, table), cv2.LUT(grey, table)
        return cv2.addWeighted(image, saturation, cv2.merge([grey] * 3), 1 - saturation, 0), label

    def __repr__(self) -> str:
        return f"ColorJitter({self.brightness}, {self.contrast}, {self.saturation})"


class PadTo:
    """Pads at the bottom and the right up to ``size``, or to the next multiples of ``multiple``. Larger images stay."""

    def __init__(self, size: int | Sequence[int] | None = None, *, multiple: int | None = None):
        if (size is None) == (multiple is None):
            raise ValueError(f"PadTo(size={size}, multiple={multiple}): expected exactly one of the two")
        self.size = None if size is None else _size(size, "PadTo size")
        self.multiple = None if multiple is None else _size(multiple, "PadTo multiple")[0]

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
        height, width = label.shape
        if self.size is not None:
            bottom, right = max(0, self.size[0] - height), max(0, self.size[1] - width)
        else:
            bottom, right = -height % self.multiple, -width % self.multiple
        return _pad(image, label, 0, bottom, 0, right)

    def __repr__(self) -> str:
        return f"PadTo({self.size}, multiple={self.multiple})"


def to_tensor(
    image: np.ndarray,
    label: np.ndarray,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(image / 255 - mean) / std`` as float32 ``[3, H, W]`` and the label as int64 ``[H, W]``, both contiguous."""
    scale = np.float32(1 / 255) / np.asarray(std, np.float32)
    offset = -np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    planes = np.empty((3, *label.shape), np.float32)
    for channel in range(3):
        np.multiply(image[..., channel], scale[channel], out=planes[channel])
        planes[channel] += offset[channel]
    return torch.from_numpy(planes), torch.from_numpy(label.astype(np.int64))
