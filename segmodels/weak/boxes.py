"""From boxes to label maps, once and for all before training: Bbox-Rect and Bbox-Seg (Papandreou et al. 2015,
arXiv:1502.02734, section 3.3)."""

from __future__ import annotations

import functools

import numpy as np
import torch

from segmodels.refine import DenseCRF, unary_from_probabilities
from segmodels.weak.annotations import Annotation, Box

# Bbox-Seg: the part of a box that counts as its object, how sure each part is of it, and what is added per larger box around it.
# The paper calls the middle object and the outside background, and searches the rest on images with label maps. The rest is surer
# than half here: else the sure background around a box takes most of its object.
CORE_SHARE = 0.25
CORE, REST, NESTED = 1.0, 0.7, 0.1
SMALLEST_AREA, SMALLEST_SIDE = 121, 10  # of a box that has a core; a smaller one is core throughout


def rectangles(annotation: Annotation, background: int) -> np.ndarray:
    """Bbox-Rect: every box filled with its class, smaller boxes over larger ones; uint8 ``[H, W]``."""
    label = np.full(annotation.size, background, np.uint8)
    for box in _by_area(annotation):
        label[_inside(box)] = box[0]
    return label


def segments(annotation: Annotation, background: int, image: np.ndarray, crf: DenseCRF | None = None) -> np.ndarray:
    """Bbox-Seg: a dense CRF decides inside the boxes, which trust the middle of a box most.

    Args:
        annotation, background: what is known.
        image: uint8 ``[H, W, 3]`` RGB.
        crf: by default the one that the paper's authors released for it.

    Returns:
        uint8 ``[H, W]``; a class occurs only inside its own boxes, and outside all of them there is background.
    """
    if not annotation.boxes:
        return np.full(annotation.size, background, np.uint8)
    classes, probabilities, allowed = _evidence(annotation, background)
    unary = unary_from_probabilities(torch.from_numpy(probabilities)[None])
    colours = torch.from_numpy(image).permute(2, 0, 1)[None]
    marginals = (crf or _default_crf())(unary, colours)[0].numpy()
    # Argmax among the allowed: a strong CRF may carry a class over the edge of its box.
    return classes[np.where(allowed, marginals, -1.0).argmax(0)]


@functools.cache
def _default_crf() -> DenseCRF:
    return DenseCRF.preset("bbox_to_labels")  # one object, as it keeps the lattice of the positions


def _evidence(annotation: Annotation, background: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The K classes of the image, background first, uint8; their probabilities before the CRF, float32 ``[K, H, W]``; and where
    each may be, bool ``[K, H, W]``."""
    classes = np.array([background, *sorted({box[0] for box in annotation.boxes})], np.uint8)
    total = np.zeros((len(classes), *annotation.size), np.float32)
    allowed = np.zeros(total.shape, bool)
    allowed[0] = True
    larger: list[Box] = []
    for box in _by_area(annotation):
        row, inside = int(np.flatnonzero(classes[1:] == box[0])[0]) + 1, _inside(box)
        sure = np.full(annotation.size, 0.0, np.float32)
        sure[inside] = REST
        # An object in front of larger ones needs more trust to be seen.
        sure[_inside(_core(box))] = CORE + NESTED * sum(_overlap(box, other) for other in larger)
        total[row] += sure
        total[0][inside] += np.maximum(1 - sure[inside], 0)
        allowed[row][inside] = True
        larger.append(box)
    total[0][total.sum(0) == 0] = 1  # outside all boxes
    return classes, total / total.sum(0), allowed


def _by_area(annotation: Annotation) -> list[Box]:
    """Largest first, in the order of the file where equal."""
    return sorted(annotation.boxes, key=lambda box: -(box[3] - box[1]) * (box[4] - box[2]))


def _inside(box: Box) -> tuple[slice, slice]:
    return np.s_[box[2] : box[4], box[1] : box[3]]


def _core(box: Box) -> Box:
    """The box less as many rims of one pixel as it takes to leave less than ``CORE_SHARE`` of its area."""
    label, left, top, right, bottom = box
    width, height = right - left, bottom - top
    if width * height < SMALLEST_AREA or min(width, height) < SMALLEST_SIDE:
        return box
    rim = 0
    while (width - 2 * rim) * (height - 2 * rim) >= CORE_SHARE * width * height and min(width, height) - 2 * rim > 2:
        rim += 1
    return label, left + rim, top + rim, right - rim, bottom - rim


def _overlap(one: Box, other: Box) -> bool:
    return max(one[1], other[1]) < min(one[3], other[3]) and max(one[2], other[2]) < min(one[4], other[4])
