"""Atrous spatial pyramid pooling without its concatenation.

The projection of a concatenation is a sum of 1x1 convolutions, one per branch with its slice of the weight, and the image
pooling branch is the same at every pixel, so its share of that sum is a bias per image. Both are exact. Made of
:mod:`atrous_kernels.ops.conv_bn_relu` and :mod:`atrous_kernels.ops.conv2d`, and so are its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atrous_kernels import dispatch, native, observers
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops import conv_bn_relu as fused
from atrous_kernels.ops.aspp_branches import aspp_branches, aspp_branches_act
from atrous_kernels.ops.batch_norm_act import train
from atrous_kernels.ops.conv_bn_act import NATIVE_DTYPES, conv_bn_act
from atrous_kernels.problem import ConvProblem
from atrous_kernels.reference.conv_bn_relu import sum_type
from atrous_kernels.triton import runtime
from atrous_kernels.triton.aspp import MOST_BRANCHES


class ConvBN(NamedTuple):
    """A centred convolution ``[O, C, k, k]`` (odd ``k``, stride 1) and its batch normalisation.

    ``bn_weight`` and ``bn_bias`` may be None; the running statistics too, while ``training``.
    """

    weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    dilation: tuple[int, int] = (1, 1)
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding, dilation, groups."""
        (rate_h, rate_w), (kernel_h, kernel_w) = self.dilation, self.weight.shape[2:]
        return (1, 1), (rate_h * (kernel_h // 2), rate_w * (kernel_w // 2)), (rate_h, rate_w), 1


@dataclass(frozen=True)
class AsppProblem:
    """One call as numbers; ``convs`` are the branches without image pooling."""

    convs: tuple[ConvProblem, ...]
    out_channels: int
    image_pooling: bool
    training: bool
    synchronised: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.convs[0].dtype

    @property
    def device_type(self) -> str:
        return self.convs[0].device_type

    def cost(self) -> str:
        """One line for :func:`atrous_kernels.explain`."""
        valid = sum(problem.valid_flops for problem in self.convs)
        share = valid / max(sum(problem.dense_flops for problem in self.convs), 1)
        first = self.convs[0]
        pixels = first.batch * first.in_size[0] * first.in_size[1]
        project = 2 * pixels * self.out_channels * sum(problem.out_channels for problem in self.convs)
        return f"{valid / 1e9:.3g} GFLOP on valid taps ({share:.0%} of dense), projection {project / 1e9:.3g} GFLOP"

    def __str__(self) -> str:
        first = self.convs[0]
        rates = ", ".join(f"{p.kernel[0]}x{p.kernel[1]} rate {p.dilation[0]}" for p in self.convs)
        mode = ("training, synchronised" if self.synchronised else "training") if self.training else "inference"
        return (
            f"{first.batch}x{first.in_channels}->{self.out_channels} {first.in_size[0]}x{first.in_size[1]} [{rates}]"
            f"{' and image pooling' if self.image_pooling else ''} {mode} {str(self.dtype).removeprefix('torch.')} "
            f"{'channels_last' if first.channels_last else 'contiguous'} on {self.device_type}"
        )


def _cpu_can_run(problem: AsppProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    if problem.dtype not in NATIVE_DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, NATIVE_DTYPES))}"
    return native.cpu_missing()


def _triton_can_run(problem: AsppProblem) -> str | None:
    return next((reason for reason in map(runtime.can_run, problem.convs) if reason is not None), None)


def _torch_can_run(problem: AsppProblem) -> str | None:
    return "the framework's batch_norm knows no process group" if problem.synchronised else None


def _fine(problem: AsppProblem) -> None:
    return None


def _last_resort(problem: AsppProblem) -> str:
    return "plain PyTorch, tap by tap: for checking, not for speed"


def check_image_pooling(batch: int, training: bool) -> None:
    """Raises ValueError for one image in training: its batch normalisation would have a single value per channel."""
    if batch == 1 and training:
        raise ValueError(
            "training with a batch of 1: BatchNorm of the image pooling branch has one value per channel, so no "
            "statistics. Use a batch of at least 2 (drop an incomplete last batch), image_pooling=False, or keep "
            "BatchNorm in eval mode"
        )


def aspp(
    input: Tensor,
    branches: Sequence[ConvBN],
    projection: ConvBN,
    pooling: ConvBN | None,
    *,
    process_group: Any,
    backend: str,
) -> Tensor:
    """Checked arguments; see :func:`atrous_kernels.aspp`."""

    def layer(x: Tensor, one: ConvBN) -> Tensor:
        return fused.conv_bn_relu(
            x,
            one.weight,
            one[1:5],
            one.geometry,
            training=one.training,
            momentum=one.momentum,
            eps=one.eps,
            activation="relu",
            process_group=process_group,
            backend=backend,
        )

    norm = fused.Normalisation(projection[1:5], projection.training, projection.momentum, projection.eps, process_group)
    others = (projection,) if pooling is None else (projection, pooling)
    if process_group is None and _fits_one_launch(input, branches, others, backend):
        pooled = None if pooling is None else layer(input.mean((2, 3), keepdim=True), pooling)
        return _together(input, branches, projection, pooled, norm)
    weight, bias = norm.fold(input, projection.weight, backend)
    widths = [branch.weight.shape[0] for branch in (*branches, *((pooling,) if pooling is not None else ()))]
    parts = weight.split(widths, dim=1)
    inner = fused.inner_backend(input, projection.training, process_group, backend)
    total: Tensor | None = None
    for index, branch in enumerate(branches):  # one branch at a time: in inference none outlives its product
        share = conv.conv2d(layer(input, branch), parts[index], bias if index == 0 else None, *_POINTWISE, inner)
        total = share if total is None else _add(total, share)
    assert total is not None
    if pooling is not None:
        pooled = layer(input.mean((2, 3), keepdim=True), pooling)
        total = _add(total, conv.conv2d(pooled, parts[-1], None, *_POINTWISE, inner))
    return norm.apply(total, folded=bias is not None, activation="relu", backend=backend)


