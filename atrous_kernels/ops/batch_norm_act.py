"""Batch normalisation and activation: ``torch.ops.atrous.batch_norm_act_train``, its backward, and the same with the statistics
of a process group.

Training saves the input and the statistics; the backward pass recomputes from them where the activation held the gradient back.
Differentiated again (``create_graph=True``), the backward is a composition of plain PyTorch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import native
from atrous_kernels.ops import conv2d as conv
from atrous_kernels.ops.conv_bn_act import BOUNDS
from atrous_kernels.reference import conv_bn_relu as reference
from atrous_kernels.triton import conv_bn_relu as triton

Passes = Callable[..., Any]
Merge = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, int]]
#: Mean and moment, where the convolution has taken them already.
Known = tuple[Tensor, Tensor] | None

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define(
    "batch_norm_act_train(Tensor input, Tensor? weight, Tensor? bias, float eps, str activation, str backend, "
    "Tensor? mean=None, Tensor? moment=None, Tensor? residual=None) -> (Tensor output, Tensor mean, Tensor moment)"
)
_library.define(
    "batch_norm_act_train_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor moment, "
    "float eps, str activation, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define("batch_norm_act_(Tensor(a!) input, Tensor mean, Tensor scale, Tensor shift, str activation, str backend) -> ()")


# Passes ---------------------------------------------------------------------------------------------------------------


def _native_pass(name: str, *args: Any) -> Any:
    missing = native.cpu_missing()  # loads the library at the first call
    if missing is not None:
        raise RuntimeError(f"conv_bn_relu: backend 'cpu': {missing}")
    return getattr(torch.ops.atrous_native, name)(*args)


def _triton_pass(name: str, *args: Any) -> Any:
    return getattr(triton, name)(*args)


def _reference_pass(name: str, *args: Any) -> Any:
    return getattr(reference, name)(*args)


PASSES: dict[str, Passes] = {"cpu": _native_pass, "triton": _triton_pass, "reference": _reference_pass}


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
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Output, mean, moment (sum of squared distances from the mean) and the number of elements behind them."""
    mean, moment = run("batch_norm_statistics", input) if known is None else known
    mean, moment, count = merge(mean, moment, count_of(input))
    _, scale, shift = _parameters(mean, moment, count, weight, bias, eps)
    added = () if residual is None else (residual.contiguous(memory_format=_layout(input)),)
    output = run("batch_norm_act", input, mean, scale, shift, *BOUNDS[activation], *added)
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


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, contiguous or channels-last."""
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
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    # An op may not give back what it was given.
    known = None if mean is None or moment is None else (mean.clone(), moment.clone())
    return train_pass(PASSES[backend], dense(input), weight, bias, eps, activation, known=known, residual=residual)[:3]


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
    input = dense(input)
    return train_gradients(PASSES[backend], grad, input, weight, bias, mean, moment, count_of(input), eps, activation)


def _apply_(input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: str, backend: str) -> None:
    PASSES[backend]("batch_norm_act_", input, mean, scale, shift, *BOUNDS[activation])


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
def _train_fake(input, weight, bias, eps, activation, backend, mean=None, moment=None, residual=None):
    return torch.empty_like(input, memory_format=_layout(input)), _empty_sums(input), _empty_sums(input)


@torch.library.register_fake("atrous::batch_norm_act_train_backward", lib=_library)
def _train_backward_fake(grad, input, weight, bias, mean, moment, eps, activation, backend):
    return torch.empty_like(input, memory_format=_layout(input)), torch.empty_like(mean), torch.empty_like(mean)


@torch.library.register_fake("atrous::batch_norm_act_", lib=_library)
def _apply_fake(input, mean, scale, shift, activation, backend):
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, *ctx.rest = inputs[:6]
    # With a residual, the output says where the activation held it.
    ctx.save_for_backward(input, weight, bias, *output[1:], *(output[:1] if inputs[8] is not None else ()))
    ctx.mark_non_differentiable(*output[1:])


def of_parameter(grad: Tensor, parameter: Tensor | None) -> Tensor | None:
    """The gradient in the parameter's type; None where there is no parameter."""
    return None if parameter is None else grad.to(parameter.dtype)


def gradient_inside(grad: Tensor, output: Tensor, activation: str) -> Tensor:
    """The gradient before an activation with this output."""
    if activation == "none":
        return grad
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, output, 0)
    return torch.ops.aten.hardtanh_backward(grad, output, *BOUNDS[activation])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    input, weight, bias, mean, moment, *output = ctx.saved_tensors
    eps, activation, backend = ctx.rest
    d_residual = None
    if output:
        grad = d_residual = gradient_inside(grad, output[0], activation)
        activation = "none"
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        d_input, d_weight, d_bias = reference.gradients(grad, input, weight, bias, eps, *BOUNDS[activation])
    else:
        d_input, d_weight, d_bias = torch.ops.atrous.batch_norm_act_train_backward.default(
            grad, input, weight, bias, mean, moment, eps, activation, backend
        )
    # The given statistics are those of the input, so the input's gradient holds their share.
    return d_input, of_parameter(d_weight, weight), of_parameter(d_bias, bias), *(None,) * 5, d_residual


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
        mean: Tensor | None,
        moment: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        def merge(mean: Tensor, moment: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
            whole = merge_statistics(*_gather(mean, moment, count, group))
            return whole[0].to(mean.dtype), whole[1].to(mean.dtype), whole[2]

        input, known = dense(input), None if mean is None or moment is None else (mean, moment)
        output, mean, moment, count = train_pass(PASSES[backend], input, weight, bias, eps, activation, merge, known)
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
            PASSES[ctx.backend], grad, input, weight, bias, mean, moment, count, eps, activation, merge
        )
        return d_input, of_parameter(d_weight, weight), of_parameter(d_bias, bias), *(None,) * 6


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
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Normalised and activated output; mean, moment and count of the batch (of the group, where one is given)."""
    if group is not None:
        return _SynchronisedTrain.apply(input, weight, bias, eps, activation, backend, group, *(known or (None, None)))
    mean, moment = known or (None, None)
    results = batch_norm_act_train(input, weight, bias, eps, activation, backend, mean, moment, residual)
    return (*results, count_of(input))
