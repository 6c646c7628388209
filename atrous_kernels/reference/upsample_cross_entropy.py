"""Cross-entropy of bilinearly upsampled logits and its gradient, by its definition: everything at full resolution.

With z the upsampled logits of a pixel, t its label, w the class weights, W their sum, s the label smoothing, C classes:

    loss     = (1 - s) w[t] (lse(z) - z[t]) + s / C (W lse(z) - sum over c of w[c] z[c])
    gradient = ((1 - s) w[t] + s W / C) softmax(z) - (1 - s) w[t] onehot(t) - s / C w
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of loss and arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def interpolation_matrix(n_in: int, n_out: int, align_corners: bool, like: Tensor) -> Tensor:
    """``[n_out, n_in]``: bilinear interpolation along one axis, two entries a row."""
    position = torch.arange(n_out, dtype=like.dtype, device=like.device)
    if align_corners:
        position = position * ((n_in - 1) / (n_out - 1) if n_out > 1 else 0.0)
    else:
        position = ((position + 0.5) * (n_in / n_out) - 0.5).clamp(min=0)
    left = position.long().clamp(max=n_in - 1)
    share = (position - left).clamp(0, 1)
    matrix = position.new_zeros(n_out, n_in)
    matrix.scatter_add_(1, left[:, None], (1 - share)[:, None])
    return matrix.scatter_add_(1, (left + 1).clamp(max=n_in - 1)[:, None], share[:, None])


def axis_matrices(logits: Tensor, size: Sequence[int], align_corners: bool) -> tuple[Tensor, Tensor]:
    """The matrices of rows and of columns."""
    height, width = (interpolation_matrix(*axis, align_corners, logits) for axis in zip(logits.shape[2:], size, strict=True))
    return height, width


def hard_pixels(loss: Tensor, counted: Tensor, fraction: float) -> Tensor:
    """bool ``[N, H, W]``: of the V counted pixels the ceil(fraction V) with the largest loss, NaN above all; among equal
    losses the first in the order of image, row, column."""
    keep = math.ceil(fraction * int(counted.sum()))
    if keep == 0:
        return torch.zeros_like(counted)
    rank = loss.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(~counted, -math.inf).flatten()
    smallest = rank.topk(keep, sorted=False).values.min()
    kept = rank > smallest
    ties = (rank == smallest).nonzero()[: keep - int(kept.sum()), 0]
    kept[ties] = True
    return kept.view_as(counted)


def cross_entropy(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    hard_fraction: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of logits at the resolution of the labels and its gradient ``[N, C, H, W]`` (empty unless asked for).

    ``upstream`` ``[N, H, W]`` multiplies the gradient of each pixel.

    Raises:
        RuntimeError: a label that is neither a class nor ``ignore_index``.
    """
    classes = z.shape[1]
    counted = target != ignore_index
    label = torch.where(counted, target.long(), 0)
    if label.numel() and (int(label.min()) < 0 or int(label.max()) >= classes):
        bad = int(label.min()) if int(label.min()) < 0 else int(label.max())
        raise RuntimeError(f"target: expected classes 0 to {classes - 1} or ignore_index={ignore_index}, but got {bad}")
    w = z.new_ones(classes) if weight is None else weight.to(z.dtype)
    log_p = z.log_softmax(1)
    smooth = label_smoothing / classes
    hard = (1 - label_smoothing) * w[label]
    loss = -hard * log_p.gather(1, label[:, None])[:, 0]
    if smooth:
        loss = loss - smooth * torch.einsum("nchw,c->nhw", log_p, w)
    loss = torch.where(counted, loss, 0)
    scale = counted.to(z.dtype)
    if hard_fraction < 1:
        scale = hard_pixels(loss, counted, hard_fraction).to(z.dtype)
        loss = loss * scale
    divisor = (w[label] * scale).sum() if reduction == "mean" else z.new_ones(())
    gradient = z.new_empty(0)
    if with_gradient:
        gradient = log_p.exp() * (hard + smooth * w.sum())[:, None]
        gradient.scatter_add_(1, label[:, None], -hard[:, None])
        if smooth:
            gradient -= smooth * w[:, None, None]
        scale = scale if upstream is None else scale * upstream
        gradient *= (scale / torch.where(divisor == 0, 1, divisor))[:, None]
    return (loss if reduction == "none" else loss.sum() / divisor), gradient


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    hard_fraction: float,
    align_corners: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """[N, C, h, w] and [N, H, W] -> the loss, and its gradient [N, C, h, w] (empty unless asked for)."""
    logits = logits.to(accumulator(logits.dtype))
    rows, columns = axis_matrices(logits, target.shape[1:], align_corners)
    z = torch.einsum("Yy,ncyx,Xx->ncYX", rows, logits, columns)
    loss, gradient = cross_entropy(
        z, target, weight, upstream, ignore_index, reduction, label_smoothing, hard_fraction, with_gradient
    )
    if with_gradient:
        gradient = torch.einsum("Yy,ncYX,Xx->ncyx", rows, gradient, columns)
    return loss, gradient
