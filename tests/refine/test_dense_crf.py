"""DenseCRF: against pydensecrf, against its own definition, at its edges; the search of its parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels import native
from atrous_kernels.reference.permutohedral_filter import gaussian_filter
from segmodels.refine import PRESETS, DenseCRF, search, unary_from_labels, unary_from_probabilities, unary_from_scores
from tests.repeats import assert_same_bits_for_threads

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))


def _image(height: int, width: int, seed: int = 0) -> Tensor:
    """Blocks of colour under a gradient and some noise, uint8 [1, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    smooth, blocks = (torch.rand(1, 3, *size, generator=generator) for size in ((4, 5), (6, 8)))
    noise = torch.rand(1, 3, height, width, generator=generator)
    smooth = F.interpolate(smooth, (height, width), mode="bilinear")
    return ((0.4 * smooth + 0.5 * F.interpolate(blocks, (height, width)) + 0.1 * noise) * 255).to(torch.uint8)


def _unary(classes: int, height: int, width: int, seed: int = 1) -> Tensor:
    scores = torch.randn(1, classes, 7, 9, generator=torch.Generator().manual_seed(seed)) * 3
    return unary_from_scores(F.interpolate(scores, (height, width), mode="bilinear"))


def _pydensecrf(crf: DenseCRF, unary: Tensor, image: Tensor) -> Tensor:
    oracle = pytest.importorskip("pydensecrf.densecrf", reason="the oracle is not installed: pip install pydensecrf2")
    kind = ("none", "before", "after", "symmetric").index(crf.normalization)  # its NormalizationType
    _, classes, height, width = unary.shape

    def compatibility(weight: float) -> Any:
        if crf.compatibility is None:
            return weight
        return (weight * crf.compatibility).numpy().astype(np.float32)

    theirs = oracle.DenseCRF2D(width, height, classes)
    theirs.setUnaryEnergy(unary[0].flatten(1).contiguous().numpy())
    theirs.addPairwiseBilateral(
        crf.sigma_alpha, crf.sigma_beta, image[0].permute(1, 2, 0).contiguous().numpy(), compatibility(crf.w1), normalization=kind
    )
    theirs.addPairwiseGaussian(crf.sigma_gamma, compatibility(crf.w2), normalization=kind)
    return torch.from_numpy(np.array(theirs.inference(crf.iterations))).view(unary.shape)


def _compatibility(kind: str, classes: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(2)
    if kind == "diagonal":
        return -torch.rand(classes, generator=generator) - 0.5
    matrix = 0.3 * torch.randn(classes, classes, generator=generator) - torch.eye(classes)
    return (matrix + matrix.T) / 2 if kind == "full" else None


@pytest.mark.parametrize("kind", ["potts", "diagonal", "full"])
@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", "none"])
@pytest.mark.parametrize("size", [(60, 80), (75, 101)])
def test_agrees_with_pydensecrf(size: tuple[int, int], normalization: str, kind: str) -> None:
    unary, image = _unary(7, *size), _image(*size)
    # Without normalisation the kernels' sums are in the hundreds: weights that leave the marginals undecided show more.
    weight = 0.01 if normalization == "none" else 1.0
    for preset in ("deeplab", "deeplabv2_resnet101"):
        crf = DenseCRF.preset(preset, normalization=normalization, compatibility=_compatibility(kind, 7))
        crf = crf.replace(w1=weight * crf.w1, w2=weight * crf.w2)
        ours, theirs = crf(unary, image), _pydensecrf(crf, unary, image)
        assert (ours - theirs).abs().max() < 1e-3
        assert (ours.argmax(1) == theirs.argmax(1)).double().mean() >= 0.999


def test_follows_exact_gaussians() -> None:
    """The same mean field with every pair of pixels: the lattice's error is a few per cent of each message."""
    unary, image = _unary(4, 24, 30), _image(24, 30)
    crf = DenseCRF(w1=2, sigma_alpha=12, sigma_beta=20, w2=1, sigma_gamma=3, iterations=5)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij")
    colours = [image[0, c] / 20 for c in range(3)]
    kernels = []
    for weight, features in ((2, [x / 12, y / 12, *colours]), (1, [x / 3, y / 3])):
        rows = torch.stack([f.flatten() for f in features], -1).double()[None]
        matrix = gaussian_filter(torch.eye(720, dtype=torch.float64)[None], rows)[0]
        root = matrix.sum(1).rsqrt()
        kernels.append(weight * root[:, None] * matrix * root)
    energies = unary[0].flatten(1).T.double()
    marginals = (-energies).softmax(1)
    for _ in range(5):
        marginals = (sum(kernels) @ marginals - energies).softmax(1)
    ours = crf(unary, image)[0].flatten(1).T.double()
    assert (ours - marginals).abs().mean() < 0.02
    assert (ours.argmax(1) == marginals.argmax(1)).double().mean() > 0.97


def test_a_batch_is_its_images_one_by_one_on_any_strides() -> None:
    unary = torch.cat([_unary(5, 33, 41, seed) for seed in (1, 2)])
    image = torch.cat([_image(33, 41, seed) for seed in (3, 4)])
    crf = DenseCRF.preset("deeplab_largefov")
    out = crf(unary, image)
    for i in range(2):
        assert torch.equal(out[i : i + 1], crf(unary[i : i + 1], image[i : i + 1]))
    turned = image.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(out, crf(unary.contiguous(memory_format=torch.channels_last), turned))
    assert torch.equal(out, crf(unary, image.float()))
    assert crf(unary[:0], image[:0]).shape == (0, 5, 33, 41)
    torch.testing.assert_close(out.sum(1), torch.ones(2, 33, 41))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
@pytest.mark.parametrize("classes", [1, 2, 21])
def test_tiny_images(size: tuple[int, int], classes: int) -> None:
    out = DenseCRF()(unary_from_scores(torch.randn(1, classes, *size)), torch.randint(256, (1, 3, *size), dtype=torch.uint8))
    torch.testing.assert_close(out.sum(1), torch.ones(1, *size))


def test_without_kernels_or_iterations_it_is_the_softmax() -> None:
    unary, image = _unary(5, 9, 12), _image(9, 12)
    for crf in (DenseCRF(w1=0, w2=0), DenseCRF(iterations=0)):
        torch.testing.assert_close(crf(unary, image), (-unary).softmax(1), rtol=1e-5, atol=1e-6)
    only = DenseCRF(w1=0)
    torch.testing.assert_close(only(unary, image), only(unary, image * 0), rtol=0, atol=0)


def test_same_bits_for_any_number_of_threads() -> None:
    unary, image = _unary(21, 90, 77), _image(90, 77)
    assert_same_bits_for_threads(lambda: [DenseCRF.preset("deeplab")(unary, image)])


def test_energies() -> None:
    scores = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(unary_from_scores(scores), unary_from_probabilities(scores.softmax(1), clip=1e-9))
    assert unary_from_probabilities(torch.tensor([[1.0, 0.0]]), clip=1e-5)[0, 1].item() == pytest.approx(-np.log(1e-5), rel=1e-5)
    mixed = unary_from_probabilities(torch.tensor([[1.0, 0.0]]), scale=0.8).neg().exp()
    torch.testing.assert_close(mixed, torch.tensor([[0.9, 0.1]]))
    labels = torch.tensor([[0, 2, 255]])
    expected = torch.tensor([[0.8, 0.1, 1 / 3], [0.1, 0.1, 1 / 3], [0.1, 0.8, 1 / 3]])
    torch.testing.assert_close(unary_from_labels(labels, 3, 0.8).neg().exp()[0], expected)


def _nan_at(tensor: Tensor, at: tuple[int, ...], value: float = float("nan")) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


U, X = torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
MISTAKES: list[tuple[Any, str]] = [
    (lambda: DenseCRF(sigma_alpha=0), "sigma_alpha=0: expected a width above 0"),
    (lambda: DenseCRF(sigma_gamma=-1), "sigma_gamma=-1: expected a width above 0"),
    (lambda: DenseCRF(sigma_beta=float("nan")), "sigma_beta=nan: expected a width above 0"),
    (lambda: DenseCRF(w1=-2), "w1=-2: expected a weight of at least 0"),
    (lambda: DenseCRF(iterations=-1), "iterations=-1: expected 0 or more"),
    (lambda: DenseCRF(normalization="mean"), "normalization='mean': expected symmetric, before, after or none"),
    (lambda: DenseCRF(compatibility=torch.tensor([[0.0, 1], [2, 0]])), r"shape \[2, 2\]: expected a symmetric matrix"),
    (lambda: DenseCRF(compatibility=torch.ones(4))(U, X), r"compatibility of shape \[4\]: expected \[3\] or \[3, 3\]"),
    (lambda: DenseCRF.preset("deeplabv9"), "unknown preset 'deeplabv9': expected one of deeplab, "),
    (lambda: DenseCRF()(_nan_at(U, (0, 2, 1, 3)), X), r"unary holds nan at \[0, 2, 1, 3\]: expected finite values"),
    (lambda: DenseCRF()(_nan_at(U, (0, 1, 0, 0), float("inf")), X), r"unary holds inf at \[0, 1, 0, 0\]"),
    (lambda: DenseCRF()(U, _nan_at(X.float(), (0, 0, 3, 4))), r"image holds nan at \[0, 0, 3, 4\]"),
    (lambda: DenseCRF()(U, X[..., :4]), r"image of shape \[1, 3, 4, 4\]: expected the images and sizes of unary, \[1, 3, 4, 5\]"),
    (lambda: DenseCRF()(U, X.int()), r"image of shape .* torch.int32: expected uint8 or floating-point \[N, 1 to 4, H, W\]"),
    (lambda: DenseCRF()(U[0], X), r"unary of shape \[3, 4, 5\].*expected floating-point \[N, C, H, W\]"),
    (lambda: unary_from_labels(torch.tensor([[3]]), 3, 0.5), "labels hold 3: expected 0 to 2, or 255 where unsure"),
    (lambda: unary_from_labels(torch.tensor([[-1]]), 3, 0.5), "labels hold -1: expected 0 to 2"),
    (lambda: unary_from_labels(torch.tensor([[0]]), 3, 1.0), "gt_prob=1.0: expected above 0, below 1"),
    (lambda: unary_from_probabilities(torch.tensor([[1.5, 0.1]])), "probabilities from 0.1 to 1.5: expected 0 to 1"),
    (lambda: unary_from_probabilities(torch.tensor([[float("nan")]])), "probabilities from nan to nan: expected 0 to 1"),
    (lambda: search(DenseCRF(), {"w3": [1]}, [lambda: (U, X, X[:, 0])], 3), "grid names 'w3': expected one of w1, "),
    (lambda: search(DenseCRF(), {"w1": []}, [lambda: (U, X, X[:, 0])], 3), "grid\\['w1'\\] is empty: expected values to try"),
    (lambda: search(DenseCRF(), {"w1": [1]}, [], 3), "examples: expected one or more"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_name_the_value(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_presets_are_those_of_the_papers() -> None:
    assert all(len(values) == 5 for values in PRESETS.values())
    crf = DenseCRF.preset("deeplabv2_resnet101")
    assert crf.replace() is not crf
    assert (crf.w1, crf.sigma_alpha, crf.sigma_beta, crf.w2, crf.sigma_gamma, crf.iterations) == (4, 67, 3, 3, 1, 10)


def test_search_finds_the_parameters_that_help() -> None:
    """Two flat halves with noisy scores: the spatial kernel alone blurs the border, the bilateral one does not."""
    labels = torch.zeros(1, 32, 40, dtype=torch.int64)
    labels[:, :, 20:] = 1
    image = (labels[:, None] * 200).expand(1, 3, 32, 40).to(torch.uint8)
    examples = []
    for seed in (0, 1):
        noise = torch.randn(1, 2, 32, 40, generator=torch.Generator().manual_seed(seed)) * 2
        unary = unary_from_scores(F.one_hot(labels, 2).movedim(-1, 1) + noise)
        examples.append(lambda unary=unary: (unary, image, labels))
    found = search(DenseCRF(sigma_gamma=3), {"w1": [0, 5], "sigma_beta": [10, 20]}, examples, 2)
    assert found.best.w1 == 5
    assert [trial.parameters["w1"] for trial in found.trials] == [0, 0, 5, 5]
    assert found.miou == max(trial.miou for trial in found.trials) > found.unrefined_miou
    assert found.miou > 0.99
