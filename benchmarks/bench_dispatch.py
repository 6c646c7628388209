"""What a call costs beside the arithmetic: the choice of an implementation, and a whole eager call on a tiny problem.

    pytest benchmarks/bench_dispatch.py --benchmark-enable --benchmark-json=benchmarks/results/dispatch_cpu.json

The problem is a 1x1 convolution of 4 channels on 4x4 pixels: some hundred nanoseconds of arithmetic. Every candidate runs in
batches of calls, one batch per round, in a random order; times are per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import atrous_kernels as ak
from atrous_kernels.ops import conv2d as conv2d_op
from benchmarks.measure import interleave, percentiles

BATCH = 500
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)


def _batch(call: Callable[[], Any], training: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(training):
            for _ in range(BATCH):
                call()

    return run


@pytest.mark.parametrize("case", ["inference", "training forward", "training forward+backward"])
def test_cost_of_a_call(benchmark: Any, case: str) -> None:
    training = case != "inference"
    x, w = torch.randn(1, 4, 4, 4, requires_grad=training), torch.randn(4, 4, 1, 1, requires_grad=training)
    ready = torch.randn(1, 4, 4, 4)

    def whole(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        if case == "training forward+backward":
            return lambda: torch.autograd.grad(function(x, w), (x, w), ready)
        return lambda: function(x, w)

    calls = {
        "choice": _batch(lambda: conv2d_op.pick("conv2d", "auto", x.shape, w.shape, GEOMETRY, x, False), training),
        "ours auto": _batch(whole(ak.conv2d), training),
        "ours cpu": _batch(whole(lambda x, w: ak.conv2d(x, w, backend="cpu")), training),
        "ours torch": _batch(whole(lambda x, w: ak.conv2d(x, w, backend="torch")), training),
        "torch": _batch(whole(F.conv2d), training),
    }
    times, rounds = interleave(benchmark, calls, "ours auto")
    per_call = {name: [seconds / BATCH for seconds in values] for name, values in times.items()}
    benchmark.extra_info.update(
        case=case, rounds=rounds, calls_per_round=BATCH, candidates={name: percentiles(v) for name, v in per_call.items()}
    )
    # The limit is 5 us on a quiet machine; the fastest of all rounds does not see its neighbours.
    assert min(per_call["choice"]) < 5e-6
