"""Arguments of the public functions: checked, with errors that name the value, and turned into the numbers of a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels import dispatch
from atrous_kernels.lattice_arguments import describe_filter, describe_lattice, describe_mean_field
from atrous_kernels.ops import aspp as _aspp_op
from atrous_kernels.ops import conv2d as _conv2d_op
from atrous_kernels.ops import conv_bn_relu as _conv_bn_relu_op
from atrous_kernels.ops import domain_transform as _domain_transform_op
from atrous_kernels.ops import pyramid_pool as _pyramid_pool_op
from atrous_kernels.ops import upsample_concat as _upsample_concat_op
from atrous_kernels.ops import upsample_cross_entropy as _upsample_cross_entropy_op
from atrous_kernels.ops.aspp import ConvBN
from atrous_kernels.ops.conv_bn_act import BOUNDS
from atrous_kernels.problem import ConvProblem, TransformProblem, UpsampleProblem, out_extent

Size = int | Sequence[int]


def check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"conv2d(): argument '{name}' must be Tensor, not {type(value).__name__}")
    if weight.dim() != 4:
        raise RuntimeError(
            f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight {list(weight.shape)}, which "
            f"conv2d() does not take: it expects a 4-dimensional weight [O, C/groups, kh, kw]"
        )
    if input.dim() not in (3, 4):
        raise RuntimeError(f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(input.shape)}")


def check_depthwise(input: Tensor, weight: Tensor) -> int:
    """The number of channels of the input: that of the groups."""
    check_tensors(input, weight, None)
    channels = input.shape[-3]
    if channels == 0:
        raise ValueError(f"input of shape {list(input.shape)}: expected at least one channel")
    if weight.shape[1] != 1 or weight.shape[0] % channels or weight.shape[0] == 0:
        raise ValueError(
            f"weight of shape {list(weight.shape)}: expected [{channels}, 1, kh, kw], or m * {channels} for m filters per "
            f"channel, as the input of shape {list(input.shape)} has {channels} channels"
        )
    return channels


def as_pair(name: str, value: Size) -> tuple[int, int]:
    """An int, a one-element or a two-element sequence as (height, width)."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int is type(value[1]):
        return value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value, value
    if not isinstance(value, (tuple, list, torch.Size)) or not all(
        isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in value
    ):
        raise TypeError(f"conv2d(): argument '{name}' must be an int or a tuple of ints, not {value!r}")
    if len(value) not in (1, 2):
        raise RuntimeError(f"expected {name} to be a single integer value or a list of 2 values, but got {name}={list(value)}")
    return value[0], value[-1]


def resolve_padding(
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


def check_geometry(
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
    check_tensors(input, weight, bias)
    unbatched = input.dim() == 3
    input = input.unsqueeze(0) if unbatched else input
    stride, dilation = as_pair("stride", stride), as_pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = resolve_padding(input, weight, padding, stride, dilation)
    padding = as_pair("padding", padding)
    check_geometry(input, weight, bias, stride, padding, dilation, groups, unbatched)
    channels_last = _conv2d_op.is_channels_last(input) or _conv2d_op.is_channels_last(weight)
    return _conv2d_op.problem_of(input.shape, weight.shape, (stride, padding, dilation, groups), input, channels_last)


def check_conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    norm: Sequence[Tensor | None],
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    training: bool,
    activation: str,
    residual: Tensor | None = None,
) -> tuple[Tensor, tuple[Any, Any, Any, int]]:
    """The (possibly padded) input and the geometry, checked."""
    check_tensors(input, weight, None)
    if input.dim() != 4:
        raise RuntimeError(f"expected input [N, C, H, W] to conv_bn_relu, but got input of size: {list(input.shape)}")
    stride, dilation = as_pair("stride", stride), as_pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = resolve_padding(input, weight, padding, stride, dilation)
    padding = as_pair("padding", padding)
    check_geometry(input, weight, None, stride, padding, dilation, groups, False)
    _check_norm(weight, norm, training)
    if activation not in BOUNDS:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(BOUNDS)}")
    if residual is not None:
        sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        height, width = (out_extent(*a) for a in sizes)
        expected = (input.shape[0], weight.shape[0], height, width)
        if tuple(residual.shape) != expected or residual.device != input.device:
            raise ValueError(
                f"residual: expected the sizes of the output {list(expected)} on {input.device}, "
                f"but got {list(residual.shape)} on {residual.device}"
            )
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


_AS_IT_IS = (1, 1), (0, 0), (1, 1), 1


def check_aspp(input: Tensor, branches: Sequence[ConvBN], projection: ConvBN, pooling: ConvBN | None) -> None:
    if not branches:
        raise ValueError("branches: expected at least one, but got none")
    pooled = () if pooling is None else (pooling,)
    for index, one in enumerate((*branches, *pooled)):
        stride, padding, dilation, groups = one.geometry if one.weight.dim() == 4 else _AS_IT_IS
        check_conv_bn_relu(input, one.weight, one[1:5], stride, padding, dilation, groups, one.training, "relu")
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
    check_aspp(input, branches, projection, pooling)
    problems = tuple(describe(input, one.weight, None, *one.geometry) for one in branches)
    training = projection.training
    synchronised = training and process_group is not None
    return _aspp_op.AsppProblem(problems, projection.weight.shape[0], pooling is not None, training, synchronised)


