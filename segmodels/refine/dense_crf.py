"""The fully connected CRF (Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials", 2011, arXiv:1210.5644), as DeepLab refines its classes with it (Chen et al. 2016, arXiv:1606.00915, section 3.3).

The energy of a labelling x is ``sum_i unary(x_i) + sum_{i<j} mu(x_i, x_j) k(i, j)`` with two Gaussian kernels,
``k = w1 exp(-|p_i - p_j|^2 / 2 sigma_alpha^2 - |I_i - I_j|^2 / 2 sigma_beta^2) + w2 exp(-|p_i - p_j|^2 / 2 sigma_gamma^2)``
of positions p in pixels and colours I from 0 to 255.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import PermutohedralLattice

# (w1, sigma_alpha, sigma_beta, w2, sigma_gamma) of the released systems: DeepLab v1 and v2 with their data sets, attention to
# scale, weak supervision (the CRF of the results, and the one that turns boxes into labels), and the CRF-RNN's initial values.
PRESETS: dict[str, tuple[float, float, float, float, float]] = {
    "deeplab": (5, 50, 10, 3, 3),
    "deeplab_msc": (3, 95, 3, 3, 3),
    "deeplab_largefov": (4, 49, 5, 3, 3),
    "deeplab_coco": (5, 63, 3, 3, 3),
    "deeplab_coco_mix": (5, 67, 3, 3, 3),
    "deeplab_msc_coco": (4, 81, 2, 3, 3),
    "deeplabv2_vgg16": (4, 65, 3, 2, 2),
    "deeplabv2_resnet101": (4, 67, 3, 3, 1),
    "attention_person_part": (4, 19, 3, 3, 3),
    "attention_voc": (4, 49, 5, 3, 3),
    "weak_em_adapt": (35, 61, 10, 3, 3),
    "weak_strong": (5, 81, 5, 3, 3),
    "weak_bbox_rect": (5, 70, 3, 3, 3),
    "weak_bbox_seg": (5, 77, 3, 3, 3),
    "bbox_to_labels": (45, 37, 3, 15, 3),
    "crf_rnn": (5, 160, 3, 3, 3),
}


@dataclass(eq=False)
class DenseCRF:
    """Mean field inference; call it with energies and images.

    Args:
        w1, sigma_alpha, sigma_beta: weight and widths (pixels, colours) of the bilateral kernel. Default: DeepLab v2, ResNet-101.
        w2, sigma_gamma: weight and width (pixels) of the spatial kernel. A kernel of weight 0 is left out.
        iterations: of the mean field; the papers take 10.
        normalization: of each kernel by its own response: ``"symmetric"``, ``"before"``, ``"after"`` (DeepLab v1, CRF-RNN) or
            ``"none"``; see :func:`atrous_kernels.mean_field`.
        compatibility: mu, ``[C, C]`` symmetric or ``[C]`` for a diagonal: what two labels cost that meet. None: Potts, 1 where
            labels differ (the same as -1 where they are equal).
        backend: as in :func:`atrous_kernels.permutohedral_filter`.

    Raises:
        ValueError: a width that is not above 0, a negative or non-finite weight, an unknown normalisation, a matrix that is not
            symmetric.
    """

    w1: float = 4.0
    sigma_alpha: float = 67.0
    sigma_beta: float = 3.0
    w2: float = 3.0
    sigma_gamma: float = 1.0
    iterations: int = 10
    normalization: str = "symmetric"
    compatibility: Tensor | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("sigma_alpha", "sigma_beta", "sigma_gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: expected a width above 0")
        for name in ("w1", "w2"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: expected a weight of at least 0")
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise ValueError(f"iterations={self.iterations!r}: expected 0 or more")
        if self.normalization not in ("symmetric", "before", "after", "none"):
            raise ValueError(f"normalization={self.normalization!r}: expected symmetric, before, after or none")
        mu = self.compatibility
        if mu is not None and mu.dim() == 2 and not (mu.shape[0] == mu.shape[1] and bool((mu == mu.T).all())):
            raise ValueError(f"compatibility of shape {list(mu.shape)}: expected a symmetric matrix")
        self._grid: tuple[tuple[object, ...], PermutohedralLattice] | None = None

    @classmethod
    def preset(cls, name: str, **changes: object) -> DenseCRF:
        """The parameters of a published system (a key of ``PRESETS``), and ``changes`` to them.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
        fields = ("w1", "sigma_alpha", "sigma_beta", "w2", "sigma_gamma")
        return cls(**{**dict(zip(fields, PRESETS[name], strict=True)), **changes})  # type: ignore[arg-type]

    def replace(self, **changes: object) -> DenseCRF:
        """The same with other parameters."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, unary: Tensor, image: Tensor) -> Tensor:
        """The marginals, float32 ``[N, C, H, W]`` (channels last in memory); their ``argmax(1)`` are the refined classes.

        Args:
            unary: energies ``-log P``, floating point ``[N, C, H, W]``, any strides.
            image: uint8 or floating-point ``[N, c, H, W]`` with colours from 0 to 255, c from 1 to 4.

        Images are refined one after the other: memory does not grow with the batch, but for the result.

        Raises:
            TypeError, ValueError: other types, shapes that differ, energies or colours that are not finite; the message names the
                value.
        """
        check_image("unary", unary, image)
        classes = unary.shape[1]
        if self.compatibility is not None and self.compatibility.shape[0] != classes:
            shape = list(self.compatibility.shape)
            raise ValueError(f"compatibility of shape {shape}: expected [{classes}] or [{classes}, {classes}]")
        results = []
        for index in range(len(unary)):
            lattices, weights = self._kernels(image[index : index + 1])
            factors = [weight * self._mu(classes, unary.device) for weight in weights]
            one = unary[index : index + 1].float()
            results.append(
                ak.mean_field(one, lattices, factors, self.iterations, normalization=self.normalization, backend=self.backend)
            )
        if len(results) == 1:  # a copy would be the largest tensor of all
            return results[0]
        return torch.cat(results) if results else unary.float()

    def _mu(self, classes: int, device: torch.device) -> Tensor:
        mu = self.compatibility
        return -torch.ones(classes, device=device) if mu is None else mu.to(device, torch.float32)

    def _kernels(self, image: Tensor) -> tuple[list[PermutohedralLattice], list[float]]:
        lattices, weights = [], []
        if self.w1:
            features = torch.cat([positions(image) / self.sigma_alpha, image[0].float() / self.sigma_beta])
            lattices.append(ak.permutohedral_lattice(features[None], backend=self.backend))
            weights.append(self.w1)
        if self.w2:
            lattices.append(self._grid_lattice(image))
            weights.append(self.w2)
        return lattices, weights

    def _grid_lattice(self, image: Tensor) -> PermutohedralLattice:
        """That of the positions alone: the same for all images of one size."""
        key = (image.shape[2:], image.device, self.sigma_gamma, self.backend)
        kept = self._grid
        if kept is None or kept[0] != key:
            features = positions(image) / self.sigma_gamma
            kept = self._grid = key, ak.permutohedral_lattice(features[None], backend=self.backend)
        return kept[1]


def unary_from_probabilities(probabilities: Tensor, *, scale: float = 1.0, clip: float = 1e-5) -> Tensor:
    """Energies ``-log p`` of probabilities ``[N, C, ...]``.

    Args:
        probabilities: floating point, 0 to 1.
        scale: trust in them: mixed with ``1 - scale`` of the uniform distribution.
        clip: probabilities below count as this much.

    Raises:
        ValueError: a probability outside 0 to 1 (or NaN), a scale or clip outside (0, 1].
    """
    for name, value in (("scale", scale), ("clip", clip)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value}: expected above 0, to 1")
    if probabilities.numel():
        low, high = (bound.item() for bound in probabilities.aminmax())
        # Rounding of a softmax may pass 1 by a few units in the last place.
        if not (low >= 0 and high <= 1 + 1e-3):
            raise ValueError(f"probabilities from {low:g} to {high:g}: expected 0 to 1")
    p = probabilities.float()
    if scale != 1:
        p = scale * p + (1 - scale) / p.shape[1]
    return -p.clamp(clip, 1).log()


def unary_from_scores(scores: Tensor) -> Tensor:
    """Energies of the scores (logits) ``[N, C, ...]`` of a network: minus their log-softmax."""
    return -scores.float().log_softmax(1)


def unary_from_labels(labels: Tensor, num_classes: int, gt_prob: float, *, unsure: int | None = 255) -> Tensor:
    """Energies of a hard labelling: its label has probability ``gt_prob``, the other classes share the rest.

    Args:
        labels: integers ``[N, ...]``, 0 to ``num_classes - 1``, or ``unsure``.
        num_classes: C, at least 2.
        gt_prob: above 0, below 1.
        unsure: label of pixels where all classes are equally likely; None: no such label.

    Returns:
        float32 ``[N, C, ...]``.

    Raises:
        ValueError: a label outside the classes, or a parameter outside these; the message names the value.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: expected 2 or more")
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob={gt_prob}: expected above 0, below 1")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels of dtype {labels.dtype}: expected integers")
    labels = labels.long()
    known = torch.ones_like(labels, dtype=torch.bool) if unsure is None else labels != unsure
    wrong = known & ((labels < 0) | (labels >= num_classes))
    if bool(wrong.any()):
        raise ValueError(f"labels hold {int(labels[wrong][0])}: expected 0 to {num_classes - 1}, or {unsure} where unsure")
    hit, miss = -math.log(gt_prob), -math.log((1 - gt_prob) / (num_classes - 1))
    unary = torch.full((labels.shape[0], num_classes, *labels.shape[1:]), miss, device=labels.device)
    unary.scatter_(1, labels.where(known, 0)[:, None], hit)
    return unary.where(known[:, None], math.log(num_classes))


