"""The functions that people call. Shapes, dtypes, errors and sources are documented here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels import dispatch
from atrous_kernels.ops import aspp as _aspp_op
from atrous_kernels.ops import conv2d as _conv2d_op
from atrous_kernels.ops import conv_bn_relu as _conv_bn_relu_op
from atrous_kernels.ops import psp_conv as _psp_conv_op
from atrous_kernels.ops import pyramid_pool as _pyramid_pool_op
from atrous_kernels.ops import upsample_argmax as _upsample_argmax_op
from atrous_kernels.ops import upsample_concat as _upsample_concat_op
from atrous_kernels.ops import upsample_cross_entropy as _upsample_cross_entropy_op
from atrous_kernels.ops.aspp import ConvBN
from atrous_kernels.problem import ConvProblem, UpsampleProblem, out_extent

Size = int | Sequence[int]


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
        backend: ``"auto"``, ``"winograd"``, ``"cpu"``, ``"triton"``, ``"cuda"``, ``"torch"`` (the framework's own) or
            ``"reference"``.

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
    _check_tensors(input, weight, bias)
    unbatched = input.dim() == 3
    if unbatched:
        input = input.unsqueeze(0)
    if not (type(stride) is tuple and type(dilation) is tuple and len(stride) == 2 == len(dilation)):
        stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, stride, dilation)
    elif not (type(padding) is tuple and len(padding) == 2):
        padding = _pair("padding", padding)
    _check_geometry(input, weight, bias, stride, padding, dilation, groups, unbatched)
    out = _conv2d_op.conv2d(input, weight, bias, stride, padding, dilation, groups, backend)
    return out.squeeze(0) if unbatched else out


def pyramid_pool(
    input: Tensor, bins: Sequence[Size] = (1, 2, 3, 6), *, mode: str = "avg", backend: str = "auto"
) -> list[Tensor]:
    """Adaptive pooling of one map to several grids, reading it once.

    Args:
        input: ``[N, C, H, W]``, floating point, any strides; ``N`` may be 0.
        bins: per level the rows and columns of its grid: an int for both, or a pair. Any number of levels; grids need not
            divide the map (bins then overlap) and may be finer than it.
        mode: ``"avg"`` or ``"max"`` (on a tie the gradient goes to the first pixel in reading order).
        backend: ``"auto"``, ``"cpu"``, ``"torch"`` (the framework's own, level by level) or ``"reference"``.

    Returns:
        Per level ``[N, C, rows, columns]``, equal to :func:`torch.nn.functional.adaptive_avg_pool2d` or
        ``adaptive_max_pool2d`` to that grid. The levels are views of one buffer, channels last.

    Raises:
        TypeError, ValueError: an argument outside these, or an unknown ``backend``.
        RuntimeError: a ``backend`` asked for by name cannot run this problem; the message says why.

    Differentiable twice. Source: Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2.
    """
    levels = _check_pyramid(input, bins, mode)
    flat = [size for level in levels for size in level]
    packed, _ = _pyramid_pool_op.pyramid_pool(input, flat, mode == "max", backend)
    out, begin = [], 0
    for rows, columns in levels:
        cells = packed[:, begin : begin + rows * columns]
        out.append(cells.unflatten(1, (rows, columns)).permute(0, 3, 1, 2))
        begin += rows * columns
    return out


def upsample_concat(
    input: Tensor, levels: Sequence[Tensor], *, align_corners: bool = False, backend: str = "auto"
) -> Tensor:
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
    _check_levels("upsample_concat", input, levels)
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
        backend: of the convolution of the input's half, as in :func:`conv2d`.

    Returns:
        ``[N, O, H, W]``; channels-last where the input or the weight is.

    Raises:
        TypeError, ValueError, RuntimeError: an argument outside these; see :func:`conv2d`.

    Differentiable twice. Source of the layer: Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2; the algebra is
    derived in docs/kernels.md.
    """
    _check_levels("psp_conv", input, levels)
    channels = input.shape[1] + sum(level.shape[1] for level in levels)
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[1] != channels:
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight of shape {shape}: expected [O, {channels}, kh, kw], {channels} being the channels of all maps")
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight of shape {list(weight.shape)}: expected an odd kernel")
    return _psp_conv_op.psp_conv(input, list(levels), weight, bias, align_corners, backend)


def _check_levels(op: str, input: Tensor, levels: Sequence[Tensor]) -> None:
    if not isinstance(levels, (tuple, list)) or not all(isinstance(t, Tensor) for t in (input, *levels)):
        raise TypeError(f"{op}(): expected a tensor and a list of tensors, not {type(input).__name__}, {type(levels).__name__}")
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(f"input of shape {list(input.shape)}, {input.dtype}: expected floating-point [N, C, H, W]")
    for level in levels:
        if level.dim() != 4 or level.shape[0] != input.shape[0] or 0 in level.shape[2:]:
            raise ValueError(f"level of shape {list(level.shape)}: expected [{input.shape[0]}, c, h, w] with at least one pixel")
        if level.device != input.device or (
            level.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type)
        ):
            raise ValueError(
                f"level of {level.dtype} on {level.device}: expected {input.dtype} on {input.device}, as the input"
            )


