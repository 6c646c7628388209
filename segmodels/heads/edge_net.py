"""EdgeNet: the edges that a domain transform keeps, predicted from features in the middle of a network.

Chen et al., "Semantic Image Segmentation with Task-Specific Edge Detection Using CNNs and a Discriminatively Trained Domain
Transform", 2016, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels import conv2d
from atrous_kernels.nn import Conv2d
from segmodels.models.base import upsample


class EdgeNet(nn.Module):
    """Features of several levels, upsampled bilinearly and concatenated, through a 1x1 convolution to one channel and a ReLU.

    A 1x1 convolution and an interpolation may change places: the convolution runs at each level's own resolution, and one
    channel per level is upsampled instead of all of them.

    Args:
        channels: of each level.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.predict = Conv2d(sum(self.channels), 1, 1)

    def forward(self, levels: Sequence[Tensor], size: torch.Size) -> Tensor:
        """Density of edges ``[N, 1, *size]``, at least 0, of levels ``[N, c, h, w]``.

        Raises:
            ValueError: levels that are not as many as ``channels``.
        """
        weights = self.predict.weight.split(self.channels, 1)
        # The weights of an interpolation add up to one, so one level may bring the bias along.
        biases = [self.predict.bias, *(None for _ in weights[1:])]
        operands = zip(levels, weights, biases, strict=True)
        maps = [upsample(conv2d(level, weight, bias), size) for level, weight, bias in operands]
        return F.relu(sum(maps[1:], maps[0]))
