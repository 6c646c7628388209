"""Scores smoothed within the edges of the image by the domain transform (Chen et al., "Semantic Image Segmentation with
Task-Specific Edge Detection Using CNNs and a Discriminatively Trained Domain Transform", 2016, arXiv:1511.03328)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from segmodels.refine.dense_crf import check_image


@dataclass
class DomainTransform:
    """Refines scores or probabilities, which stay probabilities, along the gradients of the image or given edges.

    Args:
        sigma_s: width in pixels where there is no edge.
        sigma_r: width in colours from 0 to 255, summed over the channels, or in units of the edges that are given.
        iterations: 3 as in the paper.
        backend: as in :func:`atrous_kernels.domain_transform`.

    Raises:
        ValueError: a width or a number of iterations that is not above 0.
    """

    sigma_s: float = 50.0
    sigma_r: float = 100.0
    iterations: int = 3
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("sigma_s", "sigma_r"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: expected a width above 0")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r}: expected 1 or more")

    def __call__(self, scores: Tensor, image: Tensor, edge: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]``, dtype and layout of the scores; differentiable in scores and edges.

        Args:
            scores: floating point ``[N, C, H, W]``.
            image: uint8 or floating-point ``[N, c, H, W]`` with colours from 0 to 255, c from 1 to 4.
            edge: ``[N, 1 or 2, H, W]``, finite and at least 0, in place of the image's gradients.

        Raises:
            TypeError, ValueError: other types, shapes that differ, scores or colours that are not finite.
        """
        check_image("scores", scores, image)
        edge = image_edges(image) if edge is None else edge
        return ak.domain_transform(scores, edge, self.sigma_s, self.sigma_r, self.iterations, backend=self.backend)


def image_edges(image: Tensor) -> Tensor:
    """The differences of neighbouring pixels, summed over the colours, of an image ``[N, c, H, W]``: float32 ``[N, 2, H, W]``,
    along rows and along columns (Gastal and Oliveira, "Domain Transform for Edge-Aware Image and Video Processing", 2011)."""
    colours = image.float()
    along_rows = F.pad(colours.diff(dim=3).abs().sum(1), (1, 0))
    along_columns = F.pad(colours.diff(dim=2).abs().sum(1), (0, 0, 1, 0))
    return torch.stack([along_rows, along_columns], 1)
