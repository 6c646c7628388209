"""DomainTransform: equal to OpenCV's filter, and what it does to scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from segmodels.refine import DomainTransform, image_edges


# Where the definitions coincide: every guide and every width of at least 1 pixel and 0.01 colours, to which OpenCV raises smaller
# ones. It takes float32 or uint8 (and rounds to that) of at most four channels, has no gradient, and no map of edges as input.
@pytest.mark.parametrize("guide", [np.uint8, np.float32])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize(("sigma_s", "sigma_r", "iterations"), [(10, 30, 1), (50, 200, 3), (3, 1000, 4), (1, 0.01, 2)])
def test_equals_opencv(sigma_s: float, sigma_r: float, iterations: int, colours: int, guide: type) -> None:
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "ximgproc"):
        pytest.skip("this OpenCV has no ximgproc: pip install opencv-contrib-python-headless")
    image = torch.randint(256, (1, colours, 37, 53)).to(torch.uint8 if guide is np.uint8 else torch.float32)
    scores = torch.randn(1, 4, 37, 53)
    ours = DomainTransform(sigma_s, sigma_r, iterations)(scores, image)
    pixels = [np.ascontiguousarray(x[0].permute(1, 2, 0).numpy()) for x in (image, scores)]
    theirs = cv2.ximgproc.dtFilter(*pixels, sigma_s, sigma_r, mode=cv2.ximgproc.DTF_RF, numIters=iterations)
    # OpenCV squares the weights of each iteration for the next one, which doubles their rounding errors.
    torch.testing.assert_close(ours[0], torch.from_numpy(theirs).permute(2, 0, 1), rtol=0, atol=1e-5)


def test_keeps_edges_and_removes_noise() -> None:
    labels = torch.zeros(1, 24, 30, dtype=torch.int64)
    labels[:, 6:18, 8:22] = 1
    image = (labels * 150)[:, None].expand(1, 3, 24, 30).to(torch.uint8)
    scores = torch.nn.functional.one_hot(labels, 2).movedim(-1, 1) + 1.5 * torch.randn(1, 2, 24, 30)
    refined = DomainTransform(sigma_s=20, sigma_r=50)(scores, image)
    assert (scores.argmax(1) == labels).double().mean() < 0.8
    assert (refined.argmax(1) == labels).double().mean() > 0.97
    probabilities = DomainTransform()(scores.softmax(1), image)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 24, 30))
    edge = torch.zeros(1, 1, 24, 30)
    assert not torch.equal(DomainTransform()(scores, image, edge), DomainTransform()(scores, image))


def test_image_edges() -> None:
    image = torch.zeros(1, 3, 2, 3, dtype=torch.uint8)
    image[0, :, 1, 2] = torch.tensor([255, 10, 0])
    assert image_edges(image).tolist() == [[[[0, 0, 0], [0, 0, 265]], [[0, 0, 0], [0, 0, 265]]]]


def test_mistakes_name_the_value() -> None:
    scores, image = torch.zeros(1, 2, 4, 5), torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
    for arguments, message in (
        (dict(sigma_s=0), "sigma_s=0: expected a width above 0"),
        (dict(sigma_r=math.nan), "sigma_r=nan"),
        (dict(iterations=0), "iterations=0: expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            DomainTransform(**arguments)
    refine = DomainTransform()
    with pytest.raises(ValueError, match=r"scores holds nan at \[0, 0, 0, 0\]"):
        refine(scores + math.nan, image)
    with pytest.raises(ValueError, match=r"image of shape \[1, 3, 4, 4\]"):
        refine(scores, image[..., 1:])
    with pytest.raises(ValueError, match=r"edge of shape \[1, 1, 4, 4\]"):
        refine(scores, image, torch.zeros(1, 1, 4, 4))
