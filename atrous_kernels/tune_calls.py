"""What the tuner times: calls of the Triton backend with their operands, launches and right answers.

Operands are small integers, so that the sums of convolutions are exact in float32 whatever the order: they have to agree with the
reference to the bit. What divides or takes logarithms has a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from atrous_kernels.problem import ConvProblem, UpsampleProblem
from atrous_kernels.reference import conv2d as reference_conv2d
from atrous_kernels.reference import conv_bn_relu as reference_passes
from atrous_kernels.reference import pyramid_pool as reference_pooling
from atrous_kernels.reference.upsample_cross_entropy import upsample_cross_entropy as reference_loss
from atrous_kernels.simulate import OPS, arguments, plan, pyramid
from atrous_kernels.triton import aspp, conv_bn_relu, psp_conv, pyramid_pool, upsample_cross_entropy
from atrous_kernels.triton.epilogue import Epilogue
from atrous_kernels.triton.runtime import Launch

Planned = tuple[Sequence[Tensor], list[Launch]]
BINS = (1, 1, 2, 2, 3, 3, 6, 6)  # (rows, columns) of PSPNet's levels
RATES = (6, 12, 18)


class New(Protocol):
    """Makes one operand, of integers in [-2, 2] or in [0, ``below``)."""

    def __call__(self, *size: int, dtype: torch.dtype | None = None, below: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Call:
    """``plan`` of the ``operands`` gives unwritten results and the launches that write them; ``truth`` what they should be.

    ``tolerance`` is relative to the largest value of a result; 0 stands for equality to the bit.
    """

    name: str
    dtype: torch.dtype
    channels_last: bool
    operands: Callable[[New], list[Tensor]]
    plan: Callable[..., Planned]
    truth: Callable[..., Sequence[Tensor]]
    tolerance: float = 0.0

    def __str__(self) -> str:
        return self.name

    def untouched(self) -> list[Launch]:
        """Its launches on CPU tensors that nobody touches: their pages never become memory."""

        def new(*size: int, dtype: torch.dtype | None = None, below: int | None = None) -> Tensor:
            return torch.empty(size, dtype=dtype or self.dtype, memory_format=self._layout(size))

        return self.plan(*self.operands(new))[1]

    def filled(self, device: torch.device) -> list[Tensor]:
        """Operands on ``device``, the same every time."""
        generator = torch.Generator(device).manual_seed(0)

        def new(*size: int, dtype: torch.dtype | None = None, below: int | None = None) -> Tensor:
            first, last = (-2, 3) if below is None else (0, below)
            values = torch.randint(first, last, size, generator=generator, device=device)
            return values.to(dtype or self.dtype).contiguous(memory_format=self._layout(size))

        return self.operands(new)

    def _layout(self, size: Sequence[int]) -> torch.memory_format:
        return torch.channels_last if self.channels_last and len(size) == 4 else torch.contiguous_format


def convolutions(problem: ConvProblem) -> Iterator[Call]:
    """The convolution and its two gradients."""

    def operands(new: New) -> list[Tensor]:
        return [new(*size) for size in problem.sizes]

    for op in OPS:

        def planned(*tensors: Tensor, op: str = op) -> Planned:
            result, launches = plan(op, problem, *tensors)
            return [result], launches

        def truth(*tensors: Tensor, op: str = op) -> list[Tensor]:
            exact = getattr(reference_conv2d, op)(*arguments(op, problem, *(tensor.double() for tensor in tensors)))
            return [exact.to(problem.dtype)]  # rounded once

        yield Call(f"{op} {problem}", problem.dtype, problem.channels_last, operands, planned, truth)


def branches(base: ConvProblem) -> Iterator[Call]:
    """All branches of an atrous spatial pyramid in one launch."""
    found = pyramid(base, RATES)
    rates = [branch.dilation for branch in found]

    def operands(new: New) -> list[Tensor]:
        return [new(*base.sizes[0]), *(new(*branch.sizes[1]) for branch in found)]

    def planned(x: Tensor, *weights: Tensor) -> Planned:
        result, launches = aspp.plan_aspp_branches(x, weights, rates, Epilogue())
        return [result], launches

    def truth(x: Tensor, *weights: Tensor) -> list[Tensor]:
        pairs = zip(found, weights, strict=True)
        maps = [reference_conv2d.conv2d(*arguments("conv2d", branch, x.double(), w.double(), x)) for branch, w in pairs]
        return [torch.cat(maps, 1).to(x.dtype)]

    yield Call(f"aspp_branches of {base}", base.dtype, base.channels_last, operands, planned, truth)


def passes(size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Iterator[Call]:
    """What a training step of conv-bn-relu does beside its convolutions, on maps of ``size``."""
    ours: Any = conv_bn_relu
    channels, bounds = size[1], {"low": 0.0, "high": inf}

    def operands(maps: int, vectors: int, new: New) -> list[Tensor]:
        return [*(new(*size) for _ in range(maps)), *(new(channels, dtype=torch.float32) for _ in range(vectors))]

    def plan_act(x: Tensor, *vectors: Tensor) -> Planned:
        output = torch.empty_like(x)
        return [output], ours.plan_batch_norm_act(x, *vectors, output=output, **bounds)

    def plan_input(*tensors: Tensor) -> Planned:
        output, launches = ours.plan_batch_norm_act_input(*tensors, **bounds)
        return [output], launches

    for name, maps, vectors, planned in (
        ("statistics", 1, 0, ours.plan_batch_norm_statistics),
        ("act", 1, 3, plan_act),
        ("act_sums", 2, 3, lambda *tensors: ours.plan_batch_norm_act_sums(*tensors, **bounds)),
        ("act_input", 2, 5, plan_input),
    ):  # fmt: skip

        def truth(*tensors: Tensor, name: str = name) -> Sequence[Tensor]:
            exact = [tensor.double() for tensor in tensors]
            found = getattr(reference_passes, f"batch_norm_{name}")(*exact, **(bounds if name != "statistics" else {}))
            return [found] if isinstance(found, Tensor) else found

        label = f"batch_norm_{name} of {'x'.join(map(str, size))}"
        yield Call(label, dtype, channels_last, partial(operands, maps, vectors), planned, truth, _rounding(dtype))


def pooling(size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Iterator[Call]:
    """Average pooling to PSPNet's levels, and its gradient."""
    cells = sum(rows * cols for rows, cols in zip(BINS[::2], BINS[1::2], strict=True))

    def pool(x: Tensor) -> Planned:
        (output, _), launches = pyramid_pool.plan_pyramid_pool(x, BINS, False)
        return [output], launches

    def spread(grad: Tensor) -> Planned:
        result, launches = pyramid_pool.plan_pyramid_pool_input(grad, grad.new_empty(0), size, BINS, False, channels_last)
        return [result], launches

    def spread_truth(grad: Tensor) -> list[Tensor]:
        index = torch.empty(0, dtype=torch.int64, device=grad.device)
        return [reference_pooling.pyramid_pool_input(grad.double(), index, size, BINS, False, channels_last)]

    of = f"of {'x'.join(map(str, size))}"
    common: Any = dict(dtype=dtype, channels_last=channels_last, tolerance=_rounding(dtype))
    yield Call(
        f"pyramid_pool {of}", operands=lambda new: [new(*size)], plan=pool,
        truth=lambda x: [reference_pooling.pyramid_pool(x.double(), BINS, False)[0]], **common,
    )  # fmt: skip
    yield Call(
        f"pyramid_pool_input {of}", operands=lambda new: [new(size[0], cells, size[1])], plan=spread, truth=spread_truth, **common
    )


