"""Sliding windows, tiles with margins, images resized to a longer side: each against a plain computation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segmodels.engine.inference import Predictor
from segmodels.engine.windows import Windows, starts


class Pointwise(nn.Module):
    """Logits of each pixel from this pixel alone, so that windows make no difference."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, 4, 1)
        self.seen: list[tuple[int, int]] = []

    def logits(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(tuple(x.shape[-2:]))
        return {"out": self.classifier(x)}


def test_windows_start_where_pspnet_has_them() -> None:
    assert starts(473, 473, 316) == [0]
    assert starts(700, 473, 316) == [0, 227]
    assert starts(1000, 473, 316) == [0, 316, 527]
    assert starts(473 + 316, 473, 316) == [0, 316]


@pytest.mark.parametrize("size", [(7, 9), (9, 30), (20, 23)])
def test_sliding_windows_average_what_they_share(size: tuple[int, int]) -> None:
    images, (rows, columns) = torch.randn(2, 3, *size), (9, 12)
    noise = itertools.count()

    def predict(window: torch.Tensor) -> torch.Tensor:
        assert window.shape == (2, 3, rows, columns)
        return window[:, :2] + next(noise)  # windows disagree

    found = Windows("slide", (rows, columns))(images, predict)
    assert found.shape == (2, 2, *size)
    total, count = torch.zeros(size), torch.zeros(size)
    places = itertools.product(starts(max(size[0], rows), rows, 6), starts(max(size[1], columns), columns, 8))
    for number, (top, left) in enumerate(places):
        total[top : top + rows, left : left + columns] += number
        count[top : top + rows, left : left + columns] += 1
    assert number + 1 == next(noise)
    # sums of a few float32 values of order one
    torch.testing.assert_close(found, images[:, :2] + total / count, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 5), (16, 16), (17, 30)])
def test_tiles_with_a_margin_compute_the_reflected_image(size: tuple[int, int]) -> None:
    """Two 3 x 3 convolutions see two pixels to each side: with this margin there are no seams."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1)).double()
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = Windows("tile", (12, 9), margin=2)(images, network)
        whole = network(F.pad(images, (2, 2, 2, 2), mode="reflect"))[..., 2:-2, 2:-2]
    torch.testing.assert_close(found, whole)  # float64, sums in another order


@pytest.mark.parametrize("mode", ["slide", "tile"])
def test_predictor_with_windows_scales_and_mirrorings(mode: str) -> None:
    model = Pointwise().eval()
    images = torch.randn(1, 3, 20, 26)
    options = {"scales": (0.5, 1.0), "flip": True}
    windowed = Predictor(model, mode=mode, window=(9, 12), margin=3 if mode == "tile" else 0, **options)
    found = windowed.probabilities(images)
    assert set(model.seen) == {(9, 12)}
    resized = {}
    for scale, size in ((0.5, (10, 13)), (1.0, (20, 26))):
        with torch.no_grad():
            part = model.logits(F.interpolate(images, size=size, mode="bilinear"))["out"].softmax(1)
        resized[scale] = F.interpolate(part, size=(20, 26), mode="bilinear")
    # two layouts of the same float32 sums
    torch.testing.assert_close(found, (resized[0.5] + resized[1.0]) / 2, rtol=0, atol=1e-5)
    image = np.random.default_rng(0).integers(0, 256, (20, 26, 3), dtype=np.uint8)
    plain = Predictor(model)(image)
    assert (Predictor(model, mode=mode, window=(9, 12))(image) != plain).mean() < 0.01  # float32 ties


def test_the_longer_side_at_scale_one() -> None:
    model = Pointwise()
    predictor = Predictor(model, scales=(1.0, 1.5), long_side=40)
    assert predictor(np.zeros((30, 60, 3), np.uint8)).shape == (30, 60)
    assert model.seen == [(20, 40), (30, 60)]


def test_what_windows_refuse() -> None:
    with pytest.raises(ValueError, match=r"mode='whole' with a window: expected 'slide' or 'tile'"):
        Predictor(Pointwise(), window=(9, 9))
    with pytest.raises(ValueError, match=r"margin=5: expected less than half of the window \[9, 12\]"):
        Windows("tile", (9, 12), margin=5)
