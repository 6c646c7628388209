"""depthwise_conv2d against the framework's convolution with one group per channel, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import atrous_kernels as ak
from atrous_kernels import native

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
BACKENDS = ("auto", "cpu")


def _skip_unless_runnable(backend: str) -> None:
    if backend == "cpu" and native.cpu_missing():
        pytest.skip(str(native.cpu_missing()))


def _integers(*sizes: int, dtype: torch.dtype, layout: str) -> Tensor:
    return torch.randint(-3, 4, sizes).to(dtype).contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rate", [1, 2, 3, 6, 12, 18, 24, 36])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_is_conv2d_with_one_group_per_channel(
    kernel: int, stride: int, rate: int, dtype: torch.dtype, layout: str, backend: str, poison: None
) -> None:
    _skip_unless_runnable(backend)
    channels, padding = 19, rate * (kernel // 2)
    x = _integers(2, channels, 11, 13, dtype=dtype, layout=layout).requires_grad_()
    w = _integers(channels, 1, kernel, kernel, dtype=dtype, layout=layout).requires_grad_()
    b = torch.randint(-3, 4, (channels,)).to(dtype).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    ours = ak.depthwise_conv2d(x, w, b, stride, padding, rate, backend=backend)
    truth = F.conv2d(*wide, stride, padding, rate, channels)
    assert ours.is_contiguous(memory_format=LAYOUTS[layout])
    g = _integers(*truth.shape, dtype=dtype, layout=layout)
    results = (ours, *torch.autograd.grad(ours, (x, w, b), g))
    truths = (truth, *torch.autograd.grad(truth, wide, g.double()))
    for name, a, exact in zip(("out", "grad_input", "grad_weight", "grad_bias"), results, truths, strict=True):
        # Sums of small integers are exact in the accumulator in any order, so the result is the exact sum, rounded once.
        assert a.dtype == dtype
        assert torch.equal(a, exact.to(dtype)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_multiplier_and_unbatched_and_padding_by_name(backend: str) -> None:
    _skip_unless_runnable(backend)
    x, w, b = torch.randn(6, 9, 8), torch.randn(18, 1, 3, 3), torch.randn(18)
    for padding in ("same", "valid", (2, 0)):
        ours = ak.depthwise_conv2d(x, w, b, padding=padding, dilation=(2, 1), backend=backend)
        # Nine products of unit normals and a bias: rounding stays below ten units in the last place (2**-24) of 10.
        torch.testing.assert_close(ours, F.conv2d(x, w, b, 1, padding, (2, 1), 6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    w, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((6, 1, 3, 3), (6,)))

    def call(*operands: Tensor) -> Tensor:
        return ak.depthwise_conv2d(*operands, stride=(1, 2), padding=2, dilation=2)

    assert torch.autograd.gradcheck(call, (x, w, b))
    assert torch.autograd.gradgradcheck(call, (x, w, b))


def test_compiles_whole_and_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ak.depthwise_conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    w = torch.randint(-3, 4, (4, 1, 3, 3)).float()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (9, 12, 17):
            x = torch.randint(-3, 4, (2, 4, size, size + 1)).float()
            assert torch.equal(compiled(x, w, padding=2, dilation=2), F.conv2d(x, w, None, 1, 2, 2, 4))


def test_runs_the_registered_convolution() -> None:
    """A mode sees the op; a profile, which changes nothing, sees the node that stands for it in eager mode."""
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            seen.append(function)
            return function(*arguments, **(options or {}))

    x, w = torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 3, 3, requires_grad=True)
    with Watching():
        ak.depthwise_conv2d(x, w)
    assert torch.ops.atrous.conv2d.default in seen
    with torch.profiler.profile() as profile:
        ak.depthwise_conv2d(x, w)
    assert "Conv2dRecorded" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(3, 1, 3, 3)), TypeError, "argument 'input' must be Tensor, not list"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(3, 3, 3)), RuntimeError, "expects a 4-dimensional weight"),
        ((torch.zeros(4, 4), torch.zeros(3, 1, 3, 3)), RuntimeError, r"but got input of size: \[4, 4\]"),
        (
            (torch.zeros(1, 3, 4, 4), torch.zeros(3, 3, 3, 3)),
            ValueError,
            r"weight of shape \[3, 3, 3, 3\]: expected \[3, 1, kh, kw\], or m \* 3 for m filters per channel, as the input of "
            r"shape \[1, 3, 4, 4\] has 3 channels",
        ),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(4, 1, 3, 3)), ValueError, r"weight of shape \[4, 1, 3, 3\]: expected \[3, 1, "),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(0, 1, 3, 3)), ValueError, r"weight of shape \[0, 1, 3, 3\]: expected \[3, 1, "),
        ((torch.zeros(1, 0, 4, 4), torch.zeros(3, 1, 3, 3)), ValueError, r"\[1, 0, 4, 4\]: expected at least one channel"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(3, 1, 5, 5)), RuntimeError, r"Kernel size: \(5 x 5\)"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(3, 1, 3, 3), torch.zeros(2)), RuntimeError, r"bias of size \[2\] instead"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(3, 1, 3, 3).double()), RuntimeError, "should be the same"),
    ],
)
def test_mistakes_name_the_value(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ak.depthwise_conv2d(*arguments)


def test_winograd_asked_for_by_name_says_why_not() -> None:
    with pytest.raises(RuntimeError, match="is for dense convolution"):
        ak.depthwise_conv2d(torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 3, 3), backend="winograd")
