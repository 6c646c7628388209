"""The CUDA kernels of upsample_cross_entropy and upsample_argmax, really executed on the host, through the public ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_conv2d import virtual

import atrous_kernels as ak
from tests import upsampling
from tests.ops import test_upsample_argmax as of_argmax
from tests.ops import test_upsample_cross_entropy as of_loss
from tests.upsampling import CASES, LAYOUTS, TOLERANCE, case_of, in_float64, operands

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")


@pytest.fixture(autouse=True, scope="module")
def _emulation() -> Iterator[None]:
    with emulated.as_cuda_backend("upsample_cross_entropy", "upsample_argmax"), pytest.MonkeyPatch.context() as patch:
        for module in (of_loss, of_argmax):
            patch.setattr(module, "_skip_unless_runnable", lambda *_: None)
        for module in (of_loss, of_argmax, upsampling):
            patch.setattr(module, "DEVICE", "cpu")  # whatever else the machine has
        yield


# What only these kernels have: tiles of 8 rows and 32 columns that end inside, on and between low-resolution pixels; classes in
# stretches of 32; a low-resolution pixel below many tiles, and many below one tile.
LOSSES = CASES | {
    "whole tiles": case_of(n=1, size=(3, 3), out=(16, 64)),
    "a column and a row beyond a tile": case_of(n=1, c=33, size=(2, 3), out=(9, 33), weighted=True),
    "many below one tile": case_of(n=1, size=(25, 90), out=(8, 32), align_corners=True),
    "32 classes": case_of(n=1, c=32, size=(2, 2), out=(5, 7), options=dict(label_smoothing=0.2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_against_float64(name: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    of_loss._compare(LOSSES[name], dtype, LAYOUTS[layout], "cuda")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=of_loss.cases(), nhwc=st.booleans())
def test_random_losses(case: dict[str, Any], nhwc: bool) -> None:
    logits, target, options = operands(case, torch.float64, torch.channels_last if nhwc else torch.contiguous_format)
    target[:, 0, 0] = 0  # one pixel at least counts
    ours, truth = of_loss._ours(logits, target, options, "cuda"), in_float64(logits, target, options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "case",
    [
        of_loss.test_types_of_labels_and_any_strides,
        of_loss.test_no_pixel_counts,
        of_loss.test_large_logits_neither_overflow_nor_lose_the_loss,
        of_loss.test_derivatives,
        of_argmax.test_equal_to_the_framework_without_rounding,
        of_argmax.test_ties_and_nan,
        of_argmax.test_any_strides,
    ],
    ids=lambda case: case.__name__,
)
def test_as_every_backend(case: Any) -> None:
    case("cuda")


def test_nan_reaches_the_loss() -> None:
    of_loss.test_nan_reaches_the_loss("cuda", 0x7FC00000)


@pytest.mark.parametrize("label", [3, -1, 2**32, 2**31 + 1])
def test_a_label_that_is_no_class_gives_nan(label: int) -> None:
    """A kernel cannot raise an error without waiting for it; what the label concerns is not a number, and nothing else is."""
    logits, target = torch.randn(1, 3, 4, 4, requires_grad=True), torch.zeros(1, 64, 64).long()
    target[0, 0, 0] = label
    loss = ak.upsample_cross_entropy(logits, target, reduction="none", backend="cuda")
    assert loss[0, 0, 0].isnan()
    assert loss.isnan().sum() == 1
    total = ak.upsample_cross_entropy(logits, target, reduction="sum", backend="cuda")
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.isnan()
    assert gradient[0, :, 0, 0].isnan().all()
    assert not gradient[0, :, 2:].isnan().any()


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", of_argmax.SIZES)
def test_classes_against_float64(name: str, dtype: torch.dtype, nhwc: bool, corners: bool, poison: None) -> None:
    shape, size = of_argmax.SIZES[name]
    layout = torch.channels_last if nhwc else torch.contiguous_format
    of_argmax._check(torch.randn(shape).mul(3).to(dtype).contiguous(memory_format=layout), size, corners, "cuda")


def test_order_of_threads_changes_no_bit() -> None:
    """Bitwise repeatable, also with the threads of a block in other orders: no barrier is missing, nothing races."""
    results = []
    try:
        for kind, seed in (("ascending", 0), ("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)):
            emulated.schedule(kind, seed)
            torch.manual_seed(3)
            x, target = torch.randn(2, 5, 4, 5, requires_grad=True), torch.randint(0, 5, (2, 19, 70))
            loss = ak.upsample_cross_entropy(x, target, weight=torch.arange(5) + 0.1, label_smoothing=0.1, backend="cuda")
            results.append([loss, *torch.autograd.grad(loss, x), ak.upsample_argmax(x, (19, 70), backend="cuda")])
    finally:
        emulated.schedule("ascending")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("far", ["n", "c", "h", "w"])
def test_more_than_2_to_the_31_elements(far: str) -> None:
    """Neighbours along one dimension of the logits lie more than 2^31 elements apart."""
    step = 2**31 + 24
    strides = {"n": (step, 1, 4, 2), "c": (4, step, 2, 1), "h": (8, 1, step, 2), "w": (8, 1, 2, step)}[far]
    logits = virtual(2 * (step + 64)).view(torch.float32).as_strided((2, 2, 2, 2), strides)
    logits.copy_(torch.randint(-3, 4, logits.shape))
    target = torch.randint(0, 2, (2, 5, 40))
    arguments = target, torch.ones(2), None, 255, 0.1, False, True, True
    ours, near = (emulated.ops().upsample_cross_entropy(x, *arguments) for x in (logits, logits.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(ours, near, strict=True))
    classes = [ak.upsample_argmax(x, (5, 40), backend="cuda") for x in (logits, logits.contiguous())]
    assert torch.equal(*classes)


def test_no_output_pixels() -> None:
    logits, target = torch.randn(1, 3, 2, 2), torch.zeros(1, 0, 4).long()
    results = emulated.ops().upsample_cross_entropy(logits, target, torch.ones(3), None, 255, 0.0, False, False, True)
    assert not results[1].any()
    assert results[2].tolist() == [0.0, 0.0]
    assert math.prod(emulated.ops().upsample_argmax(logits, [0, 4], False).shape) == 0
