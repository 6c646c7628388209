"""What runs in the process that interprets: Triton there was imported with TRITON_INTERPRET=1, here it may be compiling."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _kernels() -> Any:
    from atrous_kernels.triton import conv2d, runtime

    assert runtime.interpreting()
    _patch_language_once()
    _refuse_masks_of_scalars()
    # Unwritten elements of torch.empty read as NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return conv2d


def _refuse_masks_of_scalars() -> None:
    """A mask made with a condition on a scalar (``block & (scalar > 0)``) is an array of integers to the interpreter, which
    Triton 3.9 refuses and older versions take: here all refuse it."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        original = getattr(InterpreterBuilder, name)
        if hasattr(original, "refuses"):
            continue

        def checked(self: Any, *arguments: Any, _original: Any = original, _at: int = position, **named: Any) -> Any:
            mask = arguments[_at]
            dtype = (mask.data if isinstance(mask, TensorHandle) else mask).dtype
            if dtype.kind != "b":
                raise TypeError(f"mask has unsupported dtype {dtype}: is one of its conditions on scalars alone?")
            return _original(self, *arguments, **named)

        checked.refuses = True
        setattr(InterpreterBuilder, name, checked)


def _patch_language_once() -> None:
    """Triton puts the interpreter's functions into its language anew for every call of a device function, which takes a quarter
    of the time. Here nothing is compiled, so they may stay."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or hasattr(patch, "done"):
        return

    def once(function: Any) -> Any:
        languages = frozenset(name for name in ("tl", "core") if name in function.__globals__)
        if languages not in once.done:
            patch(function)
            once.done.add(languages)
        return SimpleNamespace(restore=lambda: None)

    once.done = set()
    interpreter._patch_lang = once


def op(name: str, *arguments: Any) -> Tensor:
    """``conv2d``, ``conv2d_input`` or ``conv2d_weight``."""
    return getattr(_kernels(), name)(*arguments)


def call(module: str, name: str, *arguments: Any) -> Any:
    """A function of ``atrous_kernels.triton.<module>``."""
    _kernels()
    return getattr(importlib.import_module(f"atrous_kernels.triton.{module}"), name)(*arguments)


def public(name: str, tensors: list[Tensor | None], options: dict[str, Any], leaves: int, grads: list[Tensor]) -> list[Any]:
    """The public function ``name`` of ``tensors`` with ``backend="triton"``.

    Returns its results, the gradients of the first ``leaves`` tensors where ``grads`` are given, and the tensors afterwards.
    """
    import atrous_kernels as ak

    _kernels()
    # Tensors that come from another process are shared with it.
    tensors = [t if t is None else t.clone(memory_format=torch.preserve_format) for t in tensors]
    differentiated = [t for t in tensors[:leaves] if t is not None]
    for tensor in differentiated:
        tensor.requires_grad_(bool(grads))
    out = getattr(ak, name)(*tensors, **options, backend="triton")
    outs = [out] if isinstance(out, Tensor) else list(out)
    found = list(torch.autograd.grad(outs, differentiated, grads)) if grads else []
    return [t if t is None else t.detach() for t in (*outs, *found, *tensors)]


def psp_conv(
    x: Tensor, levels: list[Tensor], weight: Tensor, bias: Tensor, align_corners: bool, grad: Tensor, backend: str = "triton"
) -> list[Tensor]:
    """The public ``psp_conv``, its gradients in all operands, and those of the sum of their squares."""
    import atrous_kernels as ak

    if backend == "triton":
        _kernels()
    leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (x, weight, bias, *levels)]
    y = ak.psp_conv(leaves[0], leaves[3:], *leaves[1:3], align_corners=align_corners, backend=backend)
    first = torch.autograd.grad(y, leaves, grad, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), (leaves[0], leaves[1]), allow_unused=True)
    return [t.detach() for t in (y, *first, *second)]


def opcheck_psp() -> None:
    """``torch.library.opcheck`` of the op that adds the pooled half."""
    from atrous_kernels.ops.psp_conv import add_upsampled

    _kernels()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 3).contiguous(memory_format=layout).requires_grad_()
        products = torch.randn(2, 9 * 5, 3, requires_grad=True)
        torch.library.opcheck(add_upsampled, (x, products, [1, 1, 2, 2], [3, 3], False))


def launch_count(name: str, *arguments: Any) -> int:
    """How many kernels the op launches."""
    return len(getattr(_kernels(), f"plan_{name}")(*arguments)[1])


def loss_and_gradient(logits: Tensor, target: Tensor, options: dict[str, Any], upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The public ``upsample_cross_entropy`` and the gradient of its logits with ``backend="triton"``."""
    import atrous_kernels as ak

    _kernels()
    loss = ak.upsample_cross_entropy(logits.requires_grad_(), target, **options, backend="triton")
    return loss.detach(), torch.autograd.grad(loss, logits, upstream)[0]


