"""Pyramid pooling, any layers over its levels, and their upsampling into one concatenation with the map.

The first and the last read the same map. Where no graph has to see what lies between, the map is copied into the concatenation
while it is pooled: it is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from atrous_kernels.observers import unobserved
from atrous_kernels.ops.pyramid_pool import implementation_of, pyramid_pool, unpacked
from atrous_kernels.ops.upsample_concat import upsample_concat


def pyramid_concat(
    input: Tensor,
    bins: Sequence[int],
    project: Callable[[list[Tensor]], list[Tensor]],
    channels: int,
    align_corners: bool,
    backend: str,
) -> Tensor:
    """``upsample_concat(input, project(pyramid_pool(input, bins)))``, where ``project`` gives ``channels`` channels in all."""
    direct = input.shape[0] > 0 and not torch.is_grad_enabled() and unobserved(input)
    if direct and implementation_of("pyramid_pool", backend, input.shape, bins, False, input).name == "cpu":
        native = torch.ops.atrous_native
        packed, output = native.pyramid_pool_copy(input, bins, input.shape[1] + channels)
        levels = [level.to(input.dtype) for level in project(unpacked(packed, bins))]
        native.upsample_into(output, input.shape[1], levels, align_corners)
        return output
    packed, _ = pyramid_pool(input, bins, False, backend)
    levels = [level.to(input.dtype) for level in project(unpacked(packed, bins))]
    return upsample_concat(input, levels, align_corners, backend)
