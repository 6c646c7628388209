"""``backend="tensor_core"`` of the convolutions: what it refuses and why; on a GPU, its results (elsewhere: tests/cuda)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import conv2d as framework_conv2d

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops.tensor_core import can_run
from atrous_kernels.problem import ConvProblem

FITS: dict[str, Any] = dict(
    batch=2, in_channels=16, out_channels=24, in_size=(9, 9), kernel=(3, 3), dtype=torch.bfloat16, device_type="cuda",
    channels_last=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(device_type="cpu"), "runs on CUDA devices, not on cpu"),
        (dict(dtype=torch.float64), "torch.float64 is not one of torch.float32, torch.bfloat16, torch.float16"),
        (dict(dtype=torch.float32), "in TF32, which torch.backends.cuda.matmul.fp32_precision does not allow"),
        (dict(groups=2), "takes one group, not 2"),
        (dict(channels_last=False), "takes channels-last tensors"),
    ],
)
def test_reasons(change: dict[str, Any], reason: str) -> None:
    found = can_run(ConvProblem(**(FITS | change)))
    assert found is not None
    assert reason in found


def test_what_fits_needs_the_library_alone() -> None:
    for change in ({}, dict(in_channels=13, out_channels=21), dict(stride=(2, 2), dilation=(6, 6), padding=(6, 6))):
        assert can_run(ConvProblem(**(FITS | change))) == native.cuda_missing()


def test_tf32_follows_both_switches() -> None:
    single = ConvProblem(**(FITS | dict(dtype=torch.float32, in_channels=12)))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert can_run(single) == native.cuda_missing()
        with ak.precision("ieee"):
            assert can_run(single) == "multiplies float32 in TF32, which precision 'ieee' leaves out"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.skipif(native.cuda_missing() is not None, reason="needs a GPU and the CUDA library")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [(64, 64), (264, 136), (13, 21)], ids=str)
def test_on_a_gpu(channels: tuple[int, int], dtype: torch.dtype) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        x = torch.randn(4, channels[0], 65, 33, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
        w = torch.randn(channels[1], channels[0], 3, 3, device="cuda", dtype=dtype).div(3 * channels[0] ** 0.5)
        x.requires_grad_(), w.requires_grad_()
        out = ak.conv2d(x, w, padding=12, dilation=12, backend="tensor_core")
        g = torch.randn_like(out)
        ours = (out, *torch.autograd.grad(out, (x, w), g))
        again = ak.conv2d(x, w, padding=12, dilation=12, backend="tensor_core")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert torch.equal(out, again)
    X, W = (tensor.detach().double().requires_grad_() for tensor in (x, w))
    exact = framework_conv2d(X, W, padding=12, dilation=12)
    # Two roundings of factors to 11 bits in TF32, or one of the result to 8 bits or more; errors of terms are independent.
    for a, b in zip(ours, (exact, *torch.autograd.grad(exact, (X, W), g.double())), strict=True):
        assert (a.double() - b).norm() <= 2.0**-8 * b.norm()
