"""Modules over :mod:`atrous_kernels.functional`, with the state_dict keys of their :mod:`torch.nn` twins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels.functional import conv2d


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
