"""Inference on windows of an image: for networks that are better at the size they were trained at, and for small memories."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from segmodels.models.dilation import reflected


@dataclass(frozen=True)
class Windows:
    """See the arguments of the same names of :class:`segmodels.engine.inference.Predictor`.

    Raises:
        ValueError: ``mode`` neither "slide" nor "tile", or a margin that leaves nothing of the tile.
    """

    mode: str
    window: tuple[int, int]
    stride: float = 2 / 3
    margin: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("slide", "tile"):
            raise ValueError(f"mode={self.mode!r} with a window: expected 'slide' or 'tile'")
        if not 0 <= 2 * self.margin < min(self.window):
            raise ValueError(f"margin={self.margin}: expected less than half of the window {list(self.window)}")

    def __call__(self, images: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
        """``[N, C, H, W]`` of normalised images ``[N, 3, H, W]``, any size.

        Args:
            images: where 0 is the mean.
            predict: from a window ``[N, 3, h, w]`` to ``[N, C, h, w]``.
        """
        return (self._slide if self.mode == "slide" else self._tile)(images, predict)

    def _slide(self, images: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        rows, columns = self.window
        images = F.pad(images, (0, max(0, columns - width), 0, max(0, rows - height)))
        total: Tensor | None = None
        counts = torch.zeros(images.shape[-2:], device=images.device)
        for top in starts(images.shape[-2], rows, math.ceil(rows * self.stride)):
            for left in starts(images.shape[-1], columns, math.ceil(columns * self.stride)):
                inside = (..., slice(top, top + rows), slice(left, left + columns))
                part = predict(images[inside])
                if total is None:
                    total = part.new_zeros(*part.shape[:2], *images.shape[-2:])
                total[inside] += part
                counts[inside] += 1
        assert total is not None
        return (total / counts.to(total.device))[..., :height, :width]

    def _tile(self, images: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
        size, margin = images.shape[-2:], self.margin
        rows, columns = (side - 2 * margin for side in self.window)
        for dim, side, core in ((-2, size[0], rows), (-1, size[1], columns)):
            images = images.index_select(dim, reflected(side, margin, margin + -side % core, images.device))
        bands = []
        for top in range(0, size[0], rows):
            band = []
            for left in range(0, size[1], columns):
                tile = predict(images[..., top : top + self.window[0], left : left + self.window[1]])
                band.append(tile[..., margin : margin + rows, margin : margin + columns])
            bands.append(torch.cat(band, -1))
        return torch.cat(bands, -2)[..., : size[0], : size[1]]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows of a side begin: every ``stride``, the last one so that it ends with the side."""
    return [min(index * stride, length - window) for index in range(math.ceil((length - window) / stride) + 1)]
