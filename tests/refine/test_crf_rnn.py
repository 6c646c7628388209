"""CRFRNN: its iterations are those of DenseCRF where the two coincide; gradients; it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from atrous_kernels import native
from segmodels.refine import CRFRNN, DenseCRF, unary_from_scores


def _inputs(classes: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    scores = F.interpolate(torch.randn(2, classes, 4, 5, dtype=dtype) * 2, (17, 22), mode="bilinear")
    return scores, torch.randint(4, (2, 3, 17, 22)).mul(60).to(torch.uint8)


@pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
def test_starts_as_a_dense_crf() -> None:
    scores, image = _inputs()
    crf = DenseCRF.preset("crf_rnn", normalization="after", backend="cpu")
    layer = CRFRNN(3, backend="cpu")
    for iterations in (5, 10):
        layer.train(iterations == 5)
        ours, theirs = layer(scores, image).softmax(1), crf.replace(iterations=iterations)(unary_from_scores(scores), image)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # the same sums in another order, fed back ten times
    assert sum(p.numel() for p in CRFRNN(21).parameters()) == 1323


def test_gradients() -> None:
    scores, image = torch.randn(1, 3, 4, 5, dtype=torch.float64), torch.randint(256, (1, 3, 4, 5), dtype=torch.uint8)
    layer = CRFRNN(3, theta_beta=40).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(scores: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (scores, image))

    assert torch.autograd.gradcheck(call, (scores.requires_grad_(), *values))


def test_learns_to_trust_the_colours() -> None:
    labels = torch.zeros(1, 24, 30, dtype=torch.int64)
    labels[:, 6:18, 8:22] = 1
    image = (labels * 150)[:, None].expand(1, 3, 24, 30).to(torch.uint8)
    scores = F.one_hot(labels, 2).movedim(-1, 1) + 2 * torch.randn(1, 2, 24, 30)
    layer = CRFRNN(2, theta_beta=20)
    with torch.no_grad():
        layer.bilateral_weight.mul_(0.01)
        layer.spatial_weight.mul_(0.01)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(scores, image), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert (layer.eval()(scores, image).argmax(1) == labels).double().mean() > 0.98


def test_mistakes_name_the_value() -> None:
    with pytest.raises(ValueError, match="theta_beta=0: expected above 0"):
        CRFRNN(3, theta_beta=0)
    scores, image = _inputs()
    with pytest.raises(ValueError, match=r"image of shape \[1, 3, 17, 22\]: expected the images and sizes of scores"):
        CRFRNN(3)(scores, image[:1])