def positions(image: Tensor) -> Tensor:
    """x and y of every pixel, float32 [2, H, W]."""
    height, width = image.shape[2:]
    y, x = torch.arange(height, device=image.device), torch.arange(width, device=image.device)
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)]).float()


def check_image(name: str, scores: Tensor, image: Tensor) -> None:
    """Raises TypeError or ValueError where scores and image do not belong together or are not finite."""
    for what, value in ((name, scores), ("image", image)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{what}: expected a tensor, not {type(value).__name__}")
    if scores.dim() != 4 or not scores.is_floating_point() or 0 in scores.shape[1:]:
        raise ValueError(f"{name} of shape {list(scores.shape)}, {scores.dtype}: expected floating-point [N, C, H, W], not empty")
    if image.dim() != 4 or not 1 <= image.shape[1] <= 4 or not (image.is_floating_point() or image.dtype == torch.uint8):
        raise ValueError(f"image of shape {list(image.shape)}, {image.dtype}: expected uint8 or floating-point [N, 1 to 4, H, W]")
    if image.shape[0] != scores.shape[0] or image.shape[2:] != scores.shape[2:]:
        raise ValueError(f"image of shape {list(image.shape)}: expected the images and sizes of {name}, {list(scores.shape)}")
    if image.device != scores.device:
        raise ValueError(f"image on {image.device}: expected {scores.device}, where {name} is")
    for what, value in ((name, scores), ("image", image)):
        if value.numel() and value.is_floating_point():
            low, high = value.detach().aminmax()  # NaN comes through
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                at = tuple((~value.isfinite()).nonzero()[0].tolist())
                raise ValueError(f"{what} holds {value[at].item()} at {list(at)}: expected finite values")
