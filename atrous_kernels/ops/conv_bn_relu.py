"""Convolution, batch normalisation and activation: ``torch.ops.atrous.batch_norm_act_train``, its backward, and how
:func:`atrous_kernels.conv_bn_relu` puts them behind :mod:`atrous_kernels.ops.conv2d`.

Training saves the convolution's output and the statistics; the backward pass recomputes from them where the activation held
the gradient back. Differentiated again (``create_graph=True``), the backward is a composition of plain PyTorch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atrous_kernels import dispatch, native
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops.conv2d_statistics import conv2d_statistics
from atrous_kernels.ops.conv_bn_act import BOUNDS, NATIVE_DTYPES, conv_bn_act, conv_bn_act_kernel
from atrous_kernels.problem import ConvProblem
from atrous_kernels.reference import conv_bn_relu as reference
from atrous_kernels.triton import conv_bn_relu as triton
from atrous_kernels.triton import runtime

Passes = Callable[..., Any]
Merge = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, int]]
#: Mean and moment, where the convolution has taken them already.
Known = tuple[Tensor, Tensor] | None

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define(
    "batch_norm_act_train(Tensor input, Tensor? weight, Tensor? bias, float eps, str activation, str backend, "
    "Tensor? mean=None, Tensor? moment=None) -> (Tensor output, Tensor mean, Tensor moment)"
)
_library.define(
    "batch_norm_act_train_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor moment, "
    "float eps, str activation, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define("batch_norm_act_(Tensor(a!) input, Tensor mean, Tensor scale, Tensor shift, str activation, str backend) -> ()")


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


def _native_pass(name: str, *args: Any) -> Any:
    missing = native.cpu_missing()  # loads the library at the first call
    if missing is not None:
        raise RuntimeError(f"conv_bn_relu: backend 'cpu': {missing}")
    return getattr(torch.ops.atrous_native, name)(*args)


def _triton_pass(name: str, *args: Any) -> Any:
    return getattr(triton, name)(*args)


def _reference_pass(name: str, *args: Any) -> Any:
    return getattr(reference, name)(*args)


def _framework_pass(name: str, *args: Any) -> Any:
    raise AssertionError("the framework normalises in one call")


dispatch.register(
    "conv_bn_relu",
    [
        Implementation("cpu", _native_pass, _cpu_can_run, _never),
        Implementation("triton", _triton_pass, _triton_can_run, conv.gpu_unmeasured),
        Implementation("torch", _framework_pass, _torch_can_run, _never),
        Implementation("reference", _reference_pass, _never, _last_resort),
    ],
)
_PASSES: dict[str, Passes] = {"cpu": _native_pass, "triton": _triton_pass, "reference": _reference_pass}


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


# Training -------------------------------------------------------------------------------------------------------------


def _alone(mean: Tensor, moment: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    return mean, moment, count


def count_of(input: Tensor) -> int:
    """Elements per channel."""
    return input.shape[0] * input.shape[2] * input.shape[3]


def _parameters(mean: Tensor, moment: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """1 / standard deviation, scale and shift per channel, in the type of the sums."""
    inverse = moment.div(max(count, 1)).add_(eps).rsqrt_()
    scale = inverse if weight is None else inverse * weight
    shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return inverse, scale.contiguous(), shift.contiguous()


def train_pass(
    run: Passes,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    merge: Merge = _alone,
    known: Known = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Output, mean, moment (sum of squared distances from the mean) and the number of elements behind them."""
    mean, moment = run("batch_norm_statistics", input) if known is None else known
    mean, moment, count = merge(mean, moment, count_of(input))
    _, scale, shift = _parameters(mean, moment, count, weight, bias, eps)
    output = run("batch_norm_act", input, mean, scale, shift, *BOUNDS[activation])
    return output.contiguous(memory_format=_layout(input)), mean, moment, count


