"""Convolution, constant normalisation, residual and activation in one launch, for inference.

The kernels are those of :mod:`atrous_kernels.triton.conv2d`; the normalisation is in their epilogue, so no vector is made first
and nothing is read or written twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from atrous_kernels.triton.conv2d import plan_finished
from atrous_kernels.triton.epilogue import Epilogue, bounds
from atrous_kernels.triton.runtime import Launch, run

Ints = Sequence[int]


def plan_conv_bn_act(
    input: Tensor, weight: Tensor, norm: Sequence[Tensor | None], residual: Tensor | None, eps: float,
    low: float, high: float, stride: Ints, padding: Ints, dilation: Ints, groups: int,
) -> tuple[Tensor, list[Launch]]:  # fmt: skip
    """The unwritten result of :func:`conv_bn_act` and the launch that writes it."""
    gain, bias, mean, var = (None if vector is None else vector.contiguous() for vector in norm)
    epilogue = Epilogue(bias, mean, var, gain, eps, residual, *bounds(low, high))
    return plan_finished(input, weight, epilogue, stride, padding, dilation, groups)


def conv_bn_act(
    input: Tensor, weight: Tensor, norm: Sequence[Tensor | None], residual: Tensor | None, eps: float,
    low: float, high: float, stride: Ints, padding: Ints, dilation: Ints, groups: int,
) -> Tensor:  # fmt: skip
    """``clamp((conv - mean) * weight / sqrt(var + eps) + bias + residual, low, high)``, one rounding at the end.

    ``norm`` is (weight, bias, mean, var), vectors [O] of any floating dtype, the first two or None. ``residual`` has the sizes
    of the output and any strides. The rest as :func:`atrous_kernels.triton.conv2d.conv2d`.
    """
    arguments = (input, weight, norm, residual, eps, low, high, stride, padding, dilation, groups)
    output, launches = plan_conv_bn_act(*arguments)
    run(launches, output.device)
    return output
