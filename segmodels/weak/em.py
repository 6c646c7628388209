"""The E-steps of Papandreou et al. 2015 (arXiv:1502.02734, section 3): from the scores of a network and what is known of an
image to the label map that training takes for the truth in this step.

All functions take scores ``[N, C, H, W]`` of any floating-point type and an int64 map ``[N, H, W]`` in which 255 marks pixels to
be left alone (padding), and return int64 ``[N, H, W]`` with 255 at the same places. They do not change the scores: the loss is
taken on the unbiased ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORE_INDEX = 255
ROUNDS = 5


@torch.no_grad()
def em_fixed(
    scores: Tensor,
    known: Tensor,
    present: Tensor,
    *,
    background: int | None = 0,
    background_bias: float = 1.0,
    foreground_bias: float = 2.0,
    exclude_absent: bool = True,
) -> Tensor:
    """EM-Fixed (section 3.2): a constant is added to the scores of the classes that are present.

    Args:
        scores, known: see the module.
        present: bool ``[N, C]``, the classes in each image, background included.
        background: the class that gets ``background_bias``, or None.
        exclude_absent: other classes cannot be chosen at all; False: they only lack the constant, as in the paper.
    """
    _check(scores, known, present, exclude_absent)
    bias = torch.full((scores.shape[1],), foreground_bias, device=scores.device)
    if background is not None:
        bias[background] = background_bias
    bonus = torch.where(present, bias, -math.inf if exclude_absent else 0.0)
    return _ignore((scores.float() + bonus[:, :, None, None]).argmax(1), known)


@torch.no_grad()
def em_adapt(
    scores: Tensor,
    known: Tensor,
    present: Tensor,
    *,
    background: int | None = 0,
    background_portion: float = 0.4,
    foreground_portion: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """EM-Adapt (section 3.2): constants per image and class, just as large as it takes for every class that is present to
    cover its portion of the image.

    As in the released system, five rounds raise the classes one after the other, the background first and the others in random
    order. What later classes have taken back after that is settled pixel by pixel, so that portions are reached exactly; where
    they add up to more than the image they are scaled down to it.

    Args:
        scores, known, present, background: as in :func:`em_fixed`.
        background_portion, foreground_portion: of the pixels that are not 255, 0 to 1.
        generator: of the random order, on the CPU.
    """
    _check(scores, known, present, True)
    labels = torch.full_like(known, IGNORE_INDEX)
    for index in range(len(scores)):
        valid = known[index] != IGNORE_INDEX
        classes = present[index].nonzero()[:, 0]
        own = scores[index].float()[classes][:, valid]  # [present classes, pixels]
        first = [] if background is None else (classes == background).nonzero()[:, 0].tolist()
        portions = [background_portion if row in first else foreground_portion for row in range(len(classes))]
        needed = _counts(portions, own.shape[1])
        others = [row for row in range(len(classes)) if row not in first]
        if own.shape[1]:
            for _ in range(ROUNDS):
                shuffled = torch.randperm(len(others), generator=generator).tolist()
                for row in first + [others[place] for place in shuffled]:
                    if needed[row]:
                        own[row] += (own.amax(0) - own[row]).kthvalue(needed[row]).values
            labels[index, valid] = classes[_settle(own, needed)]
    return labels


@torch.no_grad()
def bbox_em_fixed(
    scores: Tensor,
    known: Tensor,
    *,
    background: int = 0,
    background_bias: float = 5.0,
    foreground_bias: float = 6.0,
    exclude_absent: bool = True,
) -> Tensor:
    """Bbox-EM-Fixed (section 3.3): inside a box, constants are added to the scores of its class and of the background; outside,
    to the background's alone.

    Args:
        scores: see the module.
        known: the classes of the boxes, the background outside of them (:func:`segmodels.weak.boxes.rectangles`).
        exclude_absent: other classes cannot be chosen at all; False: they only lack the constant, as in the paper.
    """
    _check(scores, known, None, exclude_absent)
    inside = known.where(known != IGNORE_INDEX, background)[:, None]
    bonus = torch.full(scores.shape, -math.inf if exclude_absent else 0.0, device=scores.device)
    bonus.scatter_(1, inside, foreground_bias)
    bonus[:, background] = background_bias
    return _ignore((scores.float() + bonus).argmax(1), known)


def _counts(portions: list[float], pixels: int) -> list[int]:
    """Pixels per class: the portions rounded up, or scaled down and cut off where that is more than there are."""
    counts = [math.ceil(portion * pixels - 1e-6) for portion in portions]  # 0.2 * 15 is a little above 3
    if sum(counts) > pixels:
        scale = min(1.0, 1 / sum(portions))
        counts = [int(portion * scale * pixels) for portion in portions]
    return counts


def _settle(scores: Tensor, needed: list[int]) -> Tensor:
    """Argmax int64 ``[P]`` of ``[K, P]``; then every class that is short of its ``needed`` pixels (in all no more than P) takes,
    in turn, those that lose the least score, from classes that can spare them."""
    labels = scores.argmax(0)
    counts = torch.bincount(labels, minlength=len(needed)).tolist()
    for row, need in enumerate(needed):
        missing = need - counts[row]
        if missing <= 0:
            continue
        cost = scores.gather(0, labels[None])[0] - scores[row]
        spare = []
        for donor, surplus in enumerate(have - want for have, want in zip(counts, needed, strict=True)):
            if surplus > 0 and donor != row:
                pixels = (labels == donor).nonzero()[:, 0]
                spare.append(pixels[cost[pixels].argsort(stable=True)[:surplus]])
        pool = torch.cat(spare)
        taken = pool[cost[pool].argsort(stable=True)[:missing]]
        for donor, count in enumerate(torch.bincount(labels[taken], minlength=len(needed)).tolist()):
            counts[donor] -= count
        labels[taken] = row
        counts[row] = need
    return labels


def _ignore(labels: Tensor, known: Tensor) -> Tensor:
    return labels.where(known != IGNORE_INDEX, IGNORE_INDEX)


def _check(scores: Tensor, known: Tensor, present: Tensor | None, exclude_absent: bool) -> None:
    if scores.dim() != 4 or not scores.is_floating_point() or known.shape != (scores.shape[0], *scores.shape[2:]):
        raise ValueError(
            f"scores of shape {list(scores.shape)}, {scores.dtype}, with a map of shape {list(known.shape)}: expected "
            "floating-point [N, C, H, W] and [N, H, W]"
        )
    if present is None:
        return
    if present.dtype != torch.bool or present.shape != scores.shape[:2]:
        raise ValueError(f"present of shape {list(present.shape)}, {present.dtype}: expected bool {list(scores.shape[:2])}")
    if exclude_absent and not bool(present.any(1).all()):
        image = int((~present.any(1)).nonzero()[0])
        raise ValueError(f"image {image} of the batch has no class that is present: expected one or more")
