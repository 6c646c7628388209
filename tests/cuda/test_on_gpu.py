"""On a GPU: results of small problems, streams, devices, CUDA graphs, memory. ``benchmarks/gpu.sh`` runs these."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.triton.runtime import unavailable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this PyTorch can use")

OPS: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    "conv2d": lambda x, w, labels, backend: ak.conv2d(x, w, padding=4, dilation=4, backend=backend),
    "depthwise": lambda x, w, labels, backend: ak.conv2d(x, w[:, :1], padding=4, dilation=4, groups=x.shape[1], backend=backend),
    "conv_bn_relu": lambda x, w, labels, backend: ak.conv_bn_relu(
        x, w, None, None, None, None, padding=4, dilation=4, training=True, backend=backend
    ),
    "upsample_cross_entropy": lambda x, w, labels, backend: ak.upsample_cross_entropy(x, labels, backend=backend),
    "upsample_argmax": lambda x, w, labels, backend: ak.upsample_argmax(x, (35, 35), backend=backend),
    "pyramid_pool": lambda x, w, labels, backend: torch.cat(
        [level.flatten(1) for level in ak.pyramid_pool(x, (1, 2, 3), backend=backend)], 1
    ),
}


def _operands(device: str) -> tuple[Tensor, Tensor, Tensor]:
    x, w = (torch.randn(size, device=device) for size in ((2, 16, 9, 9), (16, 16, 3, 3)))
    labels = torch.randint(0, 16, (2, 35, 35), device=device)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_(), w.requires_grad_(), labels


def _results(name: str, operands: tuple[Tensor, Tensor, Tensor], backend: str) -> list[Tensor]:
    """The result and, where there are any, the gradients of its sum of squares."""
    out = OPS[name](*operands, backend)
    if not out.requires_grad:
        return [out]
    wanted = [t for t in operands[:2] if t.requires_grad]
    gradients = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)]


@pytest.fixture(params=[f"{op}, {backend}" for op, backend in product(OPS, ("triton", "cuda"))])
def case(request: Any) -> tuple[str, str]:
    name, backend = request.param.split(", ")
    missing = native.cuda_missing() if backend == "cuda" else unavailable("cuda", torch.float32)
    if missing is not None:
        pytest.skip(missing)
    op = "conv2d" if name == "depthwise" else name
    if backend not in {choice.name for choice in _choices(op)}:
        pytest.skip(f"{op} has no implementation {backend!r}")
    return name, backend


def _choices(op: str) -> Any:
    x, w, labels = _operands("cuda")
    arguments: dict[str, tuple[Any, ...]] = {
        "conv2d": (x, w), "conv_bn_relu": (x, w, None, None, None, None),
        "upsample_cross_entropy": (x, labels), "upsample_argmax": (x, (35, 35)), "pyramid_pool": (x, (1, 2, 3)),
    }  # fmt: skip
    return ak.explain(op, *arguments[op]).choices


def _same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        # float32 against float64: a few hundred products and sums at most.
        scale = max(b.double().abs().max().item(), 1.0)
        torch.testing.assert_close(a.double().cpu() / scale, b.double().cpu() / scale, rtol=1e-5, atol=1e-5)


def test_small(case: tuple[str, str]) -> None:
    """The same numbers as the reference in float64 on the CPU. compute-sanitizer runs this one."""
    name, backend = case
    operands = _operands("cuda")
    x, w, labels = operands
    exact = x.detach().double().cpu().requires_grad_(), w.detach().double().cpu().requires_grad_(), labels.cpu()
    _same(_results(name, operands, backend), _results(name, exact, "reference"))


def test_current_stream(case: tuple[str, str]) -> None:
    """On a stream whose earlier work is slow, an op waits for it and nothing else: elsewhere it would read stale zeros."""
    name, backend = case
    x, w, labels = _operands("cuda")
    expected = _results(name, (x, w, labels), backend)
    late = torch.zeros_like(x).requires_grad_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # clock cycles: some tens of milliseconds
        with torch.no_grad():
            late.copy_(x)
        found = _results(name, (late, w, labels), backend)
    side.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_graph(case: tuple[str, str]) -> None:
    """Captured once, forward and backward, and replayed on other values."""
    name, backend = case
    x, w, labels = _operands("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes the tables
        _results(name, (x, w, labels), backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _results(name, (x, w, labels), backend)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    for a, b in zip(captured, _results(name, (x, w, labels), backend), strict=True):
        assert torch.equal(a, b)


def test_memory_is_the_framework_s(case: tuple[str, str]) -> None:
    """What an op takes from the device is what the framework's allocator takes."""
    name, backend = case
    operands = _operands("cuda")
    _results(name, operands, backend)  # compiles, loads modules
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    results = [_results(name, operands, backend) for _ in range(3)]
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] == torch.cuda.memory_reserved() - reserved
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(case: tuple[str, str]) -> None:
    """Tensors decide where an op runs, not the current device, which stays what it was."""
    name, backend = case
    x, w, labels = _operands("cuda:0")
    expected = _results(name, (x, w, labels), backend)
    elsewhere = x.detach().to("cuda:1").requires_grad_(), w.detach().to("cuda:1").requires_grad_(), labels.to("cuda:1")
    found = _results(name, elsewhere, backend)
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device == torch.device("cuda", 1)
        assert torch.equal(a.cpu(), b.cpu())
