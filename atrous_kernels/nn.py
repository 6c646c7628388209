"""Modules over :mod:`atrous_kernels.functional`, with the state_dict keys of their :mod:`torch.nn` twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels.functional import conv2d, psp_conv, pyramid_pool, upsample_concat, upsample_cross_entropy


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` on our kernels: same arguments, defaults, initialisation, padding modes and state_dict.

    Args:
        backend: as in :func:`atrous_kernels.conv2d`; every other argument as in :class:`torch.nn.Conv2d`.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, backend=self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")


class UpsampleCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of logits ``[N, C, h, w]``, upsampled bilinearly, against labels ``[N, H, W]``.

    Args: those of :func:`atrous_kernels.upsample_cross_entropy`. Like :class:`torch.nn.CrossEntropyLoss`, which it replaces
    together with the upsampling before it, it keeps ``weight`` as a buffer.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        hard_fraction: float = 1.0,
        align_corners: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.hard_fraction, self.align_corners, self.backend = hard_fraction, align_corners, backend

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            hard_fraction=self.hard_fraction,
            align_corners=self.align_corners,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, "
            f"hard_fraction={self.hard_fraction}, align_corners={self.align_corners}"
        )


class PyramidPooling(torch.nn.Module):
    """Pyramid pooling (Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2 and figure 3).

    Input ``[N, in_channels, H, W]``, output ``[N, in_channels + len(bins) * out_channels, H, W]``: the input and, per level,
    its average over a grid of bins, a 1x1 convolution, BatchNorm and ReLU, upsampled bilinearly; in the order of ``bins``.
    Keys are those of the authors' PyTorch code: ``features.LEVEL.1`` (convolution) and ``features.LEVEL.2`` (BatchNorm).

    Args:
        out_channels: of each level; the paper has ``in_channels / len(bins)``.
        bins: rows and columns of each level's grid.
        align_corners: of the upsampling; the paper's code has True, most other libraries False.

    Raises:
        ValueError: training with a single value per channel (one image and a level of one bin), which BatchNorm cannot take.
    """

    def __init__(
        self, in_channels: int, out_channels: int, bins: Sequence[int] = (1, 2, 3, 6), *, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.align_corners = align_corners
        self.features = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.AdaptiveAvgPool2d(level),  # says what the level is; all levels are pooled together
                Conv2d(in_channels, out_channels, 1, bias=False),
                torch.nn.BatchNorm2d(out_channels),
                torch.nn.ReLU(inplace=True),
            )
            for level in self.bins
        )

    def levels(self, x: Tensor) -> list[Tensor]:
        """Per level ``[N, out_channels, bin, bin]``, before the upsampling."""
        out = []
        for feature, pooled in zip(self.features, pyramid_pool(x, self.bins), strict=True):
            _, conv, norm, activation = cast(torch.nn.Sequential, feature)
            if norm.training and pooled.shape[0] == 1 and pooled.shape[2] * pooled.shape[3] == 1:
                raise ValueError(
                    "training with a batch of 1: BatchNorm of the 1x1 level has one value per channel, so no statistics. Use a "
                    "batch of at least 2 (drop an incomplete last batch), bins without 1, or keep BatchNorm in eval mode"
                )
            out.append(activation(norm(conv(pooled))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return upsample_concat(x, self.levels(x), align_corners=self.align_corners)


class PSPHead(torch.nn.Module):
    """Pyramid pooling, 3x3 convolution, BatchNorm, ReLU, dropout and the classifier: ``[N, in_channels, H, W]`` to logits.

    The convolution over the concatenation runs as :func:`atrous_kernels.psp_conv`: the concatenation is never stored, and its
    pooled half is applied at bin resolution. Keys are those of the authors' PyTorch code: ``ppm`` and ``cls``.

    Args:
        channels: of the 3x3 convolution (512 in the paper).
        bins, align_corners: as in :class:`PyramidPooling`, whose levels have ``in_channels // len(bins)`` channels each.
        dropout: of whole channels, before the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        *,
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        width = max(1, in_channels // len(bins))
        self.ppm = PyramidPooling(in_channels, width, bins, align_corners=align_corners)
        self.cls = torch.nn.Sequential(
            Conv2d(in_channels + len(bins) * width, channels, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels),
            torch.nn.ReLU(inplace=True),
            torch.nn.Dropout2d(dropout),
            Conv2d(channels, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, self.cls[0].weight)
        return self.cls[1:](psp_conv(x, self.ppm.levels(x), weight, align_corners=self.ppm.align_corners))
