"""Convolution, batch normalisation and activation: how :func:`atrous_kernels.conv_bn_relu` puts
:mod:`atrous_kernels.ops.batch_norm_act` behind :mod:`atrous_kernels.ops.conv2d`, or all in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atrous_kernels import dispatch, native, observers
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops.batch_norm_act import PASSES, Known, batch_norm_act_, count_of, train
from atrous_kernels.ops.conv2d_statistics import conv2d_statistics
from atrous_kernels.ops.conv_bn_act import NATIVE_DTYPES, Call, conv_bn_act, conv_bn_act_kernel
from atrous_kernels.ops.conv_bn_act_train import ConvBnActTrain
from atrous_kernels.problem import ConvProblem
from atrous_kernels.reference import conv_bn_relu as reference
from atrous_kernels.triton import runtime

# Choosing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvBnReluProblem:
    """One call as numbers. ``conv`` is None where only the normalisation's backend is chosen."""

    dtype: torch.dtype
    device_type: str
    training: bool
    synchronised: bool
    activation: str
    conv: ConvProblem | None = None

    def cost(self) -> str:
        """One line for :func:`atrous_kernels.explain`."""
        if self.conv is None:
            return "no convolution"
        height, width = self.conv.out_size
        size = self.conv.batch * self.conv.out_channels * height * width * self.dtype.itemsize / 1e6
        passes = 4 if self.training else 1
        return f"{self.conv.cost()}; normalisation: {passes} pass{'es' if passes > 1 else ''} over {size:.3g} MB"

    def __str__(self) -> str:
        mode = ("training, synchronised" if self.synchronised else "training") if self.training else "inference"
        what = self.conv or f"{str(self.dtype).removeprefix('torch.')} on {self.device_type}"
        return f"{what}, batch norm ({mode}), {self.activation}"


def _cpu_can_run(problem: ConvBnReluProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    if problem.dtype not in NATIVE_DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, NATIVE_DTYPES))}"
    return native.cpu_missing()


def _triton_can_run(problem: ConvBnReluProblem) -> str | None:
    if problem.conv is not None:
        return runtime.can_run(problem.conv)
    return runtime.unavailable(problem.device_type, problem.dtype)


def _torch_can_run(problem: ConvBnReluProblem) -> str | None:
    return "the framework's batch_norm knows no process group" if problem.synchronised else None


def _never(problem: ConvBnReluProblem) -> None:
    return None


def _last_resort(problem: ConvBnReluProblem) -> str:
    return "plain PyTorch, pass by pass: for checking, not for speed"


def _framework_pass(name: str, *args: Any) -> Any:
    raise AssertionError("the framework normalises in one call")


dispatch.register(
    "conv_bn_relu",
    [
        Implementation("cpu", PASSES["cpu"], _cpu_can_run, _never),
        Implementation("triton", PASSES["triton"], _triton_can_run, conv.gpu_unmeasured),
        Implementation("torch", _framework_pass, _torch_can_run, _never),
        Implementation("reference", PASSES["reference"], _never, _last_resort),
    ],
)


def choose(backend: str, dtype: torch.dtype, device_type: str, training: bool, synchronised: bool, activation: str) -> str:
    """The name of the implementation. Sizes do not enter: the convolution inside chooses its own by them."""
    if backend == dispatch.AUTO:
        backend = dispatch.default_backend()
        if backend not in dispatch.backends("conv_bn_relu"):
            backend = dispatch.AUTO  # a default that other ops know
    key = (dtype, device_type, training, synchronised, activation)
    found = dispatch.cached("conv_bn_relu", backend, key)
    if found is None:
        problem = ConvBnReluProblem(dtype, device_type, training, synchronised, activation)
        found = dispatch.choose("conv_bn_relu", problem, backend, key)
    return found.name


# What torch.compiler.assume_constant_result sets; calling it would import the whole compiler, and Triton with it.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


# The whole ------------------------------------------------------------------------------------------------------------


def chosen(input: Tensor, training: bool, group: Any, activation: str, backend: str) -> str:
    """The name of the implementation for such an input, in the dtype of an autocast region."""
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    return choose(backend, dtype, device, training, training and group is not None, activation)


def inner_backend(input: Tensor, training: bool, group: Any, backend: str) -> str:
    """What the convolution beside the normalisation is asked for."""
    return backend if backend == dispatch.AUTO else chosen(input, training, group, "relu", backend)