def pooled_half(size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Iterator[Call]:
    """The pooled half of the convolution in PSPNet's head, added to maps of ``size``."""
    terms = 9 * sum(rows * cols for rows, cols in zip(BINS[::2], BINS[1::2], strict=True))
    batch, channels, height, width = size

    def operands(new: New) -> list[Tensor]:
        factors = [new(extent, terms, dtype=torch.float32) for extent in (height, width)]
        return [new(*size), new(batch, terms, channels), *factors]

    def planned(*tensors: Tensor) -> Planned:
        result, launches = psp_conv.plan_add_upsampled(*tensors)
        return [result], launches

    def truth(x: Tensor, products: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
        exact = [tensor.double() for tensor in (rows, columns, products)]
        return [(x.double() + torch.einsum("yk,xk,nko->noyx", *exact)).to(dtype)]

    yield Call(f"add_upsampled to {'x'.join(map(str, size))}", dtype, channels_last, operands, planned, truth)


def losses(problem: UpsampleProblem, channels_last: bool) -> Iterator[Call]:
    """The loss with its gradient."""
    size = (problem.batch, problem.classes, *problem.in_size)
    options: Any = (None, None, 255, 0.0, False)

    def loss(logits: Tensor, target: Tensor) -> Planned:
        whole: Any = dict(mean=True, per_pixel=False, with_gradient=True)
        results, launches = upsample_cross_entropy.plan(logits, target, *options, **whole)
        return [results.loss, results.gradient], launches

    def operands(new: New) -> list[Tensor]:
        return [new(*size), new(problem.batch, *problem.out_size, dtype=torch.int64, below=problem.classes)]

    def truth(logits: Tensor, target: Tensor) -> Sequence[Tensor]:
        return reference_loss(logits.double(), target, None, None, 255, "mean", 0.0, 1.0, False, True)

    name = f"upsample_cross_entropy {problem}"
    yield Call(name, problem.dtype, channels_last, operands, loss, truth, _rounding(torch.float32))


def _rounding(dtype: torch.dtype) -> float:
    """Of one rounding to ``dtype`` and of float32 sums in any order, relative to the largest value."""
    return torch.finfo(dtype).eps + 1e-4


def calls() -> list[Call]:
    """Training batches of DeepLab, PSPNet and a ResNet behind them, the most important first."""
    found: list[Call] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        of: Any = (dtype, True)
        problems = conv_problems(dtype)
        found += branches(problems[0])
        for problem in problems[:8]:
            found += convolutions(problem)
        found += pooling((16, 2048, 60, 60), *of)
        found += pooled_half((16, 512, 60, 60), *of)
        for size, classes, wanted in ((33, 21, 513), (60, 150, 473)):
            logits = UpsampleProblem(16, classes, (size, size), (wanted, wanted), dtype, "cuda")
            found += losses(logits, True)
        for maps in ((16, 256, 33, 33), (16, 2048, 33, 33), (16, 64, 129, 129)):
            found += passes(maps, *of)
        for problem in problems[8:]:
            found += convolutions(problem)
    return found


def conv_problems(dtype: torch.dtype) -> list[ConvProblem]:
    """The convolutions of :func:`calls`."""
    shapes = [
        *((2048, 256, 33, 3, rate, 1) for rate in RATES), (2048, 256, 33, 1, 1, 1),
        *((512, 512, 33, 3, rate, 1) for rate in (2, 4, 8, 16)),
        *((2048, 2048, 33, 3, rate, 2048) for rate in (2, 6, 12, 18)),
        (4096, 512, 60, 3, 1, 1), (2048, 512, 33, 1, 1, 1), (512, 2048, 33, 1, 1, 1), (256, 256, 33, 3, 1, 1),
        (256, 256, 129, 3, 1, 256), (728, 728, 33, 3, 2, 728),
    ]  # fmt: skip
    base = ConvProblem(16, 1, 1, (1, 1), (1, 1), dtype=dtype, device_type="cuda", channels_last=True)
    return [
        replace(
            base, in_channels=read, out_channels=written, in_size=(size, size), kernel=(k, k),
            padding=(rate * (k // 2),) * 2, dilation=(rate,) * 2, groups=groups,
        )
        for read, written, size, k, rate, groups in shapes
    ]  # fmt: skip
