"""DenseCRF beside pydensecrf2, whole calls: lattices of the image, normalisation and ten iterations.

    pip install pydensecrf2 cython
    pytest benchmarks/bench_dense_crf.py --benchmark-enable --benchmark-json=benchmarks/results/dense_crf_cpu.json

Every candidate of a case runs once per round, in a random order, in one process with the same threads; pydensecrf uses one of
them. Error is the largest difference of a marginal from pydensecrf's, for ours; "labels" the share of equal classes. The last
case is the largest resident memory of a process of its own that refines one image of 4000x3000 pixels.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import interleave, percentiles
from segmodels.refine import DenseCRF, unary_from_scores

# Height, width, classes, parameters.
CASES: dict[str, tuple[int, int, int, DenseCRF]] = {
    "VOC, DeepLab v2": (375, 500, 21, DenseCRF.preset("deeplabv2_resnet101")),
    "VOC, wide colours": (375, 500, 21, DenseCRF(w1=10, sigma_alpha=80, sigma_beta=13, w2=3, sigma_gamma=3)),
    "CamVid": (360, 480, 11, DenseCRF.preset("deeplab_largefov")),
    "Cityscapes at half size": (512, 1024, 19, DenseCRF.preset("deeplabv2_resnet101")),
    "ADE20K": (473, 473, 150, DenseCRF.preset("deeplabv2_resnet101")),
}


def _scene(height: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Energies and an image with flat regions, gradients and a little noise, as photographs have."""
    generator = torch.Generator().manual_seed(0)
    smooth, blocks = (torch.rand(1, 3, *size, generator=generator) for size in ((9, 12), (6, 8)))
    smooth, blocks = F.interpolate(smooth, (height, width), mode="bilinear"), F.interpolate(blocks, (height, width))
    noise = torch.randn(1, 3, height, width, generator=generator)
    image = ((0.4 * smooth + 0.6 * blocks) * 255 + 2 * noise).clamp(0, 255).to(torch.uint8)
    scores = F.interpolate(torch.randn(1, classes, 10, 14, generator=generator) * 3, (height, width), mode="bilinear")
    return unary_from_scores(scores), image


def _theirs(crf: DenseCRF, unary: Tensor, image: Tensor) -> Callable[[], Tensor]:
    oracle = pytest.importorskip("pydensecrf.densecrf", reason="nothing to compare with: pip install pydensecrf2 cython")
    _, classes, height, width = unary.shape
    energies = unary[0].flatten(1).contiguous().numpy()
    colours = image[0].permute(1, 2, 0).contiguous().numpy()

    def run() -> Tensor:
        theirs = oracle.DenseCRF2D(width, height, classes)
        theirs.setUnaryEnergy(energies)
        theirs.addPairwiseBilateral(crf.sigma_alpha, crf.sigma_beta, colours, crf.w1)
        theirs.addPairwiseGaussian(crf.sigma_gamma, crf.w2)
        return torch.from_numpy(np.array(theirs.inference(crf.iterations))).view(unary.shape)

    return run


def _ours(crf: DenseCRF, unary: Tensor, image: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return crf.replace()(unary, image)  # a new object, so that nothing is kept from the round before

    return run


@pytest.mark.parametrize("name", CASES)
def test_dense_crf(benchmark: Any, name: str) -> None:
    height, width, classes, crf = CASES[name]
    unary, image = _scene(height, width, classes)
    calls = {
        "ours auto contiguous": _ours(crf, unary, image),
        "ours auto channels_last": _ours(crf, unary.contiguous(memory_format=torch.channels_last), image),
        "pydensecrf2": _theirs(crf, unary, image),
    }
    results = {key: run() for key, run in calls.items()}
    truth = results["pydensecrf2"]
    errors = {key: (result - truth).abs().max().item() for key, result in results.items()}
    labels = min((result.argmax(1) == truth.argmax(1)).double().mean().item() for result in results.values())
    times, rounds = interleave(benchmark, calls, "ours auto contiguous", budget=20.0)
    benchmark.extra_info.update(
        case=f"{name}: {width}x{height}, {classes} classes, {crf.iterations} iterations",
        name=name,
        rounds=rounds,
        labels=labels,
        candidates={key: {**percentiles(t), "error": errors[key]} for key, t in times.items()},
    )
    assert max(errors.values()) < 1e-3, errors
    assert labels >= 0.999


# Prints GiB resident at most before and after, and seconds. Energies and image are there before.
LARGE = """
import resource, time
from benchmarks.bench_dense_crf import _scene
from segmodels.refine import DenseCRF
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
unary, image = _scene(3000, 4000, 21)
before, start = peak(), time.perf_counter()
DenseCRF.preset("deeplabv2_resnet101")(unary, image)
print(before, peak(), time.perf_counter() - start)
"""


def test_memory(benchmark: Any) -> None:
    def run() -> list[float]:
        done = subprocess.run([sys.executable, "-c", LARGE], check=True, capture_output=True, text=True)
        return [float(word) for word in done.stdout.split()]

    before, peak, seconds = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(
        case="4000x3000, 21 classes, 10 iterations", before_gib=before, peak_gib=peak, refine_seconds=seconds
    )
    assert peak * 2**30 < 6e9