class Normalisation(NamedTuple):
    """What follows a convolution: :meth:`fold` before it, :meth:`apply` after it."""

    norm: Sequence[Tensor | None]  # bn_weight, bn_bias, running_mean, running_var
    training: bool
    momentum: float
    eps: float
    process_group: Any

    def fold(self, input: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
        """The weight and bias to convolve with: folded (bias is not None) where the statistics are constant and gradients
        are wanted, which are then those of the convolution alone, any number of times."""
        bn_weight, bn_bias, mean, var = self.norm
        leaves = (input, weight, bn_weight, bn_bias)
        wanted = observers.recorded(*leaves)
        passes = chosen(input, self.training, self.process_group, "relu", backend) != "torch"
        if self.training or (passes and not wanted):
            return weight, None
        assert mean is not None
        assert var is not None
        wide = reference.sum_type(weight.dtype)
        scale = (var.to(wide) + self.eps).rsqrt()
        scale = scale if bn_weight is None else scale * bn_weight
        shift = -mean.to(wide) * scale
        shift = shift if bn_bias is None else shift + bn_bias
        return (weight.to(wide) * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)

    def apply(
        self,
        out: Tensor,
        *,
        folded: bool,
        activation: str,
        backend: str,
        known: Known = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalised (unless folded) and activated; ``out`` is overwritten where nobody needs it."""
        bn_weight, bn_bias, mean, var = self.norm
        name = chosen(out, self.training, self.process_group, activation, backend)
        if folded:
            # Some convolutions (the reference, empty ones) give a view, which autograd lets nobody overwrite.
            return activate(out, activation, inplace=not (torch.compiler.is_compiling() or out._is_view()))
        if not self.training:
            assert mean is not None
            assert var is not None
            wide = reference.sum_type(out.dtype)
            inverse = var.to(wide).add(self.eps).rsqrt_()
            scale = inverse if bn_weight is None else inverse * bn_weight
            shift = torch.zeros_like(inverse) if bn_bias is None else bn_bias.to(wide).contiguous()
            batch_norm_act_(out, mean.to(wide).contiguous(), scale, shift, activation, name)
            return out
        if name == "torch":
            out = torch.nn.functional.batch_norm(out, mean, var, bn_weight, bn_bias, True, self.momentum, self.eps)
            return activate(out, activation, inplace=True)
        out, batch_mean, moment, count = train(
            out, bn_weight, bn_bias, self.eps, activation, name, self.process_group, known, residual
        )
        update_running(mean, var, batch_mean, moment, count, self.momentum)
        return out


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    norm: Sequence[Tensor | None],
    geometry: tuple[Any, Any, Any, int],
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    process_group: Any,
    residual: Tensor | None = None,
    backend: str,
) -> Tensor:
    """``norm``: bn_weight, bn_bias, running_mean, running_var. Checked arguments; see :mod:`atrous_kernels.functional`."""
    if not training and not observers.recorded(input, weight, residual, *norm[:2]) and _finishes_sums(input, backend):
        input, weight, residual = autocast(input, weight, residual)
        run: Any = conv_bn_act_kernel if observers.unobserved(input, weight, residual, *norm) else conv_bn_act
        return run(input, weight, *norm, residual, eps, activation, *geometry, backend)
    name = chosen(input, True, process_group, activation, backend) if training else ""
    if statistics := name in ("cpu", "triton"):
        input, weight = autocast(input, weight)
    added_in_pass = name == "cpu" and process_group is None and residual is not None and residual.dtype is input.dtype
    if residual is not None and not added_in_pass:
        out = conv_bn_relu(
            input, weight, norm, geometry, training=training, momentum=momentum, eps=eps, activation="none",
            process_group=process_group, backend=backend,
        )  # fmt: skip
        return activate(out + residual, activation, inplace=not torch.compiler.is_compiling())
    following = Normalisation(norm, training, momentum, eps, process_group)
    if statistics:
        inner = inner_backend(input, True, process_group, backend)
        if process_group is None and observers.unobserved_but_for_autocast(input, weight, residual, *norm):
            bn_weight, bn_bias, running_mean, running_var = norm
            out, mean, moment = ConvBnActTrain.apply(
                input, weight, bn_weight, bn_bias, residual, geometry, inner, eps, activation, name
            )
            update_running(running_mean, running_var, mean, moment, count_of(out), momentum)
            return out
        out, *known = conv2d_statistics(input, weight, *geometry, inner)
        return following.apply(out, folded=False, activation=activation, backend=backend, known=known, residual=residual)
    weight, bias = following.fold(input, weight, backend)
    inner = inner_backend(input, training, process_group, backend)
    out = conv.conv2d(input, weight, bias, *geometry, inner)
    return following.apply(out, folded=bias is not None, activation=activation, backend=backend)


def finishing(
    input: Tensor, weight: Tensor, activation: str, geometry: tuple[Any, Any, Any, int], backend: str
) -> Callable[..., Tensor] | None:
    """What computes inference on dense tensors like these in the convolution's own pass, if anything does."""
    if not _finishes_sums(input, backend):
        return None
    return Call(input, weight, activation, geometry, backend)


def _finishes_sums(input: Tensor, backend: str) -> bool:
    """Whether the convolution may normalise its own sums: nobody asked for other kernels."""
    name = chosen(input, False, None, "relu", backend)
    if backend == dispatch.AUTO and dispatch.default_backend() not in (dispatch.AUTO, "cpu", "winograd", "triton"):
        return False
    return name in ("cpu", "triton")


def autocast(*tensors: Any) -> Any:
    """The tensors as an autocast region wants a convolution's, which the ops called with them do not do themselves."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype is torch.float64:
        return tensors
    return [None if tensor is None else tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def activate(tensor: Tensor, activation: str, inplace: bool) -> Tensor:
    """The activation by itself."""
    if activation == "none":
        return tensor
    function = torch.nn.functional.relu if activation == "relu" else torch.nn.functional.relu6
    return function(tensor, inplace=inplace)


@torch.no_grad()
def update_running(
    mean: Tensor | None, var: Tensor | None, batch_mean: Tensor, moment: Tensor, count: int, momentum: float
) -> None:
    """Moving averages, with the unbiased variance, as the framework's batch_norm."""
    if mean is not None and var is not None and count > 0:
        mean.lerp_(batch_mean.to(mean.dtype), momentum)
        var.lerp_((moment / max(count - 1, 1)).to(var.dtype), momentum)
