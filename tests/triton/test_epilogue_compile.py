"""Convolutions with epilogues, the passes of batch normalisation and pyramid pooling compiled for GPUs, without one."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from atrous_kernels.triton import aspp, conv_bn_act, conv_bn_relu, pyramid_pool, report
from atrous_kernels.triton.epilogue import Epilogue
from atrous_kernels.triton.runtime import Launch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

# Bytes of shared memory one block may have: CUDA programming guide, compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTION = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}
DENSE = (2048, 256, (1, 1), (12, 12), (12, 12), 1)  # channels in and out, stride, padding, rate, groups
DEPTHWISE = (2048, 2048, (1, 1), (12, 12), (12, 12), 2048)


@dataclass(frozen=True)
class Case:
    """Launches that some call plans."""

    name: str
    plan: Callable[[torch.dtype, bool], list[Launch]]


def _tensor(dtype: torch.dtype, channels_last: bool, *size: int) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def _vectors(count: int, channels: int) -> list[Tensor]:
    return [torch.empty(channels, dtype=torch.float32, device="meta") for _ in range(count)]


def _convolution(shape: tuple, training: bool, residual: bool = False) -> Callable[[torch.dtype, bool], list[Launch]]:
    channels_in, channels_out, *geometry = shape

    def plan(dtype: torch.dtype, channels_last: bool) -> list[Launch]:
        x = _tensor(dtype, channels_last, 16, channels_in, 33, 33)
        weight = _tensor(dtype, channels_last, channels_out, channels_in // geometry[-1], 3, 3)
        if training:
            return conv_bn_relu.plan_conv2d_statistics(x, weight, *geometry)[1]
        add = _tensor(dtype, channels_last, 16, channels_out, 33, 33) if residual else None
        arguments = (x, weight, _vectors(4, channels_out), add, 1e-5, 0.0, 6.0)
        return conv_bn_act.plan_conv_bn_act(*arguments, *geometry)[1]

    return plan


def _passes(dtype: torch.dtype, channels_last: bool) -> list[Launch]:
    x, grad, out = (_tensor(dtype, channels_last, 16, 256, 33, 33) for _ in range(3))
    norm, bounds = _vectors(3, 256), (0.0, float("inf"))
    return [
        *conv_bn_relu.plan_batch_norm_statistics(x)[1],
        *conv_bn_relu.plan_batch_norm_act(x, *norm, *bounds, out),
        *conv_bn_relu.plan_batch_norm_act_sums(grad, x, *norm, *bounds)[1],
        *conv_bn_relu.plan_batch_norm_act_input(grad, x, *norm, *_vectors(2, 256), *bounds)[1],
    ]


def _pyramid(maximum: bool) -> Callable[[torch.dtype, bool], list[Launch]]:
    def plan(dtype: torch.dtype, channels_last: bool) -> list[Launch]:
        x = _tensor(dtype, channels_last, 16, 2048, 60, 60)
        bins = [1, 1, 2, 2, 3, 3, 6, 6]
        (out, index), launches = pyramid_pool.plan_pyramid_pool(x, bins, maximum)
        return [*launches, *pyramid_pool.plan_pyramid_pool_input(out, index, x.shape, bins, maximum, channels_last)[1]]

    return plan


def _aspp(training: bool) -> Callable[[torch.dtype, bool], list[Launch]]:
    def plan(dtype: torch.dtype, channels_last: bool) -> list[Launch]:
        x = _tensor(dtype, channels_last, 16, 2048, 33, 33)
        weights = [_tensor(dtype, channels_last, 256, 2048, kernel, kernel) for kernel in (1, 3, 3, 3)]
        mean, moment, gain, bias = _vectors(4, 4 * 256)
        finished = Epilogue(bias, mean, moment, gain, 1e-5, low=0.0)
        epilogue = Epilogue(statistics=(mean, moment)) if training else finished
        return aspp.plan_aspp_branches(x, weights, [(1, 1), (6, 6), (12, 12), (18, 18)], epilogue)[1]

    return plan


CASES = (
    Case("ASPP in one launch", _aspp(training=False)),
    Case("ASPP in one launch, with statistics", _aspp(training=True)),
    Case("conv-bn-act", _convolution(DENSE, training=False)),
    Case("conv-bn-act, residual", _convolution(DENSE, training=False, residual=True)),
    Case("conv with statistics", _convolution(DENSE, training=True)),
    Case("depthwise conv-bn-act", _convolution(DEPTHWISE, training=False, residual=True)),
    Case("depthwise conv with statistics", _convolution(DEPTHWISE, training=True)),
    Case("batch norm passes", _passes),
    Case("pyramid pooling, average", _pyramid(False)),
    Case("pyramid pooling, maximum", _pyramid(True)),
)


def compiled(launch: Launch, capability: int) -> tuple[Any, dict[str, int]]:
    """A compiled launch and its resources, which have to fit the chip."""
    kernel = report.compile_launch(launch, capability)
    found = report.resources(kernel.asm["cubin"])
    what = f"{launch.kernel.name} {launch.constants} for sm_{capability}: {found}"
    assert found["spill_bytes"] == 0, what
    assert 0 < found["registers"] <= 255, what
    assert kernel.metadata.shared <= SHARED_LIMIT[capability], what
    return kernel, found


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fits_without_spills(case: Case, dtype: torch.dtype, channels_last: bool, capability: int) -> None:
    for launch in case.plan(dtype, channels_last):
        kernel, _ = compiled(launch, capability)
        if "PRECISION" in launch.constants and dtype is torch.bfloat16:
            assert re.search(MATRIX_INSTRUCTION[capability], kernel.asm["ptx"]), (case.name, launch.constants)
            if channels_last:  # 16-byte copies, so the alignment of weights found in a table is known
                assert re.search(r"\bcp\.async\.c[ag]\.", kernel.asm["ptx"]), (case.name, launch.constants)
