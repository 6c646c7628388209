"""The functions that people call (more in :mod:`atrous_kernels.filters`): shapes, dtypes, errors and sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch, observers, repeats
from atrous_kernels.arguments import (
    DESCRIBE,
    Size,
    as_pair,
    check_aspp,
    check_conv_bn_relu,
    check_depthwise,
    check_geometry,
    check_levels,
    check_pyramid,
    check_target,
    check_tensors,
    check_upsampled,
    resolve_padding,
    rows_and_columns,
)
from atrous_kernels.ops import aspp as _aspp_op
from atrous_kernels.ops import conv2d as _conv2d_op
from atrous_kernels.ops import conv_bn_relu as _conv_bn_relu_op
from atrous_kernels.ops import psp_conv as _psp_conv_op
from atrous_kernels.ops import pyramid_pool as _pyramid_pool_op
from atrous_kernels.ops import upsample_argmax as _upsample_argmax_op
from atrous_kernels.ops import upsample_concat as _upsample_concat_op
from atrous_kernels.ops import upsample_cross_entropy as _upsample_cross_entropy_op
from atrous_kernels.ops.aspp import ConvBN
from atrous_kernels.problem import out_extent


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """2-D (atrous) convolution: a drop-in for :func:`torch.nn.functional.conv2d`.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, contiguous, channels-last or any other strides; ``N`` may be 0.
        weight: ``[O, C / groups, kh, kw]``, same dtype and device as ``input``.
        bias: ``[O]`` or None.
        stride, dilation: a positive int, or one per axis. ``dilation`` is the papers' *rate*.
        padding: zeros on both sides of each axis: an int, one per axis, ``"valid"`` (none) or ``"same"`` (output as large as
            the input; stride 1 only).
        groups: ``C`` and ``O`` must be divisible by it.
        backend: ``"auto"``, ``"winograd"``, ``"cpu"``, ``"triton"``, ``"tensor_core"``, ``"cuda"``, ``"torch"`` (the framework's
            own) or ``"reference"``.

    Returns:
        ``[N, O, H', W']`` (or ``[O, H', W']``) with ``H' = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1``;
        channels-last where the input or the weight is.

    Raises:
        RuntimeError, TypeError: as :func:`torch.nn.functional.conv2d` for the same mistakes.
        ValueError: unknown ``backend``.
        RuntimeError: a ``backend`` asked for by name cannot run this problem; the message says why.

    Differentiable twice in input, weight and bias. The ``cpu``, ``triton`` and ``cuda`` kernels do not multiply padding
    zeros (one exception, for contiguous depthwise tensors: docs/architecture.md). Source: DeepLabv3, section 3.1,
    equation 1; Yu & Koltun, section 2.
    """
    given, key = input, None
    if observers.unobserved(input, weight, bias):
        key = repeats.signature((input, weight, bias), "conv2d", stride, padding, dilation, groups, backend)
        again = repeats.known(key)
        if again is not None:
            return _conv2d_op.run(again, input, weight, bias)
    check_tensors(input, weight, bias)
    unbatched = input.dim() == 3
    if unbatched:
        input = input.unsqueeze(0)
    if not (type(stride) is tuple and type(dilation) is tuple and len(stride) == 2 == len(dilation)):
        stride, dilation = as_pair("stride", stride), as_pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = resolve_padding(input, weight, padding, stride, dilation)
    elif not (type(padding) is tuple and len(padding) == 2):
        padding = as_pair("padding", padding)
    check_geometry(input, weight, bias, stride, padding, dilation, groups, unbatched)
    if key is None:
        out = _conv2d_op.conv2d(input, weight, bias, stride, padding, dilation, groups, backend)
    else:
        call = _conv2d_op.Call(input, weight, (stride, padding, dilation, groups), backend)
        if input is given and repeats.as_they_are(input, weight):
            repeats.keep(key, call)
        out = _conv2d_op.run(call, _conv2d_op.dense(input), _conv2d_op.dense(weight), bias)
    return out.squeeze(0) if unbatched else out


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """:func:`conv2d` with one group per channel: every filter reads one channel.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, ``C`` at least 1; dtypes and strides as :func:`conv2d`.
        weight: ``[C, 1, kh, kw]``, or ``[m C, 1, kh, kw]``: filters ``m c`` to ``m c + m - 1`` read channel ``c``.
        bias: ``[m C]`` or None.
        stride, padding, dilation, backend: as in :func:`conv2d`. Winograd's algorithm is not for depthwise convolution.

    Returns:
        ``[N, m C, H', W']`` (or ``[m C, H', W']``), sizes and layout as :func:`conv2d`.

    Raises:
        ValueError: a weight whose filters read more than one channel or do not divide among the channels; no channel.
        RuntimeError, TypeError, ValueError: as :func:`conv2d`.

    Differentiable twice in input, weight and bias. :func:`explain` knows it as ``"conv2d"`` with ``groups=C``.
    Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", 2018 (DeepLabv3+), section 3.1.
    """
    return conv2d(input, weight, bias, stride, padding, dilation, check_depthwise(input, weight), backend=backend)


def pyramid_pool(input: Tensor, bins: Sequence[Size] = (1, 2, 3, 6), *, mode: str = "avg", backend: str = "auto") -> list[Tensor]:
    """Adaptive pooling of one map to several grids, reading it once.

    Args:
        input: ``[N, C, H, W]``, floating point, any strides; ``N`` may be 0.
        bins: per level the rows and columns of its grid: an int for both, or a pair. Any number of levels; grids need not
            divide the map (bins then overlap) and may be finer than it.
        mode: ``"avg"`` or ``"max"`` (on a tie the gradient goes to the first pixel in reading order).
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"cuda"`` (16 levels at most), ``"torch"`` (the framework's own, level by
            level) or ``"reference"``.

    Returns:
        Per level ``[N, C, rows, columns]``, equal to :func:`torch.nn.functional.adaptive_avg_pool2d` or
        ``adaptive_max_pool2d`` to that grid. The levels are views of one buffer, channels last.

    Raises:
        TypeError, ValueError: an argument outside these, or an unknown ``backend``.
        RuntimeError: a ``backend`` asked for by name cannot run this problem; the message says why.

    Differentiable twice. Source: Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2.
    """
    levels = check_pyramid(input, bins, mode)
    flat = [size for level in levels for size in level]
    packed, _ = _pyramid_pool_op.pyramid_pool(input, flat, mode == "max", backend)
    return _pyramid_pool_op.unpacked(packed, flat)


def upsample_concat(input: Tensor, levels: Sequence[Tensor], *, align_corners: bool = False, backend: str = "auto") -> Tensor:
    """``torch.cat([input, *levels], 1)`` with the levels upsampled bilinearly to the size of the input, in one pass.

    Args:
        input: ``[N, C, H, W]``, floating point, any strides.
        levels: each ``[N, c, h, w]``, same batch, dtype and device; upsampled as :func:`torch.nn.functional.interpolate` does.
        align_corners: whether the corner pixels of a level lie on those of the input (True), or their areas are aligned.
        backend: as in :func:`pyramid_pool`.

    Returns:
        ``[N, C + sum of c, H, W]``; channels-last where the input is.

    Raises:
        TypeError, ValueError: an argument outside these; RuntimeError: as in :func:`pyramid_pool`.

    Differentiable twice.
    """
    check_levels("upsample_concat", input, levels)
    levels = [level.to(input.dtype) for level in levels]
    return _upsample_concat_op.upsample_concat(input, levels, align_corners, backend)


def psp_conv(
    input: Tensor,
    levels: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolution over ``upsample_concat(input, levels)`` with zero padding that keeps the size, without that tensor.

    The half of the weight that meets upsampled levels is applied at their own resolution; what is left to do per pixel is
    linear interpolation. Exact algebra: only the order of sums differs from the plain form.

    Args:
        input, levels, align_corners: as in :func:`upsample_concat`.
        weight: ``[O, C + sum of c, kh, kw]``, ``kh`` and ``kw`` odd; fastest channels-last.
        bias: ``[O]`` or None.
        backend: of the convolution of the input's half, as in :func:`conv2d`; "triton" adds the other half in one launch.

    Returns:
        ``[N, O, H, W]``; channels-last where the input or the weight is.

    Raises:
        TypeError, ValueError, RuntimeError: an argument outside these; see :func:`conv2d`.

    Differentiable twice. Source of the layer: Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2; the algebra is
    derived in docs/kernels.md.
    """
    check_levels("psp_conv", input, levels)
    channels = input.shape[1] + sum(level.shape[1] for level in levels)
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[1] != channels:
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight of shape {shape}: expected [O, {channels}, kh, kw], {channels} being the channels of all maps")
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight of shape {list(weight.shape)}: expected an odd kernel")
    return _psp_conv_op.psp_conv(input, list(levels), weight, bias, align_corners, backend)


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    residual: Tensor | None = None,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`conv2d`, :func:`torch.nn.functional.batch_norm` and an activation, in fewer passes over memory.

    Args:
        input, weight, stride, padding, dilation, groups: as in :func:`conv2d`; ``input`` is ``[N, C, H, W]``.
        bn_weight, bn_bias: ``[O]`` or None (no affine part); the dtype of ``weight`` or float32.
        running_mean, running_var: ``[O]``. Training moves them in place (unbiased variance) unless they are None; otherwise
            they are the statistics.
        training: normalise by the statistics of this batch. False with gradients is the frozen mode: differentiable in
            input, weight, bn_weight and bn_bias.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        activation: ``"relu"``, ``"relu6"`` or ``"none"``.
        residual: ``[N, O, H', W']``, added before the activation, as at the end of a residual block.
        process_group: of :mod:`torch.distributed`, on any device: statistics of the batches of all its processes together.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"torch"`` (the framework's batch_norm) or ``"reference"``; the
            convolution inside an ``"auto"`` call chooses for itself.

    Returns:
        ``[N, O, H', W']``, sizes and layout as :func:`conv2d`.

    Raises:
        RuntimeError, TypeError: as :func:`conv2d`; ValueError: a batch norm argument or a residual of the wrong size, unknown
            ``activation`` or ``backend``, no running statistics in inference, a single value per channel in training.

    Differentiable twice, except with a process group (once). Source: Ioffe & Szegedy, "Batch Normalization", 2015,
    algorithms 1 and 2.
    """
    norm = (bn_weight, bn_bias, running_mean, running_var)
    given, key = input, None
    tensors = (input, weight, residual, *norm)
    if not training and not observers.recorded(*tensors) and observers.unobserved(*tensors):
        key = repeats.signature(tensors, "conv_bn_relu", stride, padding, dilation, groups, activation, backend)
        again = repeats.known(key)
        if again is not None:
            return again(input, weight, norm, residual, eps)
    input, geometry = check_conv_bn_relu(input, weight, norm, stride, padding, dilation, groups, training, activation, residual)
    if training and process_group is None:
        height, width = (out_extent(*a) for a in zip(input.shape[2:], weight.shape[2:], *geometry[:3], strict=True))
        if input.shape[0] * height * width == 1:
            raise ValueError(f"expected more than 1 value per channel when training, but got input of size {list(input.shape)}")
    if key is not None and input is given and repeats.as_they_are(input, weight):
        finishing = _conv_bn_relu_op.finishing(input, weight, activation, geometry, backend)
        if finishing is not None:
            repeats.keep(key, finishing)
            return finishing(input, weight, norm, residual, eps)
    return _conv_bn_relu_op.conv_bn_relu(
        input,
        weight,
        norm,
        geometry,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
        process_group=process_group,
        residual=residual,
        backend=backend,
    )


def aspp(
    input: Tensor,
    branches: Sequence[ConvBN],
    projection: ConvBN,
    pooling: ConvBN | None = None,
    *,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """Atrous spatial pyramid pooling: convolutions side by side, each with batch norm and ReLU, projected by a 1x1
    convolution with batch norm and ReLU. Their concatenation is never made.

    Args:
        input: ``[N, C, H, W]``.
        branches: :class:`ConvBN` of odd kernels ``[O_i, C, k, k]``, centred, stride 1; at least one.
        projection: ``[O, sum of all O_i, 1, 1]``; slices of its input channels belong to ``branches`` in order, then to
            ``pooling``.
        pooling: image-level features, ``[O_p, C, 1, 1]``: the mean of the image through it, the same at every pixel.
        process_group, backend: as in :func:`conv_bn_relu`.

    Returns:
        ``[N, O, H, W]``, channels-last where the input or a weight is. 16-bit sums over branches are rounded after each branch.

    Raises:
        RuntimeError, TypeError: as :func:`conv_bn_relu`; ValueError: as there, no branch, a projection of other sizes, or one
            image in training with ``pooling``, whose statistics would be of a single value.

    Differentiable as :func:`conv_bn_relu`. Source: DeepLabv3, section 3.3 and figure 5.
    """
    check_aspp(input, branches, projection, pooling)
    if pooling is not None and process_group is None:
        _aspp_op.check_image_pooling(input.shape[0], pooling.training)
    return _aspp_op.aspp(input, branches, projection, pooling, process_group=process_group, backend=backend)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    hard_fraction: float = 1.0,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits, without the upsampled logits: equals
    ``F.cross_entropy(F.interpolate(logits.float(), target.shape[1:], mode="bilinear"), target, ...)``.

    Args:
        logits: ``[N, C, h, w]``, float32, float64, bfloat16 or float16, any strides. Differentiable once.
        target: ``[N, H, W]``, int64, int32 or uint8: classes 0 to C - 1, or ``ignore_index``.
        weight: ``[C]``, a non-negative factor per class, or None; not differentiable.
        ignore_index: label of pixels that do not count.
        reduction: ``"mean"`` (the sum of the losses over the sum of the weights of their labels; nan where no pixel counts),
            ``"sum"`` or ``"none"``.
        label_smoothing: 0 to 1, as in :func:`torch.nn.functional.cross_entropy`.
        hard_fraction: above 0, to 1. Below 1, only the hardest pixels are kept: of the V pixels of the batch that count, the
            ``ceil(hard_fraction * V)`` with the largest loss (class weight and smoothing included); among equal losses the
            first in the order of image, row, column. "mean" divides by the weights of the kept ones, "none" gives 0 for the
            others.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"cuda"``, ``"torch"`` (the framework's operators) or ``"reference"``.

    Returns:
        A scalar, or ``[N, H, W]`` for "none"; float64 for float64 logits, else float32.

    Raises:
        TypeError, ValueError: wrong types, sizes or options; the message names the value and what was expected.
        RuntimeError: a label that is neither a class nor ``ignore_index``; a ``backend`` that cannot run. "triton" and "cuda" do
            not wait for their kernels, so there such a label gives NaN instead: for the loss and the gradient of its pixel, and
            so for a sum, a mean and the whole gradient of a mean.
        NotImplementedError: a second derivative.

    Where a gradient will be needed, it is computed at low resolution together with the loss. Sources: upsampling the logits
    rather than shrinking the labels: DeepLabv3, section 4.1; hard pixels: Wu et al. 2016, arXiv:1605.06885.
    """
    check_upsampled("upsample_cross_entropy", logits)
    check_target(logits, target, weight)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing}: expected 0 to 1")
    if not 0 < hard_fraction <= 1:
        raise ValueError(f"hard_fraction={hard_fraction}: expected above 0, to 1")
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    options = (ignore_index, reduction, float(label_smoothing), float(hard_fraction), align_corners, with_gradient, backend)
    return _upsample_cross_entropy_op.upsample_cross_entropy(logits, target, weight, *options)[0]


