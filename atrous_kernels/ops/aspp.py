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

from atrous_kernels import dispatch, native
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops import conv_bn_relu as fused
from atrous_kernels.problem import ConvProblem


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
    if problem.dtype not in fused.NATIVE_DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, fused.NATIVE_DTYPES))}"
    return native.cpu_missing()


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

    widths = [branch.weight.shape[0] for branch in (*branches, *((pooling,) if pooling is not None else ()))]
    norm = fused.Normalisation(projection[1:5], projection.training, projection.momentum, projection.eps, process_group)
    weight, bias = norm.fold(input, projection.weight, backend)
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


def _add(total: Tensor, share: Tensor) -> Tensor:
    # Neither gradient needs the sum's terms. Views of some convolutions (the reference) may not be overwritten.
    return total + share if torch.compiler.is_compiling() or total._is_view() else total.add_(share)


def _run(*args: Any, **kwargs: Any) -> Tensor:
    return aspp(*args, **kwargs)


dispatch.register(
    "aspp",
    [
        Implementation("cpu", _run, _cpu_can_run, _fine),
        Implementation("torch", _run, _torch_can_run, _fine),
        Implementation("reference", _run, _fine, _last_resort),
    ],
)
