"""``torch.ops.atrous.conv2d`` and its two gradients ``conv2d_input`` and ``conv2d_weight``.

The three are closed under differentiation: each one's derivatives are the other two, so double backward is not a special
case. Padding here is symmetric; :mod:`atrous_kernels.functional` pads beforehand where ``padding="same"`` is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch, native, tuned
from atrous_kernels.dispatch import Implementation
from atrous_kernels.observers import recorded, unobserved
from atrous_kernels.ops import tensor_core, winograd
from atrous_kernels.ops.prepared_weights import prepared
from atrous_kernels.problem import ConvProblem, out_extent
from atrous_kernels.reference import conv2d as reference
from atrous_kernels.triton import conv2d as triton
from atrous_kernels.triton.runtime import dot_precision

_library = torch.library.Library("atrous", "FRAGMENT")
_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str backend"
_library.define(f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor")
_library.define(f"conv2d_input(SymInt[] input_size, Tensor weight, Tensor grad_output, {_GEOMETRY}) -> Tensor")
_library.define(f"conv2d_weight(Tensor input, SymInt[] weight_size, Tensor grad_output, {_GEOMETRY}) -> Tensor")

Ints = Sequence[int]


# Layout ---------------------------------------------------------------------------------------------------------------


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides say NHWC, by the framework's own rule (ambiguous shapes count as contiguous)."""
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        if tensor.is_contiguous():
            return False
    elif not tensor.is_contiguous() and 1 not in tensor.shape:  # strides along one index may be anything
        return True
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(sizes[dim], 1)
    return True


def layout_of(*tensors: Tensor) -> torch.memory_format:
    """Of a result: channels_last where one of the tensors is."""
    channels_last = any(is_channels_last(tensor) for tensor in tensors)
    return torch.channels_last if channels_last else torch.contiguous_format


def is_dense(tensor: Tensor) -> bool:
    """Whether kernels can read the tensor as it is: NCHW or NHWC without gaps."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy in the layout that its strides suggest, that kernels can read."""
    tensor = tensor.resolve_conj()
    return tensor if is_dense(tensor) else tensor.contiguous(memory_format=layout_of(tensor))


# Choosing -------------------------------------------------------------------------------------------------------------


def pick(
    op: str,
    backend: str,
    input_size: Ints,
    weight_size: Ints,
    geometry: tuple[Ints, Ints, Ints, int],
    tensor: Tensor,
    channels_last: bool,
) -> Implementation:
    """The implementation of ``op`` for such a call; ``tensor`` tells dtype and device."""
    if backend == dispatch.AUTO:
        backend = dispatch.default_backend()
    stride, padding, dilation, groups = geometry
    what = (*input_size, *weight_size, *stride, *padding, *dilation, groups)
    tf32 = tensor.is_cuda and dot_precision(tensor.dtype)
    key = (*what, tensor.dtype, tensor.device.type, channels_last, torch.get_num_threads(), tf32)
    found = dispatch.cached(op, backend, key)
    if found is None:
        found = dispatch.choose(op, problem_of(input_size, weight_size, geometry, tensor, channels_last), backend, key)
    return found


