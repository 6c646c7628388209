"""upsample_cross_entropy: every backend that this machine can run, against the framework's two operators in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops.upsample_cross_entropy import upsample_cross_entropy, upsample_cross_entropy_backward
from atrous_kernels.reference.upsample_cross_entropy import hard_pixels, interpolation_matrix
from tests.repeats import assert_same_bits_for_threads, built_isas, repeat_capped
from tests.upsampling import CASES, DEVICE, LAYOUTS, TOLERANCE, case_of, in_float64, operands

BACKENDS = ("auto", "reference", "cpu", "torch", *(("triton", "cuda") if DEVICE == "cuda" else ()))

def _skip_unless_runnable(backend: str, dtype: torch.dtype = torch.float32) -> None:
    if backend == "triton" and dtype is torch.float64:
        pytest.skip("the Triton kernels sum in float32")
    if backend == "cpu" and (DEVICE != "cpu" or native.cpu_missing()):
        pytest.skip(native.cpu_missing() or "the tensors are on a GPU")
    if backend == "cuda" and (missing := native.cuda_missing()):
        pytest.skip(missing)


def _ours(logits: Tensor, target: Tensor, options: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    x = logits.detach().requires_grad_()
    loss = ak.upsample_cross_entropy(x, target, backend=backend, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64, device=DEVICE).to(loss.dtype).view_as(loss)
    return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]


def _compare(case: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format, backend: str) -> None:
    logits, target, options = operands(case, dtype, layout)
    loss, gradient = _ours(logits, target, options, backend)
    true_loss, true_gradient = in_float64(logits, target, options)
    assert loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert not gradient.numel() or gradient.is_contiguous(memory_format=layout)
    for ours, truth, tolerance in ((loss, true_loss, min(TOLERANCE[dtype], 3e-5)), (gradient, true_gradient, TOLERANCE[dtype])):
        assert ours.shape == truth.shape
        scale = max(truth.abs().max().item(), 1e-3) if truth.numel() else 1.0
        torch.testing.assert_close(ours.double() / scale, truth / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, dtype: torch.dtype, layout: str, backend: str, poison: None) -> None:
    _skip_unless_runnable(backend, dtype)
    _compare(CASES[name], dtype, LAYOUTS[layout], backend)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    side = lambda most: (draw(st.integers(1, most)), draw(st.integers(1, most)))  # noqa: E731
    hard_fraction = draw(st.sampled_from([1.0, 0.25]))
    # Where logits are flat (one pixel wide, or beyond the outermost centres) losses are equal, and rounding picks the hardest.
    # With one label that shows only in which pixels `none` keeps; smoothed to the full, all labels are as good as one.
    smoothing = [0.0, 0.1, 1.0] if hard_fraction == 1 else [0.0, 0.1]
    reduction = ["mean", "sum", "none"] if hard_fraction == 1 else ["mean", "sum"]
    return case_of(
        n=draw(st.integers(1, 3)),
        c=draw(st.integers(1, 40)),
        size=side(9),
        out=side(50),
        align_corners=draw(st.booleans()),
        weighted=draw(st.booleans()),
        options=dict(
            reduction=draw(st.sampled_from(reduction)),
            label_smoothing=draw(st.sampled_from(smoothing)),
            hard_fraction=hard_fraction,
        ),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), nhwc=st.booleans())
def test_random_problems(case: dict[str, Any], nhwc: bool, backend: str) -> None:
    _skip_unless_runnable(backend)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    logits, target, options = operands(case, torch.float64, layout)
    target[:, 0, 0] = 0  # one pixel at least counts
    pairs = zip(_ours(logits, target, options, backend), in_float64(logits, target, options), strict=True)
    for ours, truth in pairs:
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_of_labels_and_any_strides(backend: str) -> None:
    _skip_unless_runnable(backend)
    logits, target, options = operands(case_of(weighted=True), torch.float32, torch.contiguous_format)
    loss, gradient = _ours(logits, target, options, backend)
    wide = torch.full((4, 10, 8, 10), torch.nan, device=DEVICE)
    wide[::2, ::2, ::2, ::2] = logits
    spread = torch.zeros(2, 19, 44, dtype=torch.int64, device=DEVICE)
    spread[:, :, ::2] = target
    weights = torch.full((10,), torch.nan, device=DEVICE)
    weights[::2] = options["weight"]
    for x, t, w in (
        (logits, target.to(torch.uint8), options["weight"]),
        (logits, target.to(torch.int32), options["weight"]),
        (wide[::2, ::2, ::2, ::2], target, options["weight"]),
        (logits, spread[:, :, ::2], weights[::2]),
    ):
        again, gradient_again = _ours(x, t, options | dict(weight=w), backend)
        assert torch.equal(again, loss)
        torch.testing.assert_close(gradient_again, gradient, rtol=0, atol=0)
    transposed = logits.transpose(2, 3).contiguous().transpose(2, 3)
    expanded = logits[:1, :1].expand(2, 5, 4, 5)
    for x in (transposed, expanded):
        torch.testing.assert_close(_ours(x, target, options, backend), _ours(x.contiguous(), target, options, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pixel_counts(backend: str) -> None:
    _skip_unless_runnable(backend)
    logits = torch.randn(2, 3, 4, 4, device=DEVICE)
    target = torch.full((2, 9, 9), 255, device=DEVICE)
    for fraction in (1.0, 0.5):
        for reduction in ("mean", "sum", "none"):
            loss, gradient = _ours(logits, target, dict(reduction=reduction, hard_fraction=fraction), backend)
            theirs, their_gradient = in_float64(logits, target, dict(reduction=reduction))
            torch.testing.assert_close(loss.double(), theirs, equal_nan=True)
            assert torch.equal(gradient.double(), their_gradient)  # zeros


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_neither_overflow_nor_lose_the_loss(backend: str) -> None:
    _skip_unless_runnable(backend)
    logits = torch.randn(1, 4, 3, 3, device=DEVICE) * 1e4
    target = torch.randint(0, 4, (1, 20, 20), device=DEVICE)
    loss, gradient = _ours(logits, target, {}, backend)
    true_loss, true_gradient = in_float64(logits, target, {})
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=0)
    # Pixels where two classes of order 1e4 meet see their difference to 1e4 * 2**-23, about 1e-3.
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFFFFFFF], ids=["quiet", "all bits"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_loss(backend: str, bits: int) -> None:
    _skip_unless_runnable(backend)
    nan = torch.tensor([bits - 2**32 if bits >= 2**31 else bits], dtype=torch.int32, device=DEVICE).view(torch.float32)
    for label in (0, 1):
        logits = torch.zeros(1, 3, 2, 2, device=DEVICE)
        logits[0, 1, 0, 0] = nan
        target = torch.full((1, 8, 8), label, device=DEVICE)
        assert ak.upsample_cross_entropy(logits, target, backend=backend).isnan()
        assert ak.upsample_cross_entropy(logits, target, hard_fraction=0.1, backend=backend).isnan()


def test_hard_pixels_at_ties() -> None:
    loss = torch.tensor([1.0, 3.0, 2.0, 2.0, math.nan, 2.0, 9.0, 0.0]).view(2, 2, 2)
    counted = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1]).bool().view(2, 2, 2)

    def kept(fraction: float) -> list[int]:
        return hard_pixels(loss, counted, fraction).flatten().nonzero().flatten().tolist()

    assert kept(1e-9) == [4]
    assert kept(3 / 7) == [1, 2, 4]
    assert kept(4 / 7) == [1, 2, 3, 4]
    assert kept(1) == [0, 1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("label_type", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_native_selection_of_hard_pixels(dtype: torch.dtype, label_type: torch.dtype) -> None:
    if native.cpu_missing():
        pytest.skip(str(native.cpu_missing()))
    shape = (2, 130, 170)  # large enough for two threads, whose ties must come in order
    plain = torch.randn(shape, dtype=dtype)
    odd = plain.clone()
    odd.view(-1)[::3], odd.view(-1)[::7] = math.nan, math.inf
    zeros = torch.zeros(shape, dtype=dtype)
    zeros.view(-1)[::2] *= -1
    target = torch.randint(0, 3, shape).to(label_type)
    for loss in (plain, plain.round(), odd, zeros, plain[:, :1, :1].contiguous()):
        for labels in (target, torch.ones_like(target)):
            labels = labels[:, : loss.shape[1], : loss.shape[2]].contiguous()
            for fraction in (1e-9, 0.25, 0.999, 1.0):
                found = loss.clone()
                torch.ops.atrous_native.hard_pixels_(found, labels, 1, fraction)
                assert torch.equal(found, hard_pixels(loss, labels != 1, fraction).to(dtype))
    with pytest.raises(RuntimeError, match="fraction: expected above 0, to 1, but got 2"):
        torch.ops.atrous_native.hard_pixels_(plain, target, 1, 2.0)


def test_every_tie_at_once() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    target = torch.randint(0, 2, (1, 7, 9))
    for backend in ("cpu", "torch", "reference"):
        _skip_unless_runnable(backend)
        loss = ak.upsample_cross_entropy(logits, target, hard_fraction=0.25, reduction="none", backend=backend)
        kept = loss.flatten().nonzero().flatten()
        assert kept.tolist() == list(range(16))  # ceil(63 / 4), the first ones


def test_interpolation_matrix_is_the_frameworks() -> None:
    for n_in, n_out in ((1, 1), (1, 5), (5, 1), (4, 17), (17, 4), (6, 6), (33, 513)):
        for corners in (False, True):
            x = torch.eye(n_in, dtype=torch.float64)[None]
            theirs = F.interpolate(x[..., None], size=(n_out, 1), mode="bilinear", align_corners=corners)[0, :, :, 0].T
            torch.testing.assert_close(interpolation_matrix(n_in, n_out, corners, x), theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives(backend: str) -> None:
    _skip_unless_runnable(backend, torch.float64)
    for name in ("weights and smoothing", "none", "sum", "hard pixels"):
        case = CASES[name] | dict(n=1, size=(2, 3), out=(7, 5))
        logits, target, options = operands(case, torch.float64, torch.contiguous_format)
        assert torch.autograd.gradcheck(
            lambda x, t=target, o=options: ak.upsample_cross_entropy(x, t, backend=backend, **o), logits.requires_grad_()
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction: str) -> None:
    x = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = ak.upsample_cross_entropy(x, torch.zeros(1, 5, 5, dtype=torch.int64), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="upsample_cross_entropy is differentiable once"):
        gradient.sum().backward()


def test_gradient_only_where_one_is_needed() -> None:
    x, target = torch.randn(1, 3, 2, 2), torch.zeros(1, 5, 5, dtype=torch.int64)
    options = (255, "mean", 0.0, 1.0, False)
    assert upsample_cross_entropy(x, target, None, *options, False, "auto")[1].shape == (0,)
    assert not ak.upsample_cross_entropy(x, target).requires_grad
    with torch.no_grad():
        assert not ak.upsample_cross_entropy(x.requires_grad_(), target).requires_grad
    # Asked for all the same, it is made up for.
    loss, _ = upsample_cross_entropy(x, target, None, *options, False, "auto")
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(ak.upsample_cross_entropy(x, target), x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    _skip_unless_runnable(backend)
    for layout in LAYOUTS.values():
        for name in ("plain", "none", "hard pixels of all kinds"):
            x, target, options = operands(CASES[name], torch.float32, layout)
            reduction = options.get("reduction", "mean")
            numbers = (255, reduction, options.get("label_smoothing", 0.0), options.get("hard_fraction", 1.0), False)
            arguments = (target, options.get("weight"), *numbers)
            for with_gradient in (False, True):
                torch.library.opcheck(upsample_cross_entropy, (x.requires_grad_(), *arguments, with_gradient, backend))
            x = x.detach()
            loss, gradient = upsample_cross_entropy(x, *arguments, True, backend)
            torch.library.opcheck(upsample_cross_entropy_backward, (torch.ones_like(loss), gradient, x, *arguments, backend))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_and_once(reduction: str) -> None:
    loss = ak.nn.UpsampleCrossEntropyLoss(torch.rand(6), reduction=reduction)
    layer = torch.nn.Conv2d(3, 6, 1)

    def step(x: Tensor, target: Tensor) -> Tensor:
        return loss(layer(x), target).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    target = torch.randint(0, 6, (2, 33, 30))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(2, 3, 5, 5)
            grads = [torch.autograd.grad(f(x, target), layer.parameters()) for f in (compiled, step)]
            torch.testing.assert_close(*grads)


def test_bf16_logits_under_autocast() -> None:
    x, target = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (1, 9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ak.upsample_cross_entropy(F.conv2d(x, torch.eye(3)[:, :, None, None]), target)
    assert loss.dtype is torch.float32
    assert torch.autograd.grad(loss, x)[0].dtype is torch.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(logits=[1.0]), TypeError, "argument 'logits' must be Tensor, not list"),
        (dict(logits=torch.zeros(3, 4, 4)), ValueError, r"logits of shape \[3, 4, 4\]: expected \[N, C, h, w\]"),
        (dict(logits=torch.zeros(1, 3, 4, 4, dtype=torch.int64)), TypeError, "logits of dtype torch.int64"),
        (dict(target=torch.zeros(1, 5, 5)), TypeError, "target of dtype torch.float32: expected int64, int32 or uint8"),
        (dict(target=torch.zeros(2, 5, 5).long()), ValueError, r"target of shape \[2, 5, 5\]: expected \[1, H, W\]"),
        (dict(target=torch.zeros(1, 0, 5).long()), ValueError, r"target of shape \[1, 0, 5\]"),
        (dict(target=torch.full((1, 5, 5), 3)), RuntimeError, "expected classes 0 to 2 or ignore_index=255, but got 3"),
        (dict(target=torch.full((1, 5, 5), -1)), RuntimeError, "expected classes 0 to 2 or ignore_index=255, but got -1"),
        (dict(target=torch.full((1, 5, 5), 2**32)), RuntimeError, "but got 4294967296"),
        (dict(weight=torch.ones(4)), ValueError, r"weight of shape \[4\]: expected \[3\]"),
        (dict(weight=torch.ones(3, requires_grad=True)), ValueError, "weight requires a gradient"),
        (dict(reduction="average"), ValueError, "reduction='average': expected 'mean', 'sum' or 'none'"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing=1.5: expected 0 to 1"),
        (dict(hard_fraction=0), ValueError, "hard_fraction=0: expected above 0, to 1"),
        (dict(backend="winograd"), ValueError, "unknown backend 'winograd': expected one of auto, cpu, triton, cuda,"),
    ],
)
def test_mistakes_name_the_value(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(logits=torch.zeros(1, 3, 4, 4), target=torch.zeros(1, 5, 5).long()) | changes
    for backend in ("cpu", "torch", "reference"):
        _skip_unless_runnable(backend)
        with pytest.raises(error, match=message):
            ak.upsample_cross_entropy(arguments["logits"], arguments["target"], **(
                dict(backend=backend) | {k: v for k, v in arguments.items() if k not in ("logits", "target")}))  # fmt: skip


def test_explain() -> None:
    explanation = ak.explain("upsample_cross_entropy", torch.zeros(4, 21, 33, 33), torch.zeros(4, 513, 513).long())
    assert {choice.name for choice in explanation.choices} == {"cpu", "triton", "cuda", "torch", "reference"}
    assert "4x21 33x33 to 513x513 float32" in str(explanation)
    assert "88.4 MB of upsampled logits" in str(explanation)


def test_a_default_backend_that_the_op_lacks_leaves_it_automatic() -> None:
    logits, target = torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4).long()
    with ak.backend("winograd"):
        assert ak.upsample_cross_entropy(logits, target).item() == pytest.approx(math.log(3))
        assert ak.explain("upsample_cross_entropy", logits, target).chosen in ("cpu", "torch")
    with ak.backend("reference"):
        assert ak.explain("upsample_cross_entropy", logits, target).chosen == "reference"


def test_module() -> None:
    logits, target, options = operands(CASES["weights and smoothing"], torch.float32, torch.contiguous_format)
    module = ak.nn.UpsampleCrossEntropyLoss(**options)
    assert torch.equal(module(logits, target), ak.upsample_cross_entropy(logits, target, **options))
    assert list(module.state_dict()) == list(torch.nn.CrossEntropyLoss(weight=options["weight"]).state_dict())
    assert "label_smoothing=0.3" in repr(module)


@pytest.mark.skipif(native.cpu_missing() is not None, reason="the CPU library was not built")
def test_thread_counts_give_the_same_bits() -> None:
    # Rows of the gradient that two threads share are sums of two parts, losses are summed task by task.
    x, target = torch.randn(2, 21, 9, 9, requires_grad=True), torch.randint(0, 21, (2, 129, 129))

    def call() -> list[Tensor]:
        results = [ak.upsample_argmax(x, 129, backend="cpu")]
        for options in ({}, {"hard_fraction": 0.2}, {"reduction": "none"}):
            loss = ak.upsample_cross_entropy(x, target, weight=torch.arange(21) + 0.1, backend="cpu", **options)
            results += [loss, *torch.autograd.grad(loss, x, torch.ones_like(loss))]
        return results

    assert_same_bits_for_threads(call)


@pytest.mark.skipif(native.cpu_missing() is not None, reason="the CPU library was not built")
def test_more_than_2_to_the_31_elements() -> None:
    # A view whose second image starts 2**31 elements after the first; memory that nobody touches costs nothing.
    logits, target, _ = operands(case_of(), torch.float32, torch.contiguous_format)
    far = torch.empty(0).set_(
        torch.UntypedStorage(4 * (2**31 + logits[0].numel())), 0, logits.shape, (2**31, *logits.stride()[1:])
    )
    far.copy_(logits)
    assert torch.equal(
        ak.upsample_cross_entropy(far, target, backend="cpu"), ak.upsample_cross_entropy(logits, target, backend="cpu")
    )
    # and labels as many
    side = 2**15 + 65
    labels = torch.zeros(2, side, side, dtype=torch.uint8)
    assert labels.numel() > 2**31
    labels[...] = 255
    labels[1, -1, -1] = 0
    loss = ak.upsample_cross_entropy(torch.ones(2, 2, 1, 1), labels, backend="cpu")
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("isa", built_isas())
def test_every_instruction_set(isa: str) -> None:
    """Both ops again, capped and with poisoned scratch memory."""
    files = __file__, __file__.replace("cross_entropy", "argmax")
    chosen = "against_float64 and nhwc and cpu or nan_reaches or large_logits or ties or without_rounding"
    done = repeat_capped(isa, chosen, *files)
    assert done.returncode == 0, done.stdout
