"""From an image of any size to its map of classes, and from a split to its confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import atrous_kernels
from segmodels.data import SegmentationDataset
from segmodels.data.transforms import IMAGENET_MEAN, IMAGENET_STD, to_tensor
from segmodels.engine.metrics import ConfusionMatrix
from segmodels.engine.precision import autocast
from segmodels.engine.windows import Windows

Refinement = Callable[[Tensor, Tensor], Tensor]


class Predictor:
    """Inference. The network takes any size, so whole images without ``canvas`` are not padded: added borders would be one more
    thing that it never saw in training.

    Args:
        model: with the output contract of :func:`segmodels.create_model`; put into evaluation mode by each call and
            restored afterwards.
        mean, std: the normalisation it was trained with.
        scales: the image is resized by each factor and the class probabilities are averaged at its own size.
        flip: average with the mirrored image as well.
        refine: from the probabilities ``[N, C, H, W]`` and the images uint8 ``[N, 3, H, W]`` RGB to better ones, as
            :mod:`segmodels.refine` offers; None: they are taken as they are.
        canvas: height and width onto which every image is placed, top left, before zeros (after normalisation: the mean);
            larger images are reduced to fit. This is how the authors of DeepLab evaluate networks trained on padded crops.
        mode: what the network sees at once. ``"whole"``: the image. ``"slide"``: overlapping windows, the last ones shifted
            inside, whose probabilities are averaged (PSPNet, Zhao et al. 2017, arXiv:1612.01105, section 5); smaller images are
            padded with zeros at the bottom and the right. ``"tile"``: tiles side by side with a margin, which their neighbours
            predict, and which is reflected at the borders of the image (Yu and Koltun 2016, arXiv:1511.07122, whose networks do
            so themselves, with ``tile`` among the options of the model).
        window: height and width of windows and tiles, margins included.
        window_stride: of ``"slide"``, as a share of the window.
        margin: of ``"tile"``, in pixels on each side.
        long_side: at scale 1, images have this longer side (the evaluation of PSPNet); None: their own.
        device, channels_last: where and how to compute; ``amp``: a key of :data:`segmodels.engine.precision.AMP`.
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
        canvas: Sequence[int] | None = None,
        mode: str = "whole",
        window: Sequence[int] | None = None,
        window_stride: float = 2 / 3,
        margin: int = 0,
        long_side: int | None = None,
        device: str | torch.device = "cpu",
        amp: str = "none",
        channels_last: bool = True,
    ) -> None:
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales={list(scales)}: expected one or more positive factors")
        self.model, self.mean, self.std = model, tuple(mean), tuple(std)
        self.scales, self.flip, self.refine = tuple(scales), flip, refine
        self.canvas = None if canvas is None else (canvas[0], canvas[1])
        self.windows = None if window is None else Windows(mode, (window[0], window[1]), window_stride, margin)
        self.long_side = long_side
        # Of the network's own upsampling; scaled inputs lie on the same grid.
        self.align_corners = bool(getattr(model, "align_corners", False))
        self.device, self.amp = torch.device(device), amp
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Classes uint8 ``[H, W]`` of an image uint8 ``[H, W, 3]`` RGB.

        Raises:
            ValueError: another shape or type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"image of shape {list(image.shape)} and type {image.dtype}: expected uint8 [H, W, 3]")
        size = image.shape[:2]
        images, (height, width) = self._placed(image)
        if self.refine is None and (height, width) == size:
            classes = self.classes(images)[:, :height, :width]
        else:
            probabilities = self.probabilities(images)[..., :height, :width]
            probabilities = F.interpolate(probabilities, size=list(size), mode="bilinear", align_corners=False)
            if self.refine is not None:
                colours = torch.from_numpy(image).permute(2, 0, 1)[None].to(self.device)
                probabilities = self.refine(probabilities.contiguous(), colours)
            classes = probabilities.argmax(1)
        return classes[0].to(torch.uint8).cpu().numpy()

    @torch.inference_mode()
    def attention(self, image: np.ndarray) -> np.ndarray:
        """How much each scale counts in :class:`segmodels.models.AttentionToScale`: float32 ``[scales, H, W]``.

        Raises:
            ValueError: a model without attention.
        """
        if not hasattr(self.model, "attention"):
            raise ValueError(f"{type(self.model).__name__} has no attention maps: expected attentiontoscale_*")
        images, (height, width) = self._placed(image)
        with _evaluating(self.model), autocast(self.device, self.amp):
            maps = self.model.attention(images.to(self.device).contiguous(memory_format=self.layout))  # type: ignore[operator]
        maps = F.interpolate(maps[..., :height, :width].float(), size=list(image.shape[:2]), mode="bilinear", align_corners=False)
        return maps[0].cpu().numpy()

    def _placed(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """The normalised image ``[1, 3, H, W]``, on the canvas where there is one, and the height and width it covers."""
        height, width = image.shape[:2]
        rows, columns = self.canvas or (height, width)
        factor = min(1, rows / height, columns / width)
        if factor < 1:
            height, width = max(1, round(height * factor)), max(1, round(width * factor))
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        tensor, _ = to_tensor(image, np.zeros((height, width), np.uint8), self.mean, self.std)
        return F.pad(tensor, (0, columns - width, 0, rows - height))[None], (height, width)

    @torch.inference_mode()
    def classes(self, images: Tensor) -> Tensor:
        """int64 ``[N, H, W]`` of normalised images float ``[N, 3, H, W]``."""
        size = tuple(images.shape[-2:])
        with _evaluating(self.model):
            if self.scales == (1.0,) and not self.flip and self.windows is None and self.long_side is None:
                # softmax would not change the order
                return atrous_kernels.upsample_argmax(self._logits(images), size, align_corners=self.align_corners)
            return self._probabilities(images, size).argmax(1)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """float32 ``[N, C, H, W]``, averaged over scales and mirrorings, of images as in :meth:`classes`."""
        with _evaluating(self.model):
            return self._probabilities(images, tuple(images.shape[-2:]))

    def _probabilities(self, images: Tensor, size: tuple[int, ...]) -> Tensor:
        total: Tensor | None = None
        base = 1.0 if self.long_side is None else self.long_side / max(size)
        for scale in self.scales:
            resized = images
            if scale * base != 1:
                corner = 1 if self.align_corners else 0  # 513 becomes 257, not 256: still a multiple of the stride plus one
                sides = [max(1, round((side - corner) * scale * base) + corner) for side in size]
                resized = F.interpolate(images, size=sides, mode="bilinear", align_corners=self.align_corners)
            if self.windows is None:
                part = self._seen(resized, size)
            else:
                part = self.windows(resized, lambda window: self._seen(window, tuple(window.shape[-2:])))
                part = F.interpolate(part, size=list(size), mode="bilinear", align_corners=self.align_corners)
            total = part if total is None else total + part
        assert total is not None
        return total / (len(self.scales) * (2 if self.flip else 1))

    def _seen(self, images: Tensor, size: tuple[int, ...]) -> Tensor:
        """Probabilities of what the network sees at once; with ``flip`` the sum of those of both mirrorings."""
        total: Tensor | None = None
        for mirrored in (False, True) if self.flip else (False,):
            logits = self._logits(images.flip(-1) if mirrored else images).float()
            logits = F.interpolate(logits, size=list(size), mode="bilinear", align_corners=self.align_corners)
            part = (logits.flip(-1) if mirrored else logits).softmax(1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _logits(self, images: Tensor) -> Tensor:
        """At the resolution of the network."""
        images = images.to(self.device, next(self.model.parameters()).dtype).contiguous(memory_format=self.layout)
        with autocast(self.device, self.amp):
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
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], bool] | None = None,
) -> Evaluation | None:
    """One confusion matrix over a split, image by image at full size, so that memory does not grow with the split.

    Args:
        predictor, dataset: what is evaluated on what.
        limit: stop after this many images.
        samples: how many images to keep.
        part: ``(r, n)``: only every n-th image from the r-th on.
        progress: called with (done, total) after each image; returning False abandons the evaluation.

    Returns:
        The counts, or None where ``progress`` asked to stop.
    """
    total = len(dataset) if limit is None else min(limit, len(dataset))
    mine = range(part[0], total, part[1])
    kept = {mine[place] for place in np.linspace(0, len(mine) - 1, samples).round().astype(int)} if mine else set()
    result = Evaluation(ConfusionMatrix(dataset.num_classes), [])
    for done, index in enumerate(mine, 1):
        image, label = dataset[index]
        prediction = predictor(image)
        result.matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
        if index in kept:
            result.samples.append((image, label, prediction))
        if progress is not None and not progress(done, len(mine)):
            return None
    return result
