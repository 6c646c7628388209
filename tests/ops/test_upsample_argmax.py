"""upsample_argmax: every backend that this machine can run, against the framework in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops.upsample_argmax import upsample_argmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("auto", "reference", "cpu", "torch", *(("triton", "cuda") if DEVICE == "cuda" else ()))


def _skip_unless_runnable(backend: str, dtype: torch.dtype = torch.float32) -> None:
    if backend == "triton" and dtype is torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    if backend == "cpu" and (DEVICE != "cpu" or native.cpu_missing()):
        pytest.skip(native.cpu_missing() or "the tensors are on a GPU")
    if backend == "cuda" and (missing := native.cuda_missing()):
        pytest.skip(missing)


def _check(logits: Tensor, size: tuple[int, int], align_corners: bool, backend: str) -> None:
    """The class that is found has the largest logit, up to rounding: of the positions (2**-24 of up to a hundred, times the
    difference of neighbours, of order 10) in float32."""
    found = ak.upsample_argmax(logits, size, align_corners=align_corners, backend=backend)
    assert found.dtype is torch.int64
    assert found.is_contiguous()
    z = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=align_corners)
    assert found.shape == z[:, 0].shape
    if not found.numel():
        return
    assert found.min() >= 0
    assert found.max() < logits.shape[1]
    short = z.amax(1) - z.gather(1, found[:, None])[:, 0]
    assert short.max().item() <= (1e-12 if logits.dtype is torch.float64 else 1e-4)


SIZES = {
    "x16": ((2, 21, 5, 6), (80, 81)),
    "x4": ((1, 19, 9, 8), (33, 30)),
    "150 classes": ((1, 150, 3, 3), (40, 17)),
    "one class": ((1, 1, 3, 3), (8, 8)),
    "one pixel": ((2, 4, 1, 1), (33, 9)),
    "to one pixel": ((2, 4, 5, 5), (1, 1)),
    "same size": ((1, 5, 7, 20), (7, 20)),
    "smaller": ((1, 5, 30, 41), (7, 9)),
    "empty batch": ((0, 5, 3, 3), (7, 9)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_against_float64(name: str, dtype: torch.dtype, nhwc: bool, corners: bool, backend: str, poison: None) -> None:
    _skip_unless_runnable(backend, dtype)
    shape, size = SIZES[name]
    logits = torch.randn(shape, device=DEVICE).mul(3).to(dtype)
    if nhwc:
        logits = logits.to(memory_format=torch.channels_last)
    _check(logits, size, corners, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_to_the_framework_without_rounding(backend: str) -> None:
    # Small integers at powers of two apart: every product and sum is exact, ties are many, and the first class wins.
    _skip_unless_runnable(backend)
    logits = torch.randint(-2, 3, (2, 6, 5, 7), device=DEVICE).float()
    for scale in (2, 4, 8, 16):
        size = (5 * scale, 7 * scale)
        theirs = F.interpolate(logits, size=size, mode="bilinear").argmax(1)
        assert torch.equal(ak.upsample_argmax(logits, size, backend=backend), theirs)
    corners = ak.upsample_argmax(logits, (17, 25), align_corners=True, backend=backend)
    assert torch.equal(corners, F.interpolate(logits, size=(17, 25), mode="bilinear", align_corners=True).argmax(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_nan(backend: str) -> None:
    _skip_unless_runnable(backend)
    size = (40, 40)
    if backend == "cpu":  # rounds every class alike; the framework does not in the last columns of its vectors
        assert not ak.upsample_argmax(torch.full((1, 9, 3, 3), 0.1), size, backend=backend).any()
    logits = torch.zeros(1, 9, 1, 1, device=DEVICE)
    logits[0, 3] = torch.nan
    logits[0, 5] = torch.nan
    logits[0, 7] = 1
    assert (ak.upsample_argmax(logits, size, backend=backend) == 3).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), corners=st.booleans())
def test_random_problems(data: Any, corners: bool, backend: str) -> None:
    _skip_unless_runnable(backend)
    n, c, h, w, rows, columns = (data.draw(st.integers(1, most)) for most in (3, 40, 9, 9, 60, 60))
    _check(torch.randn(n, c, h, w, dtype=torch.float64, device=DEVICE), (rows, columns), corners, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    _skip_unless_runnable(backend)
    logits = torch.randn(2, 5, 4, 6, device=DEVICE)
    wide = torch.full((4, 10, 8, 12), torch.nan, device=DEVICE)
    wide[::2, ::2, ::2, ::2] = logits
    assert torch.equal(ak.upsample_argmax(wide[::2, ::2, ::2, ::2], (31, 30), backend=backend),
                       ak.upsample_argmax(logits, (31, 30), backend=backend))  # fmt: skip
    _check(logits.flip(3), (31, 30), False, backend)
    _check(logits[:, :1].expand(2, 5, 4, 6), (31, 30), False, backend)


def test_opcheck_and_compile() -> None:
    logits = torch.randn(2, 5, 4, 6)
    torch.library.opcheck(upsample_argmax, (logits, (33, 30), False, "auto"))
    assert not ak.upsample_argmax(logits.requires_grad_(), 33).requires_grad
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ak.upsample_argmax(x, 33), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), ak.upsample_argmax(logits, 33))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(logits=None), TypeError, "argument 'logits' must be Tensor, not NoneType"),
        (dict(logits=torch.zeros(3, 4, 4)), ValueError, r"logits of shape \[3, 4, 4\]"),
        (dict(size=(0, 4)), ValueError, r"size=\(0, 4\): expected positive numbers"),
        (dict(size=(4, 4, 4)), ValueError, r"size=\(4, 4, 4\): expected positive numbers"),
        (dict(size=2.5), ValueError, "size=2.5: expected positive numbers"),
        (dict(backend="gpu"), ValueError, "unknown backend 'gpu': expected one of auto, cpu, triton, cuda, torch, reference"),
    ],
)
def test_mistakes_name_the_value(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(logits=torch.zeros(1, 3, 4, 4), size=(8, 8)) | changes
    with pytest.raises(error, match=message):
        ak.upsample_argmax(**arguments)


def test_explain() -> None:
    assert "1x21 33x33 to 64x64" in str(ak.explain("upsample_argmax", torch.zeros(1, 21, 33, 33), 64))