_POINTWISE = (1, 1), (0, 0), (1, 1), 1


def _fits_one_launch(input: Tensor, branches: Sequence[ConvBN], others: Sequence[ConvBN], backend: str) -> bool:
    """Whether Triton's kernel for all branches was asked for, and their normalisations are alike.

    ``others``, the projection and image pooling, have to be in the same mode.
    """
    first = branches[0]
    kinds = {(b.eps, b.bn_weight is None, b.bn_bias is None) for b in branches}
    modes = {b.training for b in (*branches, *others)}
    too_large = input.shape[0] * input.shape[2] * input.shape[3] > runtime.MAX_PIXELS  # the composition says so
    if len(branches) > MOST_BRANCHES or len(kinds) > 1 or len(modes) > 1 or too_large:
        return False
    leaves = [t for b in (*branches, *others) for t in b[:3]]
    # Constant statistics with gradients are folded into the weights, branch by branch.
    if not first.training and observers.recorded(input, *leaves):
        return False
    return fused.chosen(input, first.training, None, "relu", backend) == "triton"


def _together(
    input: Tensor, branches: Sequence[ConvBN], projection: ConvBN, pooled: Tensor | None, norm: fused.Normalisation
) -> Tensor:
    """All branches in one launch, then the projection of all their channels as one convolution."""
    training, eps = branches[0].training, branches[0].eps
    input, weight, pooled, *weights = fused.autocast(input, projection.weight, pooled, *(b.weight for b in branches))
    dilations = [rate for branch in branches for rate in branch.dilation]
    gain, bias = _side_by_side([b.bn_weight for b in branches]), _side_by_side([b.bn_bias for b in branches])
    of_maps = sum(w.shape[0] for w in weights)
    weight, of_pooled = weight.split([of_maps, weight.shape[1] - of_maps], dim=1)
    share = None if pooled is None else conv.conv2d(pooled, of_pooled, None, *_POINTWISE, "triton")
    if training:
        maps, mean, moment = aspp_branches(input, weights, dilations)
        maps, mean, moment, count = train(maps, gain, bias, eps, "relu", "triton", None, (mean, moment))
        at = 0
        for branch in branches:
            here = slice(at, at + branch.weight.shape[0])
            at = here.stop
            if branch.running_mean is not None and branch.running_var is not None and count > 0:
                statistics = (branch.running_mean, branch.running_var, mean[here], moment[here], count, branch.momentum)
                fused.update_running(*statistics)
        total = conv.conv2d(maps, weight, None, *_POINTWISE, "triton")
        total = total if share is None else _add(total, share)
        return norm.apply(total, folded=False, activation="relu", backend="triton")
    mean, var = _side_by_side([b.running_mean for b in branches]), _side_by_side([b.running_var for b in branches])
    assert mean is not None
    assert var is not None
    maps = aspp_branches_act(input, weights, dilations, gain, bias, mean, var, eps, "relu")
    p_gain, p_bias, p_mean, p_var = projection[1:5]
    assert p_mean is not None
    assert p_var is not None
    residual = None
    if share is not None:  # the same at every pixel; it is added after the normalisation, so it is scaled beforehand
        scale = p_var.to(sum_type(share.dtype)).add(projection.eps).rsqrt()
        scale = scale if p_gain is None else scale * p_gain
        residual = (share * scale[:, None, None]).expand(-1, -1, *maps.shape[2:])
    return conv_bn_act(maps, weight, p_gain, p_bias, p_mean, p_var, residual, projection.eps, "relu", *_POINTWISE, "triton")


def _side_by_side(vectors: Sequence[Tensor | None]) -> Tensor | None:
    present = [vector for vector in vectors if vector is not None]
    return torch.cat(present) if present else None


def _add(total: Tensor, share: Tensor) -> Tensor:
    # Neither gradient needs the sum's terms. Views of some convolutions (the reference) may not be overwritten.
    return total + share if torch.compiler.is_compiling() or total._is_view() else total.add_(share)


def _run(*args: Any, **kwargs: Any) -> Tensor:
    return aspp(*args, **kwargs)


dispatch.register(
    "aspp",
    [
        Implementation("cpu", _run, _cpu_can_run, _fine),
        Implementation("triton", _run, _triton_can_run, conv.gpu_unmeasured),
        Implementation("torch", _run, _torch_can_run, _fine),
        Implementation("reference", _run, _fine, _last_resort),
    ],
)