def problem_of(
    input_size: Ints,
    weight_size: Ints,
    geometry: tuple[Ints, Ints, Ints, int],
    tensor: Tensor,
    channels_last: bool,
) -> ConvProblem:
    """The numbers of one call."""
    stride, padding, dilation, groups = geometry
    return ConvProblem(
        batch=input_size[0],
        in_channels=input_size[1],
        out_channels=weight_size[0],
        in_size=(input_size[2], input_size[3]),
        kernel=(weight_size[2], weight_size[3]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        dtype=tensor.dtype,
        device_type=tensor.device.type,
        channels_last=channels_last,
        threads=torch.get_num_threads(),
    )


# Kernels --------------------------------------------------------------------------------------------------------------


def conv2d_kernel(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str,
) -> Tensor:
    """What the op ``conv2d`` runs."""
    return Call(input, weight, (stride, padding, dilation, groups), backend)(dense(input), dense(weight), bias)


class Call:
    """A choice for tensors with the sizes, strides and dtype of these, to be called with dense ones."""

    __slots__ = ("backend", "geometry", "layout", "run")

    def __init__(self, input: Tensor, weight: Tensor, geometry: tuple[Ints, Ints, Ints, int], backend: str) -> None:
        self.geometry, self.backend, self.layout = geometry, backend, layout_of(input, weight)
        last = self.layout is torch.channels_last
        self.run = pick("conv2d", backend, input.shape, weight.shape, geometry, input, last).run

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.contiguous()
        out: Tensor = self.run(input, weight, bias, *self.geometry)
        return out.contiguous(memory_format=self.layout)


def _conv2d_input(
    input_size: Ints,
    weight: Tensor,
    grad_output: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str,
) -> Tensor:
    layout = layout_of(weight, grad_output)
    geometry = (stride, padding, dilation, groups)
    chosen = pick("conv2d_input", backend, input_size, weight.shape, geometry, weight, layout is torch.channels_last)
    return chosen.run(list(input_size), dense(weight), dense(grad_output), *geometry).contiguous(memory_format=layout)


def _conv2d_weight(
    input: Tensor,
    weight_size: Ints,
    grad_output: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    backend: str,
) -> Tensor:
    layout = layout_of(input, grad_output)
    geometry = (stride, padding, dilation, groups)
    chosen = pick("conv2d_weight", backend, input.shape, weight_size, geometry, input, layout is torch.channels_last)
    return chosen.run(dense(input), list(weight_size), dense(grad_output), *geometry).contiguous(memory_format=layout)


for _name, _kernel in (("conv2d", conv2d_kernel), ("conv2d_input", _conv2d_input), ("conv2d_weight", _conv2d_weight)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)


# Fake -----------------------------------------------------------------------------------------------------------------


def _empty(like: Tensor, size: Ints, layout: torch.memory_format) -> Tensor:
    return torch.empty(list(size), dtype=like.dtype, device=like.device, memory_format=layout)


def empty_output(input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    """What a convolution gives, without values."""
    extents = [out_extent(*a) for a in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)]
    return _empty(input, [input.shape[0], weight.shape[0], *extents], layout_of(input, weight))


@torch.library.register_fake("atrous::conv2d", lib=_library)
def _conv2d_fake(input, weight, bias, stride, padding, dilation, groups, backend):
    return empty_output(input, weight, stride, padding, dilation)


@torch.library.register_fake("atrous::conv2d_input", lib=_library)
def _conv2d_input_fake(input_size, weight, grad_output, stride, padding, dilation, groups, backend):
    return _empty(grad_output, input_size, layout_of(weight, grad_output))


@torch.library.register_fake("atrous::conv2d_weight", lib=_library)
def _conv2d_weight_fake(input, weight_size, grad_output, stride, padding, dilation, groups, backend):
    return _empty(input, weight_size, layout_of(input, grad_output))


# Autograd (conj() is free on real tensors) -----------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = inputs[3:]
    ctx.save_for_backward(*(x for x in inputs[:3] if isinstance(x, Tensor)))


def gradients(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor, geometry: Any) -> tuple[Tensor | None, Tensor | None]:
    """In input and weight, where they are needed; ``geometry`` ends with the backend."""
    plain = unobserved(grad, input, weight) and not recorded(grad, input, weight)
    of_input, of_weight = (_conv2d_input, _conv2d_weight) if plain else (conv2d_input, conv2d_weight)
    grad_input = of_input(input.shape, weight, grad, *geometry) if ctx.needs_input_grad[0] else None
    return grad_input, of_weight(input, weight.shape, grad, *geometry) if ctx.needs_input_grad[1] else None


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = (tensor.conj() for tensor in ctx.saved_tensors[:2])
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    return *gradients(ctx, grad, input, weight, ctx.geometry), grad_bias, *_NO_GRADS


def _conv2d_input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, grad_output = (tensor.conj() for tensor in ctx.saved_tensors)
    _, needs_weight, needs_grad_output = ctx.needs_input_grad[:3]
    grad_weight = conv2d_weight(grad, weight.shape, grad_output, *ctx.geometry) if needs_weight else None
    grad_grad_output = conv2d(grad, weight, None, *ctx.geometry) if needs_grad_output else None
    return None, grad_weight, grad_grad_output, *_NO_GRADS


def _conv2d_weight_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, grad_output = (tensor.conj() for tensor in ctx.saved_tensors)
    needs_input, _, needs_grad_output = ctx.needs_input_grad[:3]
    grad_input = conv2d_input(input.shape, grad, grad_output, *ctx.geometry) if needs_input else None
    grad_grad_output = conv2d(input, grad, None, *ctx.geometry) if needs_grad_output else None
    return grad_input, None, grad_grad_output, *_NO_GRADS


_NO_GRADS = (None,) * 5  # stride, padding, dilation, groups, backend
torch.library.register_autograd("atrous::conv2d", _conv2d_backward, setup_context=_save, lib=_library)
torch.library.register_autograd("atrous::conv2d_input", _conv2d_input_backward, setup_context=_save, lib=_library)
torch.library.register_autograd("atrous::conv2d_weight", _conv2d_weight_backward, setup_context=_save, lib=_library)



class Conv2dRecorded(torch.autograd.Function):
    """The op in a graph that nothing else observes."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry = (*call.geometry, call.backend)
        return call(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _conv2d_backward(ctx, grad)[:4]


def run(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The call on dense tensors that nothing but autograd observes."""
    if recorded(input, weight, bias):
        return Conv2dRecorded.apply(input, weight, bias, call)
    return call(input, weight, bias)


conv2d = torch.ops.atrous.conv2d.default
conv2d_input = torch.ops.atrous.conv2d_input.default
conv2d_weight = torch.ops.atrous.conv2d_weight.default


# Autocast -------------------------------------------------------------------------------------------------------------


def _autocast_to(device_type: str, key: torch._C.DispatchKey) -> Any:
    """Casts floating tensors to the dtype of the autocast region, as the framework does for its own convolution."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(torch.get_autocast_dtype(device_type)) if tensor is not None and eligible else tensor

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return conv2d(cast(input), cast(weight), cast(bias), *geometry)

    return call


_library.impl("conv2d", _autocast_to("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("conv2d", _autocast_to("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")


# Implementations ------------------------------------------------------------------------------------------------------


def _framework_conv2d_input(input_size: Ints, weight: Tensor, grad_output: Tensor, *geometry: Any) -> Tensor:
    # Only the sizes of the absent operand are read, so one element stands in for all.
    input = weight.new_empty(1).expand(list(input_size))
    return _framework_backward(grad_output, input, weight, geometry, (True, False, False))[0]


def _framework_conv2d_weight(input: Tensor, weight_size: Ints, grad_output: Tensor, *geometry: Any) -> Tensor:
    weight = input.new_empty(1).expand(list(weight_size))
    return _framework_backward(grad_output, input, weight, geometry, (False, True, False))[1]


def _framework_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Any, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )


def framework_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    if input.is_complex():  # aten.convolution has no complex CPU kernel; aten.conv2d composes it from real ones
        return torch.ops.aten.conv2d(input, weight, bias, stride, padding, dilation, groups)
    # The binding, not torch.ops.aten.convolution: that one goes through Python, whose code is not in the caches between layers.
    return torch.convolution(input, weight, bias, stride, padding, dilation, False, [0, 0], groups)


_NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _cpu_can_run(problem: ConvProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on the CPU, not on {problem.device_type}"
    if problem.dtype not in _NATIVE_DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, _NATIVE_DTYPES))}"
    return native.cpu_missing()


# Below this the weights of a dense convolution are packed in less time than their fingerprint takes.
_WORTH_KEEPING = 1 << 16  # elements


def packed_weight(weight: Tensor, groups: int) -> Tensor | None:
    """The weight in the order of the direct kernels, where it is kept."""
    if weight.numel() < _WORTH_KEEPING or groups > 1 or weight.dtype is torch.float16:
        return None
    return prepared(weight, ("packed",), lambda: torch.ops.atrous_native.pack_weight(weight, groups))


def _cpu_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return torch.ops.atrous_native.conv2d_packed(input, weight, packed_weight(weight, geometry[3]), bias, *geometry)


def cuda_can_run(problem: dispatch.Problem) -> str | None:
    """None, or why the kernels of the CUDA library cannot run a call."""
    if problem.device_type != "cuda":
        return f"runs on CUDA devices, not on {problem.device_type}"
    if problem.dtype not in _NATIVE_DTYPES:
        return f"{problem.dtype} is not one of {', '.join(map(str, _NATIVE_DTYPES))}"
    return native.cuda_missing()


def _always(problem: ConvProblem) -> None:
    return None


def _framework_backward_can_run(problem: ConvProblem) -> str | None:
    return f"the framework has no backward for {problem.dtype}" if problem.dtype.is_complex else None


# Where the framework is faster on the CPU, for problems that the tuned table (atrous_kernels/tuned.py) does not know: rules drawn
# from such measurements. The reasons below are what `explain` prints.


def _cpu_always_loses(problem: ConvProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"timed in float32 and bfloat16 only, not in {problem.dtype}"
    if problem.is_depthwise:
        return None
    if problem.groups > 1:
        return "the framework is as fast or faster on groups"
    if min(problem.in_channels, problem.out_channels) < 32 and problem.kernel != (1, 1):
        return "the framework is faster below 32 channels"
    return None


def _frameworks_fast_pointwise(problem: ConvProblem) -> bool:
    # With one thread and small batches the framework leaves oneDNN for a slower path. On few pixels (pooled maps) most of its
    # work is to reorder the weights.
    few = problem.batch * problem.out_size[0] * problem.out_size[1] < 256
    return problem.kernel == (1, 1) and not few and (problem.threads > 1 or problem.batch >= 16)


def cpu_loses_conv2d(problem: ConvProblem) -> str | None:
    """None, or why the framework's forward pass is the faster one."""
    bf16 = problem.dtype is torch.bfloat16
    if problem.is_depthwise:
        if problem.stride != (1, 1) and (problem.channels_last or bf16):
            return "the framework is faster on strided depthwise convolution"
        if problem.channels_last and max(problem.dilation) == 1 and (bf16 or max(problem.kernel) > 3):
            return "the framework is faster on channels-last depthwise convolution at rate 1"
        return None
    if problem.kernel == (1, 1):
        slower = bf16 or (problem.channels_last and _frameworks_fast_pointwise(problem))
        return "the framework is as fast or faster on 1x1" if slower else None
    if bf16:
        return None if problem.valid_share < 0.8 else "the framework is as fast or faster where few taps are padding"
    if problem.channels_last:
        return None if problem.in_channels < 128 else "the framework's channels-last forward is as fast or faster"
    return None if problem.in_channels >= 128 else "the framework is faster below 128 channels, contiguous"


def _cpu_loses_conv2d_input(problem: ConvProblem) -> str | None:
    bf16 = problem.dtype is torch.bfloat16
    if problem.is_depthwise:
        slower = problem.stride != (1, 1) and not problem.channels_last and not bf16
        return "the framework is as fast on contiguous strided depthwise convolution" if slower else None
    if problem.kernel == (1, 1) or problem.channels_last:
        return None
    if bf16:
        return None if problem.valid_share < 0.5 else "the framework is as fast or faster where few taps are padding"
    fast = 128 <= problem.in_channels < 1024
    return None if fast else "the framework is faster on contiguous tensors of this width"


def _cpu_loses_conv2d_weight(problem: ConvProblem) -> str | None:
    if problem.is_depthwise:
        return None
    if problem.dtype is torch.bfloat16:
        slower = problem.kernel == (1, 1) or problem.valid_share >= 0.5
        return "our bf16 weight gradient multiplies in fp32" if slower else None
    slower = problem.channels_last and _frameworks_fast_pointwise(problem)
    return "the framework is as fast or faster on channels-last 1x1" if slower else None


_CPU_LOSES = {
    "conv2d": cpu_loses_conv2d,
    "conv2d_input": _cpu_loses_conv2d_input,
    "conv2d_weight": _cpu_loses_conv2d_weight,
}


def gpu_unmeasured(problem: dispatch.Problem) -> str | None:
    return "no committed measurement shows it ahead of the framework on a GPU yet"


def _last_resort(problem: ConvProblem) -> str | None:
    return "plain PyTorch, tap by tap: for checking, not for speed"


for _name, _framework, _framework_can_run in (
    ("conv2d", framework_conv2d, _always),
    ("conv2d_input", _framework_conv2d_input, _framework_backward_can_run),
    ("conv2d_weight", _framework_conv2d_weight, _framework_backward_can_run),
):

    def _native(*args: Any, _name: str = _name) -> Tensor:
        return getattr(torch.ops.atrous_native, _name)(*args)

    _cpu = _cpu_conv2d if _name == "conv2d" else _native

    def _cpu_loses(problem: ConvProblem, _name: str = _name) -> str | None:
        known, reason = tuned.verdict(_name, problem, "cpu")
        return reason if known else _cpu_always_loses(problem) or _CPU_LOSES[_name](problem)

    def _winograd_loses(problem: ConvProblem, _name: str = _name) -> str | None:
        known, reason = tuned.verdict(_name, problem, "winograd")
        return reason if known else winograd.loses(problem)

    dispatch.register(
        _name,
        [
            Implementation("winograd", getattr(winograd, _name), winograd.can_run, _winograd_loses),
            Implementation("cpu", _cpu, _cpu_can_run, _cpu_loses),
            Implementation("triton", getattr(triton, _name), triton.can_run, gpu_unmeasured),
            Implementation("tensor_core", getattr(tensor_core, _name), tensor_core.can_run, gpu_unmeasured),
            Implementation("cuda", _native, cuda_can_run, gpu_unmeasured),
            Implementation("torch", _framework, _framework_can_run, _always),
            Implementation("reference", getattr(reference, _name), _always, _last_resort),
        ],
    )
