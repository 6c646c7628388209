"""The E-steps: what they promise about any scores, and what they are worth in training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segmodels.weak import bbox_em_fixed, em_adapt, em_fixed

IGNORE = 255


@st.composite
def problems(draw):
    """Scores (with ties, constant maps and outliers), a map of ignored pixels and the classes that are present."""
    images, classes = draw(st.integers(1, 2)), draw(st.integers(2, 6))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(images, classes, height, width, generator=generator) * draw(st.sampled_from([0.0, 1.0, 100.0]))
    if draw(st.booleans()):
        scores = scores.round()
    if draw(st.booleans()):
        scores = scores.bfloat16().contiguous(memory_format=torch.channels_last)
    known = torch.zeros(images, height, width, dtype=torch.long)
    known[torch.rand(known.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = IGNORE
    present = torch.rand(images, classes, generator=generator) < 0.5
    present[:, 0] = True
    return scores, known, present, generator


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([(0.4, 0.2), (0.0, 1.0), (1.0, 0.0), (0.3, 0.35)]), st.booleans())
def test_em_adapt_reaches_portions_and_never_chooses_absent_classes(problem, portions, has_background) -> None:
    scores, known, present, generator = problem
    before = scores.clone()
    background = 0 if has_background else None
    labels = em_adapt(
        scores, known, present, background=background, background_portion=portions[0], foreground_portion=portions[1],
        generator=generator,
    )  # fmt: skip
    assert torch.equal(scores, before)
    assert torch.equal(labels == IGNORE, known == IGNORE)
    for label, row in zip(labels, present, strict=True):
        chosen = label[label != IGNORE]
        classes = row.nonzero()[:, 0].tolist()
        assert set(chosen.tolist()) <= set(classes)
        wanted = [portions[0] if c == background else portions[1] for c in classes]
        scale = min(1.0, 1 / max(sum(wanted), 1e-9))
        for c, portion in zip(classes, wanted, strict=True):
            # Portions that fill the image are whole pixels only where their sizes are: one pixel of rounding.
            assert int((chosen == c).sum()) > portion * scale * len(chosen) - 1


def test_em_adapt_reaches_portions_to_the_pixel_where_there_is_room() -> None:
    scores = torch.randn(1, 5, 10, 15)
    scores[:, 4] += 50  # a class that is absent, and very sure
    scores[:, 3] -= 50  # one that is present, and very unsure
    present = torch.tensor([[True, False, True, True, False]])
    labels = em_adapt(scores, torch.zeros(1, 10, 15, dtype=torch.long), present, generator=torch.Generator().manual_seed(3))
    counts = torch.bincount(labels.flatten(), minlength=5).tolist()
    assert counts[0] >= 60
    assert counts[2] >= 30
    assert counts[3] == 30, "no more than it takes"
    assert counts[1] == counts[4] == 0


def test_em_adapt_leaves_scores_alone_that_satisfy_the_portions() -> None:
    # a third of the image each, by a wide margin
    truth = torch.arange(9)[:, None].expand(9, 6) // 3
    scores = nn.functional.one_hot(truth, 3).permute(2, 0, 1)[None] * 8.0 + torch.rand(1, 3, 9, 6)
    labels = em_adapt(scores, torch.zeros(1, 9, 6, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool), background_portion=0.3)
    assert torch.equal(labels[0], truth)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_em_fixed_never_chooses_absent_classes(problem) -> None:
    scores, known, present, _ = problem
    labels = em_fixed(scores, known, present)
    assert torch.equal(labels == IGNORE, known == IGNORE)
    assert bool(present.gather(1, labels.where(known != IGNORE, 0).flatten(1)).all())
    # with no bias between them, the best of the present classes
    plain = em_fixed(scores, known, present, background_bias=1.0, foreground_bias=1.0)
    best = scores.float().masked_fill(~present[:, :, None, None], -math.inf).add(1.0).argmax(1)
    assert torch.equal(plain[known != IGNORE], best[known != IGNORE])


@settings(max_examples=30, deadline=None)
@given(problems())
def test_bbox_em_fixed_stays_inside_the_boxes(problem) -> None:
    scores, known, _, generator = problem
    boxes = torch.randint(0, scores.shape[1], known.shape, generator=generator).where(known != IGNORE, IGNORE)
    labels = bbox_em_fixed(scores, boxes)
    assert torch.equal(labels == IGNORE, boxes == IGNORE)
    assert bool(((labels == boxes) | (labels == 0)).all()), "the class of the box, or background"
    own = scores.float().gather(1, boxes.where(boxes != IGNORE, 0)[:, None])[:, 0] + 6
    inside = (boxes != IGNORE) & (boxes != 0) & (own != scores[:, 0].float() + 5)
    assert torch.equal((labels == boxes)[inside], (own > scores[:, 0].float() + 5)[inside])


def test_absent_classes_may_win_where_the_paper_lets_them() -> None:
    scores = torch.tensor([0.0, 0.0, 9.0])[None, :, None, None]
    known = torch.zeros(1, 1, 1, dtype=torch.long)
    present = torch.tensor([[True, True, False]])
    assert em_fixed(scores, known, present).item() == 1
    assert em_fixed(scores, known, present, exclude_absent=False).item() == 2
    assert bbox_em_fixed(scores, known).item() == 0
    assert bbox_em_fixed(scores, known, exclude_absent=False).item() == 2


def test_bad_arguments() -> None:
    scores, known = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"map of shape \[2, 4, 4\]"):
        bbox_em_fixed(scores, known[:, :, :4])
    with pytest.raises(ValueError, match=r"present of shape \[2, 4\]"):
        em_adapt(scores, known, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="image 1 of the batch has no class"):
        em_fixed(scores, known, torch.tensor([[True, False, False], [False, False, False]]))


@pytest.mark.parametrize("method", ["em_adapt", "em_fixed", "bbox_em_fixed"])
def test_em_lowers_the_loss(method) -> None:
    """E- and M-steps in turn on two tones and noise: the loss falls, and EM-Adapt finds what the tags do not say, where."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(4, 12, 12, dtype=torch.long)
    truth[:2, 3:8, 2:7], truth[2:, 5:10, 4:9] = 1, 2
    images = torch.stack([truth == 1, truth == 2, truth == 0], 1).float() + 0.3 * torch.randn(4, 3, 12, 12, generator=generator)
    present = torch.tensor([[True, True, False]] * 2 + [[True, False, True]] * 2)
    boxes = truth.clone()
    boxes[:2, 2:9, 1:8], boxes[2:, 4:11, 3:10] = 1, 2
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    losses = []
    for _ in range(60):
        scores = network(images)
        if method == "em_adapt":
            labels = em_adapt(scores, torch.zeros_like(truth), present, generator=generator, foreground_portion=0.15)
        elif method == "em_fixed":
            labels = em_fixed(scores, torch.zeros_like(truth), present)
        else:
            labels = bbox_em_fixed(scores, boxes)
        loss = nn.functional.cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            assert nn.functional.cross_entropy(network(images), labels) < loss, "the M-step lowers the loss on its labels"
        losses.append(loss.item())
    # EM-Fixed ends where the better half of the image is foreground: it has nothing that says how much should be
    assert losses[-1] < (0.7 if method == "em_fixed" else 0.5) * losses[0]
    if method == "em_adapt":
        assert float((labels == truth).float().mean()) > 0.9
