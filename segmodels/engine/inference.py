"""From an image of any size to its map of classes, and from a split to its confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import atrous_kernels
from segmodels.data import SegmentationDataset
from segmodels.data.transforms import IMAGENET_MEAN, IMAGENET_STD, to_tensor
from segmodels.engine.metrics import ConfusionMatrix

Refinement = Callable[[Tensor, Tensor], Tensor]


class Predictor:
    """Whole-image inference. The network takes any size, so images are not padded: added borders would be one more thing
    that it never saw in training.

    Args:
        model: with the output contract of :func:`segmodels.create_model`; put into evaluation mode by each call and
            restored afterwards.
        mean, std: the normalisation it was trained with.
        scales: the image is resized by each factor and the class probabilities are averaged at its own size.
        flip: average with the mirrored image as well.
        refine: from the probabilities ``[N, C, H, W]`` and the images uint8 ``[N, 3, H, W]`` RGB to better ones, as
            :mod:`segmodels.refine` offers; None: they are taken as they are.
        device, amp, channels_last: where and how to compute.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        refine: Refinement | None = None,
        device: str | torch.device = "cpu",
        amp: bool = False,
        channels_last: bool = True,
    ) -> None:
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales={list(scales)}: expected one or more positive factors")
        self.model, self.mean, self.std = model, tuple(mean), tuple(std)
        self.scales, self.flip, self.refine = tuple(scales), flip, refine
        self.device, self.amp = torch.device(device), amp
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Classes uint8 ``[H, W]`` of an image uint8 ``[H, W, 3]`` RGB.

        Raises:
            ValueError: another shape or type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"image of shape {list(image.shape)} and type {image.dtype}: expected uint8 [H, W, 3]")
        tensor, _ = to_tensor(image, np.zeros(image.shape[:2], np.uint8), self.mean, self.std)
        if self.refine is None:
            classes = self.classes(tensor[None])
        else:
            colours = torch.from_numpy(image).permute(2, 0, 1)[None].to(self.device)
            classes = self.refine(self.probabilities(tensor[None]), colours).argmax(1)
        return classes[0].to(torch.uint8).cpu().numpy()

    @torch.inference_mode()
    def classes(self, images: Tensor) -> Tensor:
        """int64 ``[N, H, W]`` of normalised images float ``[N, 3, H, W]``."""
        size = tuple(images.shape[-2:])
        with _evaluating(self.model):
            if self.scales == (1.0,) and not self.flip:
                # softmax would not change the order
                return atrous_kernels.upsample_argmax(self._logits(images), size)
            return self._probabilities(images, size).argmax(1)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """float32 ``[N, C, H, W]``, averaged over scales and mirrorings, of images as in :meth:`classes`."""
        with _evaluating(self.model):
            return self._probabilities(images, tuple(images.shape[-2:]))

    def _probabilities(self, images: Tensor, size: tuple[int, ...]) -> Tensor:
        total: Tensor | None = None
        for scale in self.scales:
            resized = images
            if scale != 1:
                resized = F.interpolate(
                    images, size=[max(1, round(side * scale)) for side in size], mode="bilinear", align_corners=False
                )
            for mirrored in (False, True) if self.flip else (False,):
                logits = self._logits(resized.flip(-1) if mirrored else resized).float()
                logits = F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)
                part = (logits.flip(-1) if mirrored else logits).softmax(1)
                total = part if total is None else total + part
        assert total is not None
        return total / (len(self.scales) * (2 if self.flip else 1))

    def _logits(self, images: Tensor) -> Tensor:
        """At the resolution of the network."""
        images = images.to(self.device).contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model.logits(images)["out"]  # type: ignore[operator]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every module is as it was, frozen ones included."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


@dataclass
class Evaluation:
    """The counts over a split, and a few (image, truth, prediction) spread evenly over it for a picture."""

    matrix: ConfusionMatrix
    samples: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def evaluate_dataset(
    predictor: Predictor,
    dataset: SegmentationDataset,
    *,
    limit: int | None = None,
    samples: int = 0,
    progress: Callable[[int, int], bool] | None = None,
) -> Evaluation | None:
    """One confusion matrix over a split, image by image at full size, so that memory does not grow with the split.

    Args:
        predictor, dataset: what is evaluated on what.
        limit: stop after this many images.
        samples: how many images to keep.
        progress: called with (done, total) after each image; returning False abandons the evaluation.

    Returns:
        The counts, or None where ``progress`` asked to stop.
    """
    total = len(dataset) if limit is None else min(limit, len(dataset))
    kept = set(np.linspace(0, total - 1, samples).round().astype(int).tolist())
    result = Evaluation(ConfusionMatrix(dataset.num_classes), [])
    for index in range(total):
        image, label = dataset[index]
        prediction = predictor(image)
        result.matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
        if index in kept:
            result.samples.append((image, label, prediction))
        if progress is not None and not progress(index + 1, total):
            return None
    return result
