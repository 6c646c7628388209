"""conv2d and its two gradients: every backend that this machine can run, against the framework in float64.

Triton kernels (interpreter) and CUDA kernels (host emulation) have their own folders; with a GPU they run here too.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import atrous_kernels as ak
from atrous_kernels.ops.conv2d import conv2d, conv2d_input, conv2d_weight
from atrous_kernels.problem import out_extent
from tests.repeats import assert_same_bits_for_threads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU_BACKENDS = ("auto", "reference", "cpu", "torch")
BACKENDS = (*CPU_BACKENDS, "triton", "cuda") if DEVICE == "cuda" else CPU_BACKENDS
OPINFO = next(op for op in op_db if op.name == "nn.functional.conv2d")

# Sums of K products: fp32 rounding grows like sqrt(K) * 2**-24 relative to the operands' size, with K <= a few hundred
# below; 16-bit results add half a unit in the last place of the result (2**-9 bf16, 2**-12 fp16) and of each product.
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
    torch.float16: dict(rtol=4e-3, atol=4e-3),
}


def _skip_unless_runnable(backend: str, dtype: torch.dtype = torch.float32) -> None:
    x, w = torch.empty(1, 1, 3, 3, dtype=dtype, device=DEVICE), torch.empty(1, 1, 3, 3, dtype=dtype, device=DEVICE)
    try:
        ak.explain("conv2d", x, w, backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))


def _operands(problem: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format, integers: bool = False) -> list[Tensor]:
    """Input, weight, bias and output gradient; small integers on request, so that every sum is exact."""
    n, c, o, size, k = (problem[key] for key in ("n", "c", "o", "size", "k"))
    out = [out_extent(*a) for a in zip(size, k, problem["stride"], problem["padding"], problem["dilation"], strict=True)]
    shapes = [(n, c, *size), (o, c // problem["groups"], *k), (o,), (n, o, *out)]
    if integers:
        tensors = [torch.randint(-3, 4, shape, dtype=torch.float64) for shape in shapes]
    else:
        tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[1] *= 1 if integers else (c // problem["groups"] * k[0] * k[1]) ** -0.5
    tensors = [t.to(DEVICE, dtype) for t in tensors]
    return [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in tensors]


def _geometry(problem: dict[str, Any]) -> tuple[Any, ...]:
    return problem["stride"], problem["padding"], problem["dilation"], problem["groups"]


def _truth(operands: list[Tensor], problem: dict[str, Any]) -> list[Tensor]:
    x, w, b, g = (t.double().cpu() for t in operands)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    out = F.conv2d(x, w, b, *_geometry(problem))
    return [out.detach(), *torch.autograd.grad(out, (x, w, b), g)]


def _ours(operands: list[Tensor], problem: dict[str, Any], backend: str) -> list[Tensor]:
    x, w, b, g = (t.detach().requires_grad_() for t in operands)
    out = ak.conv2d(x, w, b, *_geometry(problem), backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (x, w, b), g.detach())]


def _compare(problem: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format, backend: str, integers: bool) -> None:
    operands = _operands(problem, dtype, layout, integers)
    exact = integers and dtype in (torch.float32, torch.float64)
    for name, ours, truth in zip(
        ("out", "grad_input", "grad_weight", "grad_bias"),
        _ours(operands, problem, backend),
        _truth(operands, problem),
        strict=True,
    ):
        assert ours.dtype == dtype
        if exact:
            assert torch.equal(ours.double().cpu(), truth), name
        else:
            # Gradients sum over the batch and the image: their size, not 1, sets the scale of the rounding.
            scale = max(truth.abs().max().item(), 1.0) if truth.numel() else 1.0
            torch.testing.assert_close(
                ours.double().cpu() / scale, truth / scale, **TOLERANCE[dtype], msg=lambda m, name=name: f"{name}: {m}"
            )


def _problem(**changes: Any) -> dict[str, Any]:
    base = dict(n=2, c=6, o=4, size=(9, 8), k=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    return base | changes


PROBLEMS = {
    "3x3": _problem(),
    "1x1": _problem(k=(1, 1), padding=(0, 0)),
    "rate 3": _problem(dilation=(3, 3), padding=(3, 3)),
    "rate beyond the image": _problem(dilation=(11, 12), padding=(11, 12)),
    "padding beyond the image": _problem(padding=(20, 13)),
    "strided": _problem(stride=(2, 3), dilation=(2, 1), padding=(2, 1)),
    "stride shares a factor with the rate": _problem(stride=(4, 4), dilation=(2, 6), padding=(3, 7)),
    "asymmetric": _problem(k=(2, 5), padding=(0, 3), dilation=(3, 1), stride=(1, 2)),
    "grouped": _problem(groups=2, dilation=(2, 2), padding=(2, 2)),
    "depthwise": _problem(c=37, o=37, groups=37, dilation=(2, 2), padding=(2, 2)),
    "depthwise strided": _problem(c=18, o=18, groups=18, k=(5, 5), stride=(2, 2), padding=(2, 2)),
    "depthwise with multiplier": _problem(c=6, o=12, groups=6),
    "wide": _problem(n=1, c=70, o=67, size=(7, 7), dilation=(2, 2), padding=(2, 2)),
    "empty batch": _problem(n=0),
    "one pixel": _problem(size=(1, 1)),
    "unread rows": _problem(size=(10, 10), stride=(3, 3), padding=(0, 0)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(name: str, dtype: torch.dtype, layout: torch.memory_format, backend: str, poison: None) -> None:
    _skip_unless_runnable(backend, dtype)
    _compare(PROBLEMS[name], dtype, layout, backend, integers=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_on_integers(name: str, backend: str, poison: None) -> None:
    # Products of integers below 4 summed over a few thousand terms stay below 2**24: any order gives the same bits.
    _skip_unless_runnable(backend)
    for layout in (torch.contiguous_format, torch.channels_last):
        _compare(PROBLEMS[name], torch.float32, layout, backend, integers=True)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    depthwise = draw(st.booleans()) and draw(st.booleans())
    channels = draw(st.integers(1, 20)) if depthwise else groups * draw(st.integers(1, 9))
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    problem = dict(
        n=draw(st.integers(0, 2)),
        c=channels,
        o=channels if depthwise else groups * draw(st.integers(1, 9)),
        size=draw(pair(1, 14)),
        k=draw(pair(1, 5)),
        stride=draw(pair(1, 3)),
        padding=draw(pair(0, 12)),
        dilation=draw(pair(1, 9)),
        groups=channels if depthwise else groups,
    )
    # Grow the padding until the kernel fits: every draw is a legal problem.
    need = [r * (k - 1) + 1 for r, k in zip(problem["dilation"], problem["k"], strict=True)]
    problem["padding"] = tuple(
        max(p, (n - s + 1) // 2) for p, n, s in zip(problem["padding"], need, problem["size"], strict=True)
    )
    return problem


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("auto", "torch")])
@settings(max_examples=60, deadline=None)
@given(problem=problems(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), nhwc=st.booleans())
def test_random_problems(problem: dict[str, Any], dtype: torch.dtype, nhwc: bool, backend: str) -> None:
    _skip_unless_runnable(backend, dtype)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    _compare(problem, dtype, layout, backend, integers=dtype is torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    _skip_unless_runnable(backend)
    problem = _problem(dilation=(2, 2), padding=(2, 2))
    x, w, b, _ = _operands(problem, torch.float32, torch.contiguous_format, integers=True)
    truth = F.conv2d(x, w, b, *_geometry(problem))
    wide = torch.full((2, 12, 18, 16), torch.nan, device=DEVICE)
    wide[:, ::2, ::2, ::2] = x
    spread = w.new_full((8, 12, 3, 3), torch.nan)
    spread[::2, ::2] = w
    biases = b.new_full((8,), torch.nan)
    biases[::2] = b
    strided = (wide[:, ::2, ::2, ::2], spread[::2, ::2], biases[::2])
    for arguments in ((strided[0], w, b), (x, strided[1], b), (x, w, strided[2])):
        assert torch.equal(ak.conv2d(*arguments, *_geometry(problem), backend=backend), truth)
    assert torch.equal(ak.conv2d(x.flip(3), w, b, *_geometry(problem), backend=backend),
                       F.conv2d(x.flip(3), w, b, *_geometry(problem)))  # fmt: skip
    expanded = x[:1, :1].expand(2, 6, 9, 8)
    assert torch.equal(ak.conv2d(expanded, w, b, *_geometry(problem), backend=backend),
                       F.conv2d(expanded, w, b, *_geometry(problem)))  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_layout_follows_the_operands(backend: str) -> None:
    _skip_unless_runnable(backend)
    x, w = torch.randn(2, 4, 6, 5, device=DEVICE), torch.randn(8, 4, 3, 3, device=DEVICE)
    last = torch.channels_last
    assert ak.conv2d(x, w, backend=backend).is_contiguous()
    for a, b in ((x.to(memory_format=last), w), (x, w.to(memory_format=last))):
        out = ak.conv2d(a, b, backend=backend)
        assert out.is_contiguous(memory_format=last)
        assert not out.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend: str) -> None:
    _skip_unless_runnable(backend)
    problem = _problem(n=3, c=33, o=34, size=(19, 21), dilation=(6, 6), padding=(6, 6))
    operands = _operands(problem, torch.float32, torch.channels_last)
    first = _ours(operands, problem, backend)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, _ours(operands, problem, backend), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64])
def test_the_frameworks_own_samples(dtype: torch.dtype) -> None:
    warnings.filterwarnings("ignore", message="Using padding='same'")
    count = 0
    for sample in OPINFO.sample_inputs(DEVICE, dtype, requires_grad=dtype.is_complex or dtype.is_floating_point):
        arguments = (sample.input, *sample.args)
        ours, theirs = ak.conv2d(*arguments, **sample.kwargs), F.conv2d(*arguments, **sample.kwargs)
        torch.testing.assert_close(ours, theirs)
        if theirs.requires_grad:
            leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
            upstream = torch.randn_like(theirs)
            for a, b in zip(
                torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
            ):
                # Samples reach 9 in size: 16-bit sums of such products differ by an ulp of the largest partial sum.
                wide = dict(rtol=2e-2, atol=0.5) if dtype.itemsize == 2 else {}
                torch.testing.assert_close(a, b, **wide)
        count += 1
    assert count >= 15


def test_the_frameworks_own_error_inputs() -> None:
    errors = list(OPINFO.error_inputs(DEVICE))
    assert len(errors) >= 8
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ak.conv2d(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(input=torch.zeros(3)), RuntimeError, r"got input of size: \[3\]"),
        (dict(input=[1.0]), TypeError, "argument 'input' must be Tensor, not list"),
        (dict(weight=None), TypeError, "argument 'weight' must be Tensor, not NoneType"),
        (dict(input=torch.zeros(1, 5, 8, 8)), RuntimeError, r"to have 4 channels, but got 5 channels"),
        (dict(input=torch.zeros(5, 8, 8)), RuntimeError, r"expected input\[5, 8, 8\] to have 4 channels"),
        (dict(bias=torch.zeros(5)), RuntimeError, r"with 6 elements, but got bias of size \[5\]"),
        (dict(bias=torch.zeros(6, 1)), RuntimeError, r"got bias of size \[6, 1\]"),
        (dict(stride=0), RuntimeError, r"got stride=\(0, 0\)"),
        (dict(stride=1.5), TypeError, "'stride' must be an int or a tuple of ints, not 1.5"),
        (dict(stride=(1, 1, 1)), RuntimeError, r"got stride=\[1, 1, 1\]"),
        (dict(padding=(0, -2)), RuntimeError, r"got padding=\(0, -2\)"),
        (dict(padding="full"), RuntimeError, "Invalid padding string: 'full': expected 'same' or 'valid'"),
        (dict(padding="same", stride=2), RuntimeError, r"not supported for strided convolutions, but got stride=\(2, 2\)"),
        (dict(dilation=(1, 0)), RuntimeError, r"got dilation=\(1, 0\)"),
        (dict(dilation=9), RuntimeError, r"padded input size per channel: \(8 x 8\). Kernel size: \(19 x 19\)"),
        (dict(groups=4), RuntimeError, "expected weight to be at least 4 at dimension 0 and divisible by 4"),
        (dict(groups="2"), TypeError, "'groups' must be int, not str"),
        (dict(weight=torch.zeros(6, 4, 3, 3).double()), RuntimeError, "float32.*float64.*should be the same"),
        (dict(weight=torch.zeros(6, 4, 3, 3, device="meta")), RuntimeError, "on one device, but got cpu and meta"),
        (dict(backend="gpu"), ValueError, "unknown backend 'gpu': expected one of auto, winograd, cpu"),
    ],
)
def test_mistakes_name_the_value(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(input=torch.zeros(1, 4, 8, 8), weight=torch.zeros(6, 4, 3, 3)) | changes
    with pytest.raises(error, match=message):
        ak.conv2d(**arguments)
    # The framework refuses the same mistakes with the same type; only a mix with meta tensors it answers in meta.
    if "backend" not in changes and "meta" not in message:
        with pytest.raises(error):
            F.conv2d(**arguments)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("triton", "cuda")])
@pytest.mark.parametrize("name", ["strided", "stride shares a factor with the rate", "asymmetric", "grouped"])
def test_gradients_of_both_orders(name: str, backend: str) -> None:
    _skip_unless_runnable(backend, torch.float64)
    problem = PROBLEMS[name] | dict(n=1, size=(5, 4))
    x, w, b, _ = (t.requires_grad_() for t in _operands(problem, torch.float64, torch.contiguous_format))

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ak.conv2d(x, w, b, *_geometry(problem), backend=backend)

    assert torch.autograd.gradcheck(call, (x, w, b))
    assert torch.autograd.gradgradcheck(call, (x, w, b))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend: str) -> None:
    _skip_unless_runnable(backend)
    problem = _problem(n=1, size=(6, 5), groups=2, dilation=(2, 2), padding=(2, 2))
    for layout in (torch.contiguous_format, torch.channels_last):
        x, w, b, g = (t.requires_grad_() for t in _operands(problem, torch.float32, layout))
        geometry = (*_geometry(problem), backend)
        torch.library.opcheck(conv2d, (x, w, b, *geometry))
        torch.library.opcheck(conv2d_input, (x.shape, w, g, *geometry))
        torch.library.opcheck(conv2d_weight, (x, w.shape, g, *geometry))


def test_compiles_whole_and_once() -> None:
    model = torch.nn.Sequential(ak.nn.Conv2d(3, 8, 3, padding="same", dilation=2), torch.nn.ReLU(), ak.nn.Conv2d(8, 4, 1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 9, 9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x))
            compiled(torch.randn(2, 3, 9, 9)).sum().backward()


def test_compiles_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: ak.conv2d(x, w, padding=2, dilation=2), fullgraph=True, backend="aot_eager", dynamic=True
    )
    w = torch.randn(4, 3, 3, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (9, 12, 17):
            x = torch.randn(2, 3, size, size + 1)
            torch.testing.assert_close(compiled(x, w), F.conv2d(x, w, padding=2, dilation=2))


def test_exports() -> None:
    model = torch.nn.Sequential(ak.nn.Conv2d(3, 8, 3, padding=2, dilation=2), torch.nn.ReLU(), ak.nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    program = torch.export.export(model, (x,))
    assert "atrous.conv2d" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_the_framework(dtype: torch.dtype) -> None:
    ours, theirs = ak.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(4, 6, 3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    results = []
    for module in (ours, theirs):
        with torch.autocast("cpu", dtype):
            out = module(x)
        assert out.dtype is dtype
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, *module.parameters()))))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        # Both round operands and result to 16 bits; sums differ in order, so results differ by an ulp or two.
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1, 3), "same", "valid"])
def test_module_is_a_drop_in(mode: str, padding: Any) -> None:
    arguments = dict(kernel_size=(3, 2), padding=padding, dilation=(2, 1), groups=2, padding_mode=mode)
    torch.manual_seed(1)
    theirs = torch.nn.Conv2d(4, 6, **arguments)
    torch.manual_seed(1)
    ours = ak.nn.Conv2d(4, 6, **arguments)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(2, 4, 8, 7)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    assert repr(ours) == repr(theirs)


def test_module_backend_shows_in_its_repr_and_is_obeyed() -> None:
    module = ak.nn.Conv2d(2, 2, 1, backend="reference")
    assert "backend='reference'" in repr(module)
    with pytest.raises(RuntimeError, match="runs on CUDA devices, not on cpu"):
        ak.nn.Conv2d(2, 2, 1, backend="cuda")(torch.zeros(1, 2, 3, 3))


def test_thread_counts_give_the_same_bits() -> None:
    _skip_unless_runnable("cpu")
    x, w = torch.randn(2, 40, 21, 21, requires_grad=True), torch.randn(48, 40, 3, 3, requires_grad=True)

    def call() -> list[Tensor]:
        out = ak.conv2d(x, w, padding=6, dilation=6, backend="cpu")
        return [out, *torch.autograd.grad(out.square().sum(), (x, w))]

    assert_same_bits_for_threads(call)


def test_more_than_2_to_the_31_elements() -> None:
    # Two bf16 images of 2.2 GB each. A stride of 64 reads few of their pages, and unwritten pages of zeros cost no memory.
    _skip_unless_runnable("cpu", torch.bfloat16)
    side = 2**15 + 65
    x = torch.zeros(2, 1, side, side, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[1, 0, -1, -65:] = torch.arange(65)  # the far corner: every offset into it exceeds 2**31
    w = torch.tensor([[[[2.0]]]], dtype=torch.bfloat16)
    out = ak.conv2d(x, w, stride=64, backend="cpu")
    assert out[1, 0, -1, -2:].tolist() == [0.0, 128.0]
    assert out.abs().sum().item() == 128.0
    grad = conv2d_weight(x, w.shape, torch.ones_like(out), (64, 64), (0, 0), (1, 1), 1, "cpu")
    assert grad.item() == 64.0