def upsample_argmax(logits: Tensor, size: Size, *, align_corners: bool = False, backend: str = "auto") -> Tensor:
    """The most likely class of every pixel, without upsampled logits: equals
    ``F.interpolate(logits.float(), size, mode="bilinear").argmax(1)``.

    Args:
        logits: ``[N, C, h, w]``, float32, float64, bfloat16 or float16, any strides.
        size: H and W of the result, one int for both.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        backend: as in :func:`upsample_cross_entropy`.

    Returns:
        int64 ``[N, H, W]``. Of classes with equal logits the first, a NaN above all. Classes whose interpolated logits differ
        by a few units in the last place may come out differently from one backend to another: each rounds in its own order.

    Raises:
        TypeError, ValueError: wrong types or sizes. RuntimeError: a ``backend`` that cannot run.
    """
    check_upsampled("upsample_argmax", logits)
    return _upsample_argmax_op.upsample_argmax(logits.detach(), rows_and_columns(size), align_corners, backend)


def explain(op: str, *args: Any, backend: str = "auto", **kwargs: Any) -> dispatch.Explanation:
    """Every implementation of ``op`` for a call with these arguments: chosen, or why not. Runs nothing.

    ``op`` is the name of a function of this package, or of its gradient, which takes the same arguments: ``"conv2d_input"``,
    ``"conv2d_weight"``, ``"pyramid_pool_input"``, ``"domain_transform_backward"``.

    Raises:
        ValueError: unknown op or backend; RuntimeError: a backend asked for by name that cannot run.
    """
    if op not in DESCRIBE:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(DESCRIBE)}")
    problem = DESCRIBE[op](*args, **kwargs)
    return dispatch.explain(op, problem, backend if backend != "auto" else dispatch.default_backend(op))
