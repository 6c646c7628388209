"""The domain transform beside OpenCV's, plain PyTorch and our own dense CRF.

    pip install opencv-contrib-python-headless
    pytest benchmarks/bench_domain_transform.py --benchmark-enable --benchmark-json=benchmarks/results/domain_transform_cpu.json

Every candidate of a case runs once per round, in a random order, in one process with the same threads. OpenCV takes four channels
at most, so it is called once per four classes, with its weights made once (``createDTFilter``). Plain PyTorch runs in place,
position by position over all rows or columns at once, eager or with each step compiled. Error is the largest difference from
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels.problem import transform_passes
from atrous_kernels.reference import domain_transform as reference
from benchmarks.measure import interleave, percentiles
from segmodels.refine import DenseCRF, DomainTransform, image_edges, unary_from_scores

HEIGHT, WIDTH, CLASSES = 375, 500, 21
SIGMAS = (50.0, 100.0)
SIZE = f"{WIDTH}x{HEIGHT}, {CLASSES} classes"
Calls = dict[str, Callable[[], Any]]


def _scene() -> tuple[Tensor, Tensor]:
    """Scores and an image with flat regions, gradients and a little noise, as photographs have."""
    generator = torch.Generator().manual_seed(0)
    smooth, blocks = (torch.rand(1, 3, *size, generator=generator) for size in ((9, 12), (6, 8)))
    smooth, blocks = F.interpolate(smooth, (HEIGHT, WIDTH), mode="bilinear"), F.interpolate(blocks, (HEIGHT, WIDTH))
    noise = torch.randn(1, 3, HEIGHT, WIDTH, generator=generator)
    image = ((0.4 * smooth + 0.6 * blocks) * 255 + 2 * noise).clamp(0, 255).to(torch.uint8)
    scores = torch.randn(1, CLASSES, 10, 14, generator=generator) * 3
    return F.interpolate(scores, (HEIGHT, WIDTH), mode="bilinear"), image


def _plain(scores: Tensor, edge: Tensor, step: Callable[[Tensor, Tensor, Tensor], Any]) -> Tensor:
    """``step(here, before, weight)`` puts ``here + weight (before - here)`` into ``here``."""
    out = scores.clone()
    for axis, rate, slope in transform_passes(*SIGMAS, 3):
        weights = torch.exp(-rate - slope * edge[:, axis : axis + 1]).unbind(3 - axis)
        lines = out.unbind(3 - axis)
        for i in range(1, len(lines)):
            step(lines[i], lines[i - 1], weights[i])
        for i in reversed(range(len(lines) - 1)):
            step(lines[i], lines[i + 1], weights[i + 1])
    return out


def _opencv(scores: Tensor, image: Tensor) -> Callable[[], Tensor] | None:
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "ximgproc"):
        return None
    cv2.setNumThreads(torch.get_num_threads())
    guide = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    parts = [np.ascontiguousarray(part[0].permute(1, 2, 0).numpy()) for part in scores.split(4, 1)]

    def run() -> Tensor:
        transform = cv2.ximgproc.createDTFilter(guide, *SIGMAS, mode=cv2.ximgproc.DTF_RF, numIters=3)
        results = [transform.filter(part) for part in parts]
        return torch.cat([torch.from_numpy(result.reshape(HEIGHT, WIDTH, -1)) for result in results], 2).permute(2, 0, 1)[None]

    return run


def _layouts(scores: Tensor, call: Callable[[Tensor], Any]) -> Calls:
    last = scores.contiguous(memory_format=torch.channels_last)
    return {"ours auto contiguous": lambda: call(scores), "ours auto channels_last": lambda: call(last)}


def _forward() -> tuple[Calls, Tensor]:
    scores, image = _scene()
    edge = image_edges(image)
    lerp = torch.compile(torch.lerp, dynamic=False)
    calls = _layouts(scores, lambda x: ak.domain_transform(x, image_edges(image), *SIGMAS))
    calls["torch"] = lambda: _plain(scores, image_edges(image), Tensor.lerp_)
    calls["torch.compile"] = lambda: _plain(scores, image_edges(image), lambda here, *rest: here.copy_(lerp(here, *rest)))
    opencv = _opencv(scores, image)
    if opencv is not None:
        calls["OpenCV"] = opencv
    return calls, reference.domain_transform(scores.double(), edge.double(), *SIGMAS, 3)


def _backward() -> tuple[Calls, Tensor]:
    scores, image = _scene()
    edge, grad = image_edges(image) / 20, torch.randn_like(scores)

    def training_step(x: Tensor, backend: str = "auto") -> Tensor:
        operands = [x.detach().requires_grad_(), edge.detach().requires_grad_()]
        out = ak.domain_transform(*operands, 50.0, 5.0, backend=backend)
        return torch.cat([each.flatten() for each in torch.autograd.grad(out, operands, grad)])

    calls = _layouts(scores, training_step)
    calls["torch"] = lambda: training_step(scores, "reference")
    exact = reference.domain_transform_backward(grad.double(), scores.double(), edge.double(), 50.0, 5.0, 3)
    return calls, torch.cat([each.flatten() for each in exact])


def _instead_of_a_crf() -> tuple[Calls, None]:
    scores, image = _scene()
    crf, refine = DenseCRF.preset("deeplabv2_resnet101"), DomainTransform(*SIGMAS)
    calls = _layouts(scores, lambda x: refine(x, image))
    calls["our DenseCRF, 10 iterations"] = lambda: crf.replace()(unary_from_scores(scores), image)
    return calls, None


CASES = {
    f"{SIZE}, along image gradients": _forward,
    f"{SIZE}, learnt edges, forward and backward": _backward,
    f"{SIZE}, in place of a dense CRF": _instead_of_a_crf,
}


@pytest.mark.parametrize("name", CASES)
def test_domain_transform(benchmark: Any, name: str) -> None:
    calls, truth = CASES[name]()
    results = {key: call() for key, call in calls.items()}  # also compiles
    errors = {}
    if truth is not None:
        errors = {key: {"error": (result - truth).abs().max().item()} for key, result in results.items()}
    times, rounds = interleave(benchmark, calls, "ours auto contiguous", budget=6.0)
    benchmark.extra_info.update(
        case=name,
        name="domain_transform",
        rounds=rounds,
        candidates={key: percentiles(t) | errors.get(key, {}) for key, t in times.items()},
    )
    scale = 1.0 if truth is None else max(1.0, truth.abs().max().item())
    assert all(found["error"] < 1e-4 * scale for found in errors.values()), errors