def train_gradients(
    run: Passes,
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    moment: Tensor,
    count: int,
    eps: float,
    activation: str,
    merge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in input, scale and shift; the last two of this process alone."""
    inverse, scale, shift = _parameters(mean, moment, count, weight, bias, eps)
    grad = grad.contiguous(memory_format=_layout(input))
    arguments = (grad, input, mean, scale, shift)
    total, product = mine = run("batch_norm_act_sums", *arguments, *BOUNDS[activation])
    if merge is not None:
        total, product = merge(*mine)
    slope = scale * inverse * inverse * product / -max(count, 1)
    offset = scale * total / -max(count, 1)
    d_input = run("batch_norm_act_input", *arguments, slope, offset, *BOUNDS[activation])
    return d_input.contiguous(memory_format=_layout(input)), mine[1] * inverse, mine[0]


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if conv.is_channels_last(tensor) else torch.contiguous_format


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=_layout(tensor))


def _train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    backend: str,
    mean: Tensor | None = None,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    # An op may not give back what it was given.
    known = None if mean is None or moment is None else (mean.clone(), moment.clone())
    return train_pass(_PASSES[backend], _dense(input), weight, bias, eps, activation, known=known)[:3]


def _train_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    moment: Tensor,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    input = _dense(input)
    return train_gradients(_PASSES[backend], grad, input, weight, bias, mean, moment, count_of(input), eps, activation)


def _apply_(input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: str, backend: str) -> None:
    _PASSES[backend]("batch_norm_act_", input, mean, scale, shift, *BOUNDS[activation])


for _name, _kernel in (
    ("batch_norm_act_train", _train),
    ("batch_norm_act_train_backward", _train_backward),
    ("batch_norm_act_", _apply_),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)


def _empty_sums(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=reference.sum_type(input.dtype))


@torch.library.register_fake("atrous::batch_norm_act_train", lib=_library)
def _train_fake(input, weight, bias, eps, activation, backend, mean=None, moment=None):
    return torch.empty_like(input, memory_format=_layout(input)), _empty_sums(input), _empty_sums(input)


@torch.library.register_fake("atrous::batch_norm_act_train_backward", lib=_library)
def _train_backward_fake(grad, input, weight, bias, mean, moment, eps, activation, backend):
    return torch.empty_like(input, memory_format=_layout(input)), torch.empty_like(mean), torch.empty_like(mean)


@torch.library.register_fake("atrous::batch_norm_act_", lib=_library)
def _apply_fake(input, mean, scale, shift, activation, backend):
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, *ctx.rest = inputs[:6]
    ctx.save_for_backward(input, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _of_parameter(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else grad.to(parameter.dtype)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    input, weight, bias, mean, moment = ctx.saved_tensors
    eps, activation, backend = ctx.rest
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        d_input, d_weight, d_bias = reference.gradients(grad, input, weight, bias, eps, *BOUNDS[activation])
    else:
        d_input, d_weight, d_bias = torch.ops.atrous.batch_norm_act_train_backward.default(
            grad, input, weight, bias, mean, moment, eps, activation, backend
        )
    # The given statistics are those of the input, so the input's gradient holds their share.
    return d_input, _of_parameter(d_weight, weight), _of_parameter(d_bias, bias), *(None,) * 5


torch.library.register_autograd("atrous::batch_norm_act_train", _backward, setup_context=_save, lib=_library)
batch_norm_act_train = torch.ops.atrous.batch_norm_act_train.default
batch_norm_act_ = torch.ops.atrous.batch_norm_act_.default


# Statistics of a process group -----------------------------------------------------------------------------------------


class _SynchronisedTrain(torch.autograd.Function):
    """As ``batch_norm_act_train`` with the statistics of all processes of a group."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: str,
        backend: str,
        group: Any,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        def merge(mean: Tensor, moment: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
            whole = merge_statistics(*_gather(mean, moment, count, group))
            return whole[0].to(mean.dtype), whole[1].to(mean.dtype), whole[2]

        input = _dense(input)
        output, mean, moment, count = train_pass(_PASSES[backend], input, weight, bias, eps, activation, merge)
        ctx.save_for_backward(input, weight, bias, mean, moment)
        ctx.mark_non_differentiable(mean, moment)
        ctx.rest = count, eps, activation
        # Weakly: a graph that is still there when the process exits must not keep the group's threads alive past its end.
        ctx.backend, ctx.group = backend, weakref.ref(group)
        return output, mean, moment, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("conv_bn_relu with a process group is differentiable once: no create_graph=True")
        input, weight, bias, mean, moment = ctx.saved_tensors
        count, eps, activation = ctx.rest
        group = ctx.group()
        if group is None:
            raise RuntimeError("conv_bn_relu: the process group of the forward pass was destroyed before the backward pass")

        def merge(total: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.stack([total, product])
            torch.distributed.all_reduce(both, group=group)
            return both[0], both[1]

        d_input, d_weight, d_bias = train_gradients(
            _PASSES[ctx.backend], grad, input, weight, bias, mean, moment, count, eps, activation, merge
        )
        return d_input, _of_parameter(d_weight, weight), _of_parameter(d_bias, bias), None, None, None, None


def _gather(mean: Tensor, moment: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Per process of the group: mean [P, C], moment [P, C], count [P]; float64, in the order of ranks on every process."""
    mine = torch.cat([mean.double(), moment.double(), mean.new_tensor([count], dtype=torch.float64)])
    each = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(each, mine, group=group)
    means, moments, counts = torch.stack(each).split([len(mean), len(moment), 1], dim=1)
    return means, moments, counts[:, 0]


def merge_statistics(means: Tensor, moments: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, int]:
    """Chan, Golub & LeVeque's union of parts ([P, C], [P, C], [P]): mean, moment and count of the whole."""
    count = counts.sum()
    mean = (means * counts[:, None]).sum(0) / count.clamp(min=1)
    moment = (moments + counts[:, None] * (means - mean).square()).sum(0)
    return mean, moment, int(count)


def train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    backend: str,
    group: Any,
    known: Known = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Normalised and activated output; mean, moment and count of the batch (of the group, where one is given)."""
    if group is not None:
        return _SynchronisedTrain.apply(input, weight, bias, eps, activation, backend, group)
    return (*batch_norm_act_train(input, weight, bias, eps, activation, backend, *(known or ())), count_of(input))


# The whole ------------------------------------------------------------------------------------------------------------


def chosen(input: Tensor, training: bool, group: Any, activation: str, backend: str) -> str:
    """The name of the implementation for such an input, in the dtype of an autocast region."""
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    return choose(backend, dtype, device, training, training and group is not None, activation)


def inner_backend(input: Tensor, training: bool, group: Any, backend: str) -> str:
    """What the convolution beside the normalisation is asked for."""
    return backend if backend == dispatch.AUTO else chosen(input, training, group, "relu", backend)


def gradients_wanted(*leaves: Tensor | None) -> bool:
    """Whether a graph is being recorded that one of the tensors is a part of."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)


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
        wanted = gradients_wanted(*leaves)
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

    def apply(self, out: Tensor, *, folded: bool, activation: str, backend: str, known: Known = None) -> Tensor:
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
        out, batch_mean, moment, count = train(out, bn_weight, bn_bias, self.eps, activation, name, self.process_group, known)
        if mean is not None and var is not None and count > 0:
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
    if not training and _finishes_sums(input, weight, norm, residual, backend):
        input, weight, residual = autocast(input, weight, residual)
        run: Any = conv_bn_act_kernel if conv.unobserved(input, weight, residual, *norm) else conv_bn_act
        return run(input, weight, *norm, residual, eps, activation, *geometry, backend)
    if residual is not None:
        out = conv_bn_relu(
            input, weight, norm, geometry, training=training, momentum=momentum, eps=eps, activation="none",
            process_group=process_group, backend=backend,
        )  # fmt: skip
        return activate(out + residual, activation, inplace=not torch.compiler.is_compiling())
    following = Normalisation(norm, training, momentum, eps, process_group)
    if training and process_group is None and chosen(input, True, None, activation, backend) == "triton":
        input, weight = autocast(input, weight)
        out, *known = conv2d_statistics(input, weight, *geometry, "triton")
        return following.apply(out, folded=False, activation=activation, backend=backend, known=known)
    weight, bias = following.fold(input, weight, backend)
    inner = inner_backend(input, training, process_group, backend)
    out = conv.conv2d(input, weight, bias, *geometry, inner)
    return following.apply(out, folded=bias is not None, activation=activation, backend=backend)


def _finishes_sums(input: Tensor, weight: Tensor, norm: Sequence[Tensor | None], residual: Tensor | None, backend: str) -> bool:
    """Whether the convolution may normalise its own sums: nobody wants gradients and nobody asked for other kernels."""
    if gradients_wanted(input, weight, residual, *norm[:2]):
        return False
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
def update_running(mean: Tensor, var: Tensor, batch_mean: Tensor, moment: Tensor, count: int, momentum: float) -> None:
    """Moving averages, with the unbiased variance, as the framework's batch_norm."""
    mean.lerp_(batch_mean.to(mean.dtype), momentum)
    var.lerp_((moment / max(count - 1, 1)).to(var.dtype), momentum)
