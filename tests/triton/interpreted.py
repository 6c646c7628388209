"""What runs in the process that interprets: Triton there was imported with TRITON_INTERPRET=1, here it may be compiling."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _kernels() -> Any:
    from atrous_kernels.triton import conv2d, runtime

    assert runtime.interpreting()
    # Unwritten elements of torch.empty read as NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return conv2d


def op(name: str, *arguments: Any) -> Tensor:
    """``conv2d``, ``conv2d_input`` or ``conv2d_weight``."""
    return getattr(_kernels(), name)(*arguments)


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


def tuned(problem: Any, configs: list[tuple[int, ...]]) -> tuple[dict[Any, float], dict[str, str], str | None]:
    """The tuner's times and rejections of ``configs`` on the CPU, and what it says of a wrong result."""
    from atrous_kernels import tune

    _kernels()

    class Stopwatch:
        def __init__(self, device: torch.device) -> None: ...

        def seconds(self, call: Any) -> float:
            call()
            return 1.0

    tune.Stopwatch, tune.ROUNDS = Stopwatch, 1  # type: ignore[misc]
    device = torch.device("cpu")
    totals: dict[Any, float] = {}
    reasons: dict[str, str] = {}
    for task in tune.tasks([problem]):
        times, rejected = tune.measured(task, configs, device)
        reasons |= rejected
        for config, seconds in times.items():
            totals[config] = totals.get(config, 0) + seconds
    tensors = tune.operands(problem, device)
    expected = tune.truth("conv2d", problem, tensors)
    expected[0, 0, 0, 0] += 1
    return totals, reasons, tune.wrong("conv2d", problem, tensors, expected)