def classes(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """The public ``upsample_argmax`` with ``backend="triton"``."""
    import atrous_kernels as ak

    _kernels()
    return ak.upsample_argmax(logits, size, align_corners=align_corners, backend="triton")


def far_upsampled(folder: str, dim: int, stride: int, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and classes of logits that span more than 2**31 elements along ``dim``."""
    from atrous_kernels.triton import upsample_argmax, upsample_cross_entropy

    _kernels()
    far = far_apart(folder, logits, dim, stride)
    options = (255, "mean", 0.0, 1.0, False)
    loss, gradient = upsample_cross_entropy.upsample_cross_entropy(far, target, None, None, *options, True)
    return loss, gradient, upsample_argmax.upsample_argmax(far, tuple(target.shape[1:]), False)


def through_autograd(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, geometry: dict[str, Any]) -> list[Tensor]:
    """The public function and its gradients with ``backend="triton"``."""
    import atrous_kernels as ak

    _kernels()
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = ak.conv2d(*leaves, **geometry, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def launches_of(module: str, plan: str, *arguments: Any) -> list[str]:
    """The kernels that a plan of ``atrous_kernels.triton.<module>`` launches."""
    return [launch.kernel.name for launch in call(module, plan, *arguments)[1]]


def far_apart(folder: str, near: Tensor, dim: int, stride: int) -> Tensor:
    """``near`` copied into a sparse file, with ``stride`` elements between neighbours along ``dim``."""
    strides = [0, 0, 0, 0]
    step = 1
    for axis in (1, 3, 2, 0):
        strides[axis] = stride if axis == dim else step
        step *= 1 if axis == dim else near.shape[axis]
    elements = 1 + sum((size - 1) * step for size, step in zip(near.shape, strides, strict=True))
    path = Path(folder) / f"{os.urandom(8).hex()}.bin"
    with path.open("wb") as file:
        file.truncate(elements * near.element_size())
    far = torch.from_file(str(path), shared=True, size=elements, dtype=near.dtype).as_strided(near.shape, strides)
    path.unlink()  # the mapping keeps it
    return far.copy_(near)


def far_source(folder: str, dim: int, stride: int, name: str, near: Tensor, position: int, *arguments: Any) -> Tensor:
    """The op on a tensor, its argument number ``position``, that spans more than 2**31 elements along ``dim``."""
    far = far_apart(folder, near, dim, stride)
    return op(name, *arguments[:position], far, *arguments[position:])


def far_target(folder: str, dim: int, stride: int, like: Tensor, name: str, *arguments: Any) -> Tensor:
    """The op written into a tensor that spans more than 2**31 elements along ``dim``."""
    kernels = _kernels()
    far = far_apart(folder, torch.full_like(like, torch.nan), dim, stride)
    allocate = kernels.new_tensor
    kernels.new_tensor = lambda *_: far
    try:
        return op(name, *arguments).clone()
    finally:
        kernels.new_tensor = allocate


def _tune() -> Any:
    """The tuner, with a clock that gives every launch a second."""
    from atrous_kernels import tune

    _kernels()

    class Stopwatch:
        def __init__(self, device: torch.device) -> None: ...

        def seconds(self, call: Any) -> float:
            call()
            return 1.0

    tune.Stopwatch, tune.ROUNDS = Stopwatch, 1  # type: ignore[misc]
    return tune


def tuned(problem: Any, configs: list[tuple[int, ...]]) -> tuple[dict[Any, float], dict[str, str], str | None]:
    """The tuner's times and rejections of ``configs`` on the CPU, and what it says of a wrong result."""
    from atrous_kernels import tune_calls

    tune, device = _tune(), torch.device("cpu")
    calls = list(tune_calls.convolutions(problem))
    totals: dict[Any, float] = {}
    reasons: dict[str, str] = {}
    for task in tune.tasks(calls):
        times, rejected = tune.measured(task, configs, device)
        reasons |= rejected
        for config, seconds in times.items():
            totals[config] = totals.get(config, 0) + seconds
    tensors = calls[0].filled(device)
    (expected,) = calls[0].truth(*tensors)
    expected[0, 0, 0, 0] += 1
    return totals, reasons, tune.wrong(calls[0], tensors, [expected])


def tuned_kinds(dtype: torch.dtype, problem: Any, upsampling: Any, configs: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Per kind of kernel the tuner's rows and rejections of small calls, each with the rule and one other configuration."""
    from atrous_kernels import tune_calls

    tune, size = _tune(), (1, 10, 5, 4)
    calls = [
        *tune_calls.branches(problem), *tune_calls.passes(size, dtype, True), *tune_calls.pooling(size, dtype, True),
        *tune_calls.pooled_half(size, dtype, True), *tune_calls.losses(upsampling, True),
    ]  # fmt: skip
    found: dict[str, Any] = {}
    for task in tune.tasks(calls):
        totals, rejected = tune.measured(task, [(), configs[task.kind]], torch.device("cpu"))
        totals[()] *= 2  # so that the other wins
        found[f"{task.kind} {task.key}"] = (tune.entry(task, totals), rejected)
    return found


def second_derivatives(backend: str) -> list[float]:
    """Norms of the gradients of a norm of the gradients of a training step."""
    import atrous_kernels as ak

    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    out = ak.conv_bn_relu(x, weight, None, None, None, None, training=True, padding=1, backend=backend)
    first = torch.autograd.grad(out.square().sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))
    return [g.norm().item() for g in second]


def opcheck_statistics() -> None:
    """``torch.library.opcheck`` of the ops that take and use the statistics of a convolution."""
    from atrous_kernels.ops import batch_norm_act, conv2d_statistics

    _kernels()
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    x = torch.randn(2, 2, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(4, 2, 3, 3, requires_grad=True)
    torch.library.opcheck(conv2d_statistics.conv2d_statistics, (x, weight, *geometry, "triton"))
    z, mean, moment = (t.detach() for t in conv2d_statistics.conv2d_statistics(x, weight, *geometry, "triton"))
    gain = torch.randn(4, requires_grad=True)
    arguments = (z.requires_grad_(), gain, None, 1e-5, "relu", "triton", mean, moment)
    torch.library.opcheck(batch_norm_act.batch_norm_act_train, arguments)


def opcheck_pyramid() -> None:
    """``torch.library.opcheck`` of pyramid pooling and its gradient."""
    from atrous_kernels.ops.pyramid_pool import pyramid_pool, pyramid_pool_input

    _kernels()
    bins = [1, 1, 1, 2]
    for maximum in (False, True):
        x = torch.randn(2, 3, 4, 3, requires_grad=True)
        torch.library.opcheck(pyramid_pool, (x, bins, maximum, "triton"))
        _, index = pyramid_pool(x, bins, maximum, "triton")
        grad = torch.randn(2, 3, 3, requires_grad=True)
        torch.library.opcheck(pyramid_pool_input, (grad, index, x.shape, bins, maximum, False, "triton"))


def aspp_module(
    backend: str, dtype: torch.dtype, training: bool, options: dict[str, Any], gradients: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Output, running statistics and, where wanted, gradients of an ASPP of fixed weights; and the kernels launched."""
    import atrous_kernels as ak
    from atrous_kernels.triton import runtime

    if backend == "triton":
        _kernels()
    torch.manual_seed(0)
    affine = options.get("affine", True)
    rates, pooling = options.get("rates", (2, 4)), options.get("image_pooling", True)
    module = ak.nn.ASPP(5, 6, rates, pooling, dropout=0.0, backend=backend)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias)
            torch.nn.init.normal_(layer.running_mean)
            if not affine:
                layer.weight = layer.bias = None
    module = module.to(dtype).train(training)
    x = torch.randn(2, 5, 7, 9).to(dtype).requires_grad_(gradients)
    grad = torch.randn(2, 6, 7, 9).to(dtype)
    kernels: list[str] = []
    names = ("aspp", "conv2d", "conv_bn_act", "conv_bn_relu")
    modules = [importlib.import_module(f"atrous_kernels.triton.{name}") for name in names]

    def run(launches: list[Any], device: torch.device) -> None:
        kernels.extend(launch.kernel.name for launch in launches)
        runtime.run(launches, device)

    for launcher in modules:
        launcher.run = run
    with torch.set_grad_enabled(gradients or training):
        out = module(x)
    for launcher in modules:
        launcher.run = runtime.run
    found = {"out": out.detach(), **{name: b for name, b in module.named_buffers() if "running" in name}}
    if gradients:
        leaves = {"x": x, **dict(module.named_parameters())}
        found.update(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    return found, kernels


def opcheck_aspp() -> None:
    """``torch.library.opcheck`` of the ops of ASPP's branches."""
    from atrous_kernels.ops.aspp_branches import aspp_branches, aspp_branches_act

    _kernels()
    x = torch.randn(2, 3, 3, 2, requires_grad=True)
    weights = [torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(2, 3, 1, 1, requires_grad=True)]
    torch.library.opcheck(aspp_branches, (x, weights, [2, 2, 1, 1]))
    vector = torch.rand(6) + 0.5
    plain = [weight.detach() for weight in weights]
    torch.library.opcheck(aspp_branches_act, (x.detach(), plain, [2, 2, 1, 1], vector, None, vector, vector, 1e-5, "relu"))


def transformed(x: Tensor, edge: Tensor, numbers: tuple[Any, ...], upstream: Tensor) -> list[Tensor]:
    """The public ``domain_transform`` and the gradients of input and edge with ``backend="triton"``."""
    import atrous_kernels as ak

    _kernels()
    operands = [x.requires_grad_(), edge.requires_grad_()]
    out = ak.domain_transform(*operands, *numbers, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, operands, upstream)]


def far_transformed(folder: str, dim: int, stride: int, x: Tensor, edge: Tensor, grad: Tensor) -> list[Tensor]:
    """The same where the input spans more than 2**31 elements along ``dim``."""
    from atrous_kernels.triton import domain_transform

    _kernels()
    far, numbers = far_apart(folder, x, dim, stride), (4.0, 1.0, 1)
    out = domain_transform.domain_transform(far, edge, *numbers)
    return [out, *domain_transform.domain_transform_backward(grad, far, edge, *numbers)]
