"""The context module (Yu & Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", 2016, section 3 and table 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d

#: Table 1: widths of the 3x3 layers as multiples of the number of classes. Longer and shorter modules are Basic.
LARGE_WIDTHS = (2, 2, 4, 8, 16, 32, 32)


class ContextModule(nn.Module):
    """3x3 convolutions of growing dilation, each with ReLU, and a linear 1x1: ``[N, C, h, w]`` to ``[N, C, h, w]``.

    Args:
        channels: C, the number of classes.
        dilations: of the 3x3 layers.
        widths: their channels as multiples of C; None is Basic, all C.
        pad_first: all zeros around the input at once, as the authors do for VOC, instead of those of each layer.
        noise: standard deviation of what :meth:`init_identity` leaves beside the identity.
        identity: False: Glorot's random initialisation, with which the authors found no improvement (section 3).

    Raises:
        ValueError: other than one width per dilation.
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = (1, 1, 2, 4, 8, 16, 1),
        widths: Sequence[int] | None = None,
        *,
        pad_first: bool = False,
        noise: float = 0.01,
        identity: bool = True,
    ) -> None:
        super().__init__()
        widths = (1,) * len(dilations) if widths is None else widths
        if len(widths) != len(dilations):
            raise ValueError(f"widths={tuple(widths)}: expected one for each of the dilations {tuple(dilations)}")
        self.channels = channels
        layers, inputs = [], channels
        for index, (dilation, width) in enumerate(zip(dilations, widths, strict=True)):
            padding = dilation if not pad_first else sum(dilations) if index == 0 else 0
            layers.append(Conv2d(inputs, channels * width, 3, padding=padding, dilation=dilation))
            inputs = channels * width
        self.layers = nn.ModuleList(layers)
        self.final = Conv2d(inputs, channels, 1)
        if identity:
            self.init_identity(noise)
            return
        for layer in (*self.layers, self.final):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x), inplace=True)
        return self.final(x)

    @torch.no_grad()
    def init_identity(self, noise: float = 0.01) -> None:
        """Equation 5, which for equal widths is equation 4: a layer adds up its input's channels of a class, and its own
        channels of that class share the sum. Without noise, a map without negative values passes through unchanged."""
        for layer in [*self.layers, self.final]:
            weight = layer.weight
            nn.init.normal_(weight, std=noise) if noise else nn.init.zeros_(weight)
            nn.init.zeros_(layer.bias)
            outputs, inputs, size, _ = weight.shape
            of_output = torch.arange(outputs) * self.channels // outputs
            of_input = torch.arange(inputs) * self.channels // inputs
            same = (of_output[:, None] == of_input[None, :]).to(weight.device)
            weight[:, :, size // 2, size // 2][same] = self.channels / outputs
