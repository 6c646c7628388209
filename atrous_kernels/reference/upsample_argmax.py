"""The most likely class of every pixel of bilinearly upsampled logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atrous_kernels.reference.upsample_cross_entropy import accumulator, axis_matrices


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """[N, C, h, w] -> int64 [N, H, W]."""
    logits = logits.to(accumulator(logits.dtype))
    rows, columns = axis_matrices(logits, size, align_corners)
    return torch.einsum("Yy,ncyx,Xx->ncYX", rows, logits, columns).argmax(1)