def describe_concat(
    input: Tensor, levels: Sequence[Tensor], *, align_corners: bool = False
) -> _upsample_concat_op.ConcatProblem:
    """The numbers of a call with the arguments of :func:`upsample_concat`, checked the same way."""
    _check_levels("upsample_concat", input, levels)
    return _upsample_concat_op.problem_of(input, levels, align_corners)


def _check_pyramid(input: Tensor, bins: Sequence[Size], mode: str) -> list[tuple[int, int]]:
    if not isinstance(input, Tensor):
        raise TypeError(f"pyramid_pool(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(f"input of shape {list(input.shape)}, {input.dtype}: expected floating-point [N, C, H, W]")
    if 0 in input.shape[1:]:
        raise ValueError(f"input of shape {list(input.shape)}: expected at least one channel and one pixel")
    if not isinstance(bins, (tuple, list)) or not bins:
        raise ValueError(f"bins={bins!r}: expected one grid per level, for example (1, 2, 3, 6)")
    levels = [_grid(bins, level) for level in bins]
    if mode not in ("avg", "max"):
        raise ValueError(f"mode={mode!r}: expected 'avg' or 'max'")
    return levels


def _grid(bins: Sequence[Size], level: Size) -> tuple[int, int]:
    pair = (level, level) if isinstance(level, int) else tuple(level) if isinstance(level, (tuple, list)) else ()
    if len(pair) != 2 or not all(type(size) is int and size >= 1 for size in pair):
        raise ValueError(f"bins={bins!r}: {level!r} is not a positive integer or a pair of them")
    return pair[0], pair[1]


def describe_pyramid(
    input: Tensor, bins: Sequence[Size] = (1, 2, 3, 6), *, mode: str = "avg"
) -> _pyramid_pool_op.PyramidProblem:
    """The numbers of a call with the arguments of :func:`pyramid_pool`, checked the same way."""
    flat = [size for level in _check_pyramid(input, bins, mode) for size in level]
    return _pyramid_pool_op.problem_of(input.shape, flat, mode == "max", input)


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
        process_group: of :mod:`torch.distributed`, on any device: statistics of the batches of all its processes together.
        backend: ``"auto"``, ``"cpu"``, ``"torch"`` (the framework's batch_norm) or ``"reference"``; the convolution inside an
            ``"auto"`` call chooses for itself.

    Returns:
        ``[N, O, H', W']``, sizes and layout as :func:`conv2d`.

    Raises:
        RuntimeError, TypeError: as :func:`conv2d`; ValueError: a batch norm argument of the wrong size, unknown
            ``activation`` or ``backend``, no running statistics in inference, a single value per channel in training.

    Differentiable twice, except with a process group (once). Source: Ioffe & Szegedy, "Batch Normalization", 2015,
    algorithms 1 and 2.
    """
    norm = (bn_weight, bn_bias, running_mean, running_var)
    input, geometry = _check_conv_bn_relu(input, weight, norm, stride, padding, dilation, groups, training, activation)
    if training and process_group is None:
        height, width = (out_extent(*a) for a in zip(input.shape[2:], weight.shape[2:], *geometry[:3], strict=True))
        if input.shape[0] * height * width == 1:
            raise ValueError(f"expected more than 1 value per channel when training, but got input of size {list(input.shape)}")
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
        backend=backend,
    )


def _check_conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    norm: Sequence[Tensor | None],
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    training: bool,
    activation: str,
) -> tuple[Tensor, tuple[Any, Any, Any, int]]:
    """The (possibly padded) input and the geometry, checked."""
    _check_tensors(input, weight, None)
    if input.dim() != 4:
        raise RuntimeError(f"expected input [N, C, H, W] to conv_bn_relu, but got input of size: {list(input.shape)}")
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, stride, dilation)
    padding = _pair("padding", padding)
    _check_geometry(input, weight, None, stride, padding, dilation, groups, False)
    _check_norm(weight, norm, training)
    if activation not in _conv_bn_relu_op.BOUNDS:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(_conv_bn_relu_op.BOUNDS)}")
    return input, (stride, padding, dilation, groups)


def _check_norm(weight: Tensor, norm: Sequence[Tensor | None], training: bool) -> None:
    for name, value in zip(("bn_weight", "bn_bias", "running_mean", "running_var"), norm, strict=True):
        if value is not None and tuple(value.shape) != (weight.shape[0],):
            raise ValueError(f"{name}: expected {weight.shape[0]} values, one per output channel, but got {list(value.shape)}")
    if not training and (norm[2] is None or norm[3] is None):
        raise ValueError("running_mean and running_var: expected tensors when training=False, but got None")
    if (norm[2] is None) != (norm[3] is None):
        raise ValueError("running_mean and running_var: expected both or neither, but got one")


def describe_conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    activation: str = "relu",
    process_group: Any = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **geometry: Any,
) -> _conv_bn_relu_op.ConvBnReluProblem:
    """The numbers of a call with the arguments of :func:`conv_bn_relu`; the statistics may be left out."""
    conv = describe(input, weight, **geometry)
    synchronised = training and process_group is not None
    return _conv_bn_relu_op.ConvBnReluProblem(input.dtype, input.device.type, training, synchronised, activation, conv)


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
    _check_aspp(input, branches, projection, pooling)
    if pooling is not None and process_group is None:
        _aspp_op.check_image_pooling(input.shape[0], pooling.training)
    return _aspp_op.aspp(input, branches, projection, pooling, process_group=process_group, backend=backend)


_AS_IT_IS = (1, 1), (0, 0), (1, 1), 1


def _check_aspp(input: Tensor, branches: Sequence[ConvBN], projection: ConvBN, pooling: ConvBN | None) -> None:
    if not branches:
        raise ValueError("branches: expected at least one, but got none")
    pooled = () if pooling is None else (pooling,)
    for index, one in enumerate((*branches, *pooled)):
        stride, padding, dilation, groups = one.geometry if one.weight.dim() == 4 else _AS_IT_IS
        _check_conv_bn_relu(input, one.weight, one[1:5], stride, padding, dilation, groups, one.training, "relu")
        if not all(size % 2 for size in one.weight.shape[2:]):
            raise ValueError(f"branch {index}: expected a kernel of odd size, but got weight of size {list(one.weight.shape)}")
    if pooling is not None and tuple(pooling.weight.shape[2:]) != (1, 1):
        raise ValueError(f"pooling: expected a 1x1 kernel, but got weight of size {list(pooling.weight.shape)}")
    width = sum(one.weight.shape[0] for one in (*branches, *pooled))
    if projection.weight.dim() != 4 or tuple(projection.weight.shape[1:]) != (width, 1, 1):
        raise ValueError(
            f"projection: expected weight of size [O, {width}, 1, 1] for the channels of all branches, but got "
            f"{list(projection.weight.shape)}"
        )
    _check_norm(projection.weight, projection[1:5], projection.training)


def describe_aspp(
    input: Tensor,
    branches: Sequence[ConvBN],
    projection: ConvBN,
    pooling: ConvBN | None = None,
    *,
    process_group: Any = None,
) -> _aspp_op.AsppProblem:
    """The numbers of a call with the arguments of :func:`aspp`, checked the same way."""
    _check_aspp(input, branches, projection, pooling)
    problems = tuple(describe(input, one.weight, None, *one.geometry) for one in branches)
    training = projection.training
    synchronised = training and process_group is not None
    return _aspp_op.AsppProblem(problems, projection.weight.shape[0], pooling is not None, training, synchronised)


def explain(op: str, *args: Any, backend: str = "auto", **kwargs: Any) -> dispatch.Explanation:
    """Every implementation of ``op`` for a call with these arguments: chosen, or why not. Runs nothing.

    ``op`` is the name of a function of this module, or of its gradient, which takes the same arguments: ``"conv2d_input"``,
    ``"conv2d_weight"``, ``"pyramid_pool_input"``.

    Raises:
        ValueError: unknown op or backend; RuntimeError: a backend asked for by name that cannot run.
    """
    if op not in _DESCRIBE:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(_DESCRIBE)}")
    problem = _DESCRIBE[op](*args, **kwargs)
    return dispatch.explain(op, problem, backend if backend != "auto" else dispatch.default_backend(op))


def describe(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> ConvProblem:
    """The numbers of a call with the arguments of :func:`conv2d`, checked the same way."""
    _check_tensors(input, weight, bias)
    unbatched = input.dim() == 3
    input = input.unsqueeze(0) if unbatched else input
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, stride, dilation)
    padding = _pair("padding", padding)
    _check_geometry(input, weight, bias, stride, padding, dilation, groups, unbatched)
    channels_last = _conv2d_op.is_channels_last(input) or _conv2d_op.is_channels_last(weight)
    return _conv2d_op.problem_of(input.shape, weight.shape, (stride, padding, dilation, groups), input, channels_last)


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"conv2d(): argument '{name}' must be Tensor, not {type(value).__name__}")
    if weight.dim() != 4:
        raise RuntimeError(
            f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight {list(weight.shape)}, which "
            f"conv2d() does not take: it expects a 4-dimensional weight [O, C/groups, kh, kw]"
        )
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(input.shape)}"
        )


def _pair(name: str, value: Size) -> tuple[int, int]:
    """An int, a one-element or a two-element sequence as (height, width)."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value, value
    if not isinstance(value, (tuple, list, torch.Size)) or not all(
        isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in value
    ):
        raise TypeError(f"conv2d(): argument '{name}' must be an int or a tuple of ints, not {value!r}")
    if len(value) not in (1, 2):
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of 2 values, but got {name}={list(value)}"
        )
    return value[0], value[-1]


def _resolve_padding(
    input: Tensor, weight: Tensor, padding: str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: {padding!r}: expected 'same' or 'valid'")
    if stride != (1, 1):
        raise RuntimeError(f"padding='same' is not supported for strided convolutions, but got stride={stride}")
    total = [rate * (size - 1) for rate, size in zip(dilation, weight.shape[2:], strict=True)]
    odd = [t % 2 for t in total]
    if any(odd):  # the framework, too, puts the extra zero after the last row or column
        input = F.pad(input, (0, odd[1], 0, odd[0]))
    return input, (total[0] // 2, total[1] // 2)


def _check_geometry(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    unbatched: bool,
) -> None:
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"conv2d(): argument 'groups' must be int, not {type(groups).__name__}")
    if groups <= 0:
        raise RuntimeError(f"non-positive groups is not supported, but got groups={groups}")
    if min(stride) <= 0:
        raise RuntimeError(f"non-positive stride is not supported, but got stride={stride}")
    if min(padding) < 0:
        raise RuntimeError(f"negative padding is not supported, but got padding={padding}")
    if min(dilation) <= 0:
        raise RuntimeError(f"dilation should be greater than zero, but got dilation={dilation}")
    out_channels, per_group, *kernel = weight.shape
    size = list(input.shape[1:] if unbatched else input.shape)
    if out_channels % groups or out_channels < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0 and divisible by {groups}, "
            f"but got weight of size {list(weight.shape)} instead"
        )
    if input.shape[1] != per_group * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected input{size} to have "
            f"{per_group * groups} channels, but got {input.shape[1]} channels instead"
        )
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with {out_channels} elements, "
            f"but got bias of size {list(bias.shape)} instead"
        )
    for value in (weight, bias):
        if value is not None and value.device != input.device:
            raise RuntimeError(f"expected input and parameters on one device, but got {input.device} and {value.device}")
        if value is not None and value.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise RuntimeError(f"Input type ({input.dtype}) and weight or bias type ({value.dtype}) should be the same")
    padded = [n + 2 * p for n, p in zip(input.shape[2:], padding, strict=True)]
    spread = [rate * (k - 1) + 1 for rate, k in zip(dilation, kernel, strict=True)]
    if min(kernel) <= 0 or padded[0] < spread[0] or padded[1] < spread[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). "
            f"Kernel size: ({spread[0]} x {spread[1]}). Kernel size can't be greater than actual input size"
        )


