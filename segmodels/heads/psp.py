"""The head of PSPNet as a classifier of :class:`segmodels.models.SegmentationModel`, with the variants of its ablation.

Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2; average or maximum, with and without dimension reduction:
section 5.2, table 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from atrous_kernels import nn
from atrous_kernels.functional import psp_conv, pyramid_pool
from atrous_kernels.nn import Conv2d


class PSPHead(nn.PSPHead):
    """:class:`atrous_kernels.nn.PSPHead`: its bins are shares of the map, so they hold at every output stride.

    Args:
        mode: of the pooling, ``"avg"`` or ``"max"``.
        reduction: with a 1x1 convolution, BatchNorm and ReLU to ``in_channels // len(bins)`` channels per level; without, the
            levels keep their channels and the head has no ``ppm.features``.
        kernel, predict_kernel: of the convolution over the concatenation (the paper: 3) and of the classifier (the paper: 1).
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
        mode: str = "avg",
        reduction: bool = True,
        kernel: int = 3,
        predict_kernel: int = 1,
    ) -> None:
        if not bins or not all(isinstance(level, int) and level >= 1 for level in bins):
            raise ValueError(f"bins={tuple(bins)}: expected one or more positive integers, for example (1, 2, 3, 6)")
        if mode not in ("avg", "max"):
            raise ValueError(f"mode={mode!r}: expected 'avg' or 'max'")
        for name, value in (("kernel", kernel), ("predict_kernel", predict_kernel)):
            if value not in (1, 3):
                raise ValueError(f"{name}={value!r}: expected 1 or 3")
        super().__init__(in_channels, channels, num_classes, bins, dropout=dropout, align_corners=align_corners)
        self.mode = mode
        width = in_channels // len(bins)
        if not reduction:
            self.ppm.features = torch.nn.ModuleList()
            width = in_channels
        if kernel != 3 or not reduction:
            self.cls[0] = Conv2d(in_channels + len(bins) * max(1, width), channels, kernel, padding=kernel // 2, bias=False)
        if predict_kernel != 1:
            self.cls[4] = Conv2d(channels, num_classes, predict_kernel, padding=predict_kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = pyramid_pool(x, self.ppm.bins, mode=self.mode)
        levels = self.ppm._project(pooled) if len(self.ppm.features) else pooled
        weight = cast(Tensor, self.cls[0].weight)
        return self.cls[1:](psp_conv(x, levels, weight, align_corners=self.ppm.align_corners))

    def set_output_stride(self, output_stride: int) -> None:
        """Nothing depends on it."""
