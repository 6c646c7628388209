"""What every fuzzed op draws from, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

Problem = dict[str, Any]
Results = Iterator[tuple[str, Tensor, Tensor, float]]


class Op(NamedTuple):
    """How to fuzz one op: ``draw`` gives a legal problem as plain values, ``run`` its results (name, ours, truth, tolerance).

    The truth is float64 and is rounded to the type of ours before the two are compared; 0 asks for the same bits.
    """

    draw: Callable[[Random], Problem]
    run: Callable[[Problem], Results]


DTYPES = {"float32": 4, "bfloat16": 3, "float64": 1, "float16": 1}
NO_HALF = {"float32": 4, "bfloat16": 3, "float64": 1}
LAYOUTS = {"contiguous": 3, "channels_last": 3, "sliced": 1, "turned": 1, "expanded": 1}


def pick(rng: Random, weights: dict[Any, int]) -> Any:
    """A key, as often as its weight says."""
    return rng.choices(list(weights), list(weights.values()))[0]


def skewed(rng: Random, low: int, high: int) -> int:
    """Small values often, large ones sometimes."""
    return rng.randint(low, rng.randint(low, high))


def largest(tensor: Tensor) -> float:
    """The largest absolute value, 0 of an empty tensor."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def integers(seed: int, sizes: list[int], dtype: str, layout: str) -> Tensor:
    """Integers in [-3, 3] laid out as asked; elements around a view are NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, sizes, generator=generator).to(getattr(torch, dtype))
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = values.new_full([size + 2 for size in sizes[:-1]] + [2 * sizes[-1] + 1], torch.nan)
        view = wide[(*(slice(1, 1 + size) for size in sizes[:-1]), slice(1, 1 + 2 * sizes[-1], 2))]
        return view.copy_(values)
    if layout == "turned":
        return values.permute(*reversed(range(values.dim()))).contiguous().permute(*reversed(range(values.dim())))
    if layout == "expanded":
        return values[..., :1].expand(sizes)
    return values


def with_gradients(call: Callable[..., Tensor], operands: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result of ``call`` and its gradients in all operands."""
    leaves = [each.detach().requires_grad_() for each in operands]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def in_float64(call: Callable[..., Tensor], operands: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The same of the framework, whose convolution has no gradients for some strides."""
    return with_gradients(call, [each.double().contiguous() for each in operands], grad.double().contiguous())