def check_pyramid(input: Tensor, bins: Sequence[Size], mode: str) -> list[tuple[int, int]]:
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


def describe_pyramid(input: Tensor, bins: Sequence[Size] = (1, 2, 3, 6), *, mode: str = "avg") -> _pyramid_pool_op.PyramidProblem:
    """The numbers of a call with the arguments of :func:`pyramid_pool`, checked the same way."""
    flat = [size for level in check_pyramid(input, bins, mode) for size in level]
    return _pyramid_pool_op.problem_of(input.shape, flat, mode == "max", input)


def check_levels(op: str, input: Tensor, levels: Sequence[Tensor]) -> None:
    if not isinstance(levels, (tuple, list)) or not all(isinstance(t, Tensor) for t in (input, *levels)):
        raise TypeError(f"{op}(): expected a tensor and a list of tensors, not {type(input).__name__}, {type(levels).__name__}")
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(f"input of shape {list(input.shape)}, {input.dtype}: expected floating-point [N, C, H, W]")
    for level in levels:
        if level.dim() != 4 or level.shape[0] != input.shape[0] or 0 in level.shape[2:]:
            raise ValueError(f"level of shape {list(level.shape)}: expected [{input.shape[0]}, c, h, w] with at least one pixel")
        if level.device != input.device or (level.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type)):
            raise ValueError(f"level of {level.dtype} on {level.device}: expected {input.dtype} on {input.device}, as the input")


def describe_concat(input: Tensor, levels: Sequence[Tensor], *, align_corners: bool = False) -> _upsample_concat_op.ConcatProblem:
    """The numbers of a call with the arguments of :func:`upsample_concat`, checked the same way."""
    check_levels("upsample_concat", input, levels)
    return _upsample_concat_op.problem_of(input, levels, align_corners)


def check_upsampled(op: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{op}(): argument 'logits' must be Tensor, not {type(logits).__name__}")
    if logits.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"logits of dtype {logits.dtype}: expected float32, float64, bfloat16 or float16")
    if logits.dim() != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"logits of shape {list(logits.shape)}: expected [N, C, h, w], a class and a pixel at least")


def check_target(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
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


def rows_and_columns(size: Size) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) and n > 0 for n in pair):
        raise ValueError(f"size={size}: expected positive numbers of rows and columns")
    return pair[0], pair[1]


def describe_loss(logits: Tensor, target: Tensor, **_: Any) -> UpsampleProblem:
    """The numbers of a call of :func:`upsample_cross_entropy`."""
    check_upsampled("upsample_cross_entropy", logits)
    check_target(logits, target, None)
    return _upsample_cross_entropy_op.problem_of(logits, target.shape[1:])


def describe_argmax(logits: Tensor, size: Size, **_: Any) -> UpsampleProblem:
    """The numbers of a call of :func:`upsample_argmax`."""
    check_upsampled("upsample_argmax", logits)
    return _upsample_cross_entropy_op.problem_of(logits, rows_and_columns(size))


def check_transform(input: Tensor, edge: Tensor, sigma_s: float, sigma_r: float, iterations: int) -> None:
    for name, value in (("input", input), ("edge", edge)):
        if not isinstance(value, Tensor):
            raise TypeError(f"domain_transform(): argument '{name}' must be Tensor, not {type(value).__name__}")
        if value.dim() != 4 or not value.is_floating_point() or 0 in value.shape[1:]:
            shape = f"{list(value.shape)}, {value.dtype}"
            raise ValueError(f"{name} of shape {shape}: expected floating-point [N, C, H, W], a channel and a pixel at least")
    batch, _, height, width = input.shape
    if edge.shape[0] != batch or edge.shape[2:] != input.shape[2:] or edge.shape[1] not in (1, 2):
        raise ValueError(f"edge of shape {list(edge.shape)}: expected [{batch}, 1 or 2, {height}, {width}], as the input")
    if edge.device != input.device:
        raise ValueError(f"edge on {edge.device}: expected {input.device}, where the input is")
    for name, sigma in (("sigma_s", sigma_s), ("sigma_r", sigma_r)):
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"{name}={sigma!r}: expected a number above 0")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r}: expected 1 or more")


def describe_transform(input: Tensor, edge: Tensor, sigma_s: float, sigma_r: float, iterations: int = 3) -> TransformProblem:
    """The numbers of a call of :func:`domain_transform`."""
    check_transform(input, edge, sigma_s, sigma_r, iterations)
    return _domain_transform_op.problem_of(input, iterations)


# Per op, the function that turns the arguments of a call into a problem.
DESCRIBE: dict[str, Callable[..., dispatch.Problem]] = {
    "conv2d": describe,
    "conv2d_input": describe,
    "conv2d_weight": describe,
    "pyramid_pool": describe_pyramid,
    "pyramid_pool_input": describe_pyramid,
    "upsample_cross_entropy": describe_loss,
    "upsample_argmax": describe_argmax,
    "upsample_concat": describe_concat,
    "domain_transform": describe_transform,
    "domain_transform_backward": describe_transform,
    "conv_bn_relu": describe_conv_bn_relu,
    "aspp": describe_aspp,
    "permutohedral_lattice": describe_lattice,
    "permutohedral_filter": describe_filter,
    "mean_field": describe_mean_field,
}