# Losses and classes at full resolution ----------------------------------------------------------------------------------


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
        backend: ``"auto"``, ``"cpu"``, ``"torch"`` (the framework's operators) or ``"reference"``.

    Returns:
        A scalar, or ``[N, H, W]`` for "none"; float64 for float64 logits, else float32.

    Raises:
        TypeError, ValueError: wrong types, sizes or options; the message names the value and what was expected.
        RuntimeError: a label that is neither a class nor ``ignore_index``; a ``backend`` that cannot run.
        NotImplementedError: a second derivative.

    Where a gradient will be needed, it is computed at low resolution together with the loss. Sources: upsampling the logits
    rather than shrinking the labels: DeepLabv3, section 4.1; hard pixels: Wu et al. 2016, arXiv:1605.06885.
    """
    _check_upsampled("upsample_cross_entropy", logits)
    _check_target(logits, target, weight)
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
    _check_upsampled("upsample_argmax", logits)
    return _upsample_argmax_op.upsample_argmax(logits.detach(), _rows_and_columns(size), align_corners, backend)


def _check_upsampled(op: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{op}(): argument 'logits' must be Tensor, not {type(logits).__name__}")
    if logits.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"logits of dtype {logits.dtype}: expected float32, float64, bfloat16 or float16")
    if logits.dim() != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"logits of shape {list(logits.shape)}: expected [N, C, h, w], a class and a pixel at least")


def _check_target(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"upsample_cross_entropy(): argument 'target' must be Tensor, not {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"target of dtype {target.dtype}: expected int64, int32 or uint8")
    batch, classes = logits.shape[:2]
    if target.dim() != 3 or target.shape[0] != batch or 0 in target.shape[1:]:
        raise ValueError(f"target of shape {list(target.shape)}: expected [{batch}, H, W], a pixel at least")
    if weight is not None:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError("weight: expected a floating-point tensor or None")
        if tuple(weight.shape) != (classes,):
            raise ValueError(f"weight of shape {list(weight.shape)}: expected [{classes}], one factor per class")
        if weight.requires_grad:
            raise ValueError("weight requires a gradient: expected constants")
    for name, value in (("target", target), ("weight", weight)):
        if value is not None and value.device != logits.device:
            raise ValueError(f"{name} is on {value.device}: expected {logits.device}, where the logits are")


def _rows_and_columns(size: Size) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) and n > 0 for n in pair):
        raise ValueError(f"size={size}: expected positive numbers of rows and columns")
    return pair[0], pair[1]


def describe_loss(logits: Tensor, target: Tensor, **_: Any) -> UpsampleProblem:
    """The numbers of a call of :func:`upsample_cross_entropy`."""
    _check_upsampled("upsample_cross_entropy", logits)
    _check_target(logits, target, None)
    return _upsample_cross_entropy_op.problem_of(logits, target.shape[1:])


def describe_argmax(logits: Tensor, size: Size, **_: Any) -> UpsampleProblem:
    """The numbers of a call of :func:`upsample_argmax`."""
    _check_upsampled("upsample_argmax", logits)
    return _upsample_cross_entropy_op.problem_of(logits, _rows_and_columns(size))


# Per op, the function that turns the arguments of a call into a problem.
_DESCRIBE: dict[str, Callable[..., dispatch.Problem]] = {
    "conv2d": describe,
    "conv2d_input": describe,
    "conv2d_weight": describe,
    "pyramid_pool": describe_pyramid,
    "pyramid_pool_input": describe_pyramid,
    "upsample_cross_entropy": describe_loss,
    "upsample_argmax": describe_argmax,
    "upsample_concat": describe_concat,
    "conv_bn_relu": describe_conv_bn_relu,
    "aspp": describe_aspp,
}
