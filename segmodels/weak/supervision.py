"""The training loss where some images are weak: an E-step on the current scores, then cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segmodels.config import WeakConfig
from segmodels.weak.dataset import LATENT, WeakDataset
from segmodels.weak.em import bbox_em_fixed, em_adapt, em_fixed

# Of the released system: (background, foreground).
BIASES = {"em_fixed": (1.0, 2.0), "bbox_em_fixed": (5.0, 6.0)}


class WeakSupervision:
    """Estimates the labels of weak images and weighs their loss against that of the strong ones (section 4 of Papandreou et al.
    2015, arXiv:1502.02734).

    Args:
        settings: the section ``weak``.
        dataset: the training set.
        seed: of the order of classes in EM-Adapt.
    """

    def __init__(self, settings: WeakConfig, dataset: WeakDataset, seed: int) -> None:
        self.settings, self.dataset, self.seed = settings, dataset, seed
        self._present = torch.from_numpy(dataset.present)

    def loss(
        self,
        criterion: Callable[[dict[str, Tensor], Tensor], Tensor],
        logits: dict[str, Tensor],
        labels: Tensor,
        indices: np.ndarray,
        iteration: int,
    ) -> Tensor:
        """Scalar: ``strong_weight * criterion(strong) + weak_weight * criterion(weak)``, or the plain criterion where a batch has
        only one kind of images.

        Args:
            criterion: of logits and labels.
            logits: of the batch, strong images first.
            labels: int64 ``[N, H, W]`` as the data set gives them.
            indices: of the images in it, ``[N]``.
            iteration: of the training, from which random numbers are drawn, so that a resumed run has the same.
        """
        weak = self.dataset.weak[indices]
        strong = int((~weak).sum())
        assert weak[strong:].all(), "strong images come first"
        kinds = [(slice(0, strong), self.settings.strong_weight), (slice(strong, len(weak)), self.settings.weak_weight)]
        losses = []
        for part, weight in kinds:
            if part.start == part.stop:
                continue
            own = {name: value[part] for name, value in logits.items()}
            target = labels[part]
            if part.start == strong and self.settings.method in LATENT:
                target = self.estimate(own["out"], target, indices[part], iteration)
            losses.append((weight, criterion(own, target)))
        if len(losses) == 1:
            return losses[0][1]
        return sum((weight * loss for weight, loss in losses), torch.zeros((), device=labels.device))

    def estimate(self, scores: Tensor, labels: Tensor, indices: np.ndarray, iteration: int) -> Tensor:
        """The E-step: int64 ``[N, h, w]`` at the resolution of the scores ``[N, C, h, w]`` of the weak images ``indices``.

        Args:
            labels: what the data set gives in place of their label maps, int64 ``[N, H, W]``.
        """
        settings, background = self.settings, self.dataset.background
        # At the pixels' centres; nearest-exact, as plain nearest is half a pixel off the grid of the scores.
        known = F.interpolate(labels[:, None].to(torch.uint8), size=scores.shape[2:], mode="nearest-exact")[:, 0].long()
        present = self._present[indices].to(scores.device)
        if settings.method == "em_adapt":
            generator = torch.Generator().manual_seed(self.seed * 2**32 + iteration)
            return em_adapt(
                scores, known, present, background=background, background_portion=settings.background_portion,
                foreground_portion=settings.foreground_portion, generator=generator,
            )  # fmt: skip
        biases = BIASES[settings.method]
        low = biases[0] if settings.background_bias is None else settings.background_bias
        high = biases[1] if settings.foreground_bias is None else settings.foreground_bias
        if settings.method == "em_fixed":
            return em_fixed(
                scores, known, present, background=background, background_bias=low, foreground_bias=high,
                exclude_absent=settings.exclude_absent,
            )  # fmt: skip
        assert background is not None  # the data set has checked it
        return bbox_em_fixed(
            scores, known, background=background, background_bias=low, foreground_bias=high,
            exclude_absent=settings.exclude_absent,
        )  # fmt: skip
