"""Calls that are remembered: the second one gives what the first one gave, and whatever could change the answer is seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import dispatch, repeats
from atrous_kernels.ops import conv2d as op


@pytest.fixture(autouse=True)
def _nothing_is_known() -> None:
    dispatch.forget()


def _conv_bn(x: Tensor, w: Tensor, **options: object) -> Tensor:
    norm = [torch.linspace(0.5, 1.5, len(w), dtype=x.dtype) for _ in range(4)]
    return ak.conv_bn_relu(x, w, *norm, padding=1, **options)  # type: ignore[arg-type]


def test_every_call_like_one_before_is_right() -> None:
    w = torch.randn(6, 4, 3, 3)
    b = torch.randn(6)
    wide = torch.randn(2, 4, 9, 14)
    with torch.no_grad():
        for _ in range(2):
            for x in (wide, wide.contiguous(memory_format=torch.channels_last), wide[..., ::2], wide[:1], wide.transpose(2, 3)):
                for bias in (None, b, b.repeat_interleave(2)[::2]):
                    for padding, dilation in ((1, 1), ((2, 1), (2, 1)), ([2, 2], 2), ("same", 2)):
                        ours = ak.conv2d(x, w, bias, padding=padding, dilation=dilation)
                        torch.testing.assert_close(ours, F.conv2d(x, w, bias, 1, padding, dilation), rtol=1e-4, atol=1e-4)
        assert dispatch.repeats


def test_bad_calls_stay_bad() -> None:
    x, w = torch.randn(1, 4, 9, 9), torch.randn(6, 4, 3, 3)
    with torch.no_grad():
        for _ in range(2):
            ak.conv2d(x, w)
            with pytest.raises(RuntimeError, match="channels"):
                ak.conv2d(x[:, :3], w)
            with pytest.raises(RuntimeError, match="should be the same"):
                ak.conv2d(x.double(), w)
            with pytest.raises(ValueError, match="unknown backend"):
                ak.conv2d(x, w, backend="none")
            _conv_bn(x, w)
            with pytest.raises(ValueError, match="activation"):
                _conv_bn(x, w, activation="gelu")
            with pytest.raises(ValueError, match="residual"):
                _conv_bn(x, w, residual=x)


def test_modes_and_threads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the default backend, of the precision or of the number of threads chooses anew."""
    x, w = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3)
    asked: list[tuple[str, int]] = []

    def choose(name: str, backend: str, *rest: object, pick=op.pick) -> dispatch.Implementation:  # type: ignore[no-untyped-def]
        asked.append((backend if backend != "auto" else dispatch.default_backend(), torch.get_num_threads()))
        return pick(name, backend, *rest)

    monkeypatch.setattr(op, "pick", choose)
    threads = torch.get_num_threads()
    with torch.no_grad():
        for call in (lambda: ak.conv2d(x, w, padding=1), lambda: _conv_bn(x, w)):
            asked.clear()
            for _ in range(3):
                call()
            assert len(asked) == 1
            with dispatch.backend("reference"):
                call()
            assert asked[1][0] == "reference"
            with dispatch.precision("ieee"):
                call()
            assert len(asked) == 3
            try:
                torch.set_num_threads(threads + 1)
                call()
            finally:
                torch.set_num_threads(threads)
            assert asked[3][1] == threads + 1


def test_observers_see_the_op() -> None:
    """What was remembered in eager mode does not hide a call from autocast, a transform or a graph."""
    x, w = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 3, 3)
    with torch.no_grad():
        plain, fused = ak.conv2d(x, w, padding=1), _conv_bn(x, w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ak.conv2d(x, w, padding=1).dtype is torch.bfloat16
            assert _conv_bn(x, w).dtype is torch.bfloat16
    w.requires_grad_()
    assert ak.conv2d(x, w, padding=1).grad_fn is not None
    assert _conv_bn(x, w).grad_fn is not None
    torch.testing.assert_close(torch.vmap(lambda x: ak.conv2d(x[None], w, padding=1)[0])(x), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_conv_bn(x, w), fused, rtol=1e-4, atol=1e-5)


def test_conjugated_inputs_are_not_taken_for_plain_ones() -> None:
    x, w = torch.randn(1, 2, 5, 5, dtype=torch.complex64), torch.randn(3, 2, 3, 3, dtype=torch.complex64)
    with torch.no_grad():
        for _ in range(2):
            for each in (x, x.conj()):
                torch.testing.assert_close(ak.conv2d(each, w), F.conv2d(each, w), rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "LIMIT", 3)
    w = torch.randn(2, 1, 1, 1)
    with torch.no_grad():
        for size in range(1, 9):
            ak.conv2d(torch.randn(1, 1, size, size), w)
            assert len(dispatch.repeats) <= 3


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_one_node_of_training_equals_the_two_ops(activation: str, residual: bool) -> None:
    """The eager node of convolution, statistics and activation against the ops that a trace sees; twice differentiable."""
    x, w = torch.randn(3, 4, 7, 6, dtype=torch.float64), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, torch.rand(5).double() + 0.5, torch.randn(5).double())]
    leaves += [torch.randn(3, 5, 7, 6, dtype=torch.float64, requires_grad=True)] if residual else []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            return function(*arguments, **(options or {}))

    def run(x: Tensor, w: Tensor, gain: Tensor, bias: Tensor, *residual: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
        added = residual[0] if residual else None
        out = ak.conv_bn_relu(
            x, w, gain, bias, mean, var, padding=2, dilation=2, training=True, activation=activation, residual=added
        )
        return out, torch.cat([mean, var])

    ours, running = run(*leaves)
    with Watching():
        theirs, their_running = run(*leaves)
    assert "ConvBnActTrain" in type(ours.grad_fn).__name__
    assert "ConvBnActTrain" not in type(theirs.grad_fn).__name__
    upstream = torch.randn_like(ours)
    for a, b in (
        (ours, theirs),
        (running, their_running),
        *zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True),
    ):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(lambda *leaves: run(*leaves)[0], leaves, atol=1e-4)
