"""Whole networks: the same model and weights on our convolutions and on the framework's.

    pytest benchmarks/bench_models.py --benchmark-enable --benchmark-json=benchmarks/results/models_cpu.json

A training step is forward, loss on logits upsampled to the labels, backward and the optimiser's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import atrous_kernels as ak
from benchmarks.measure import Call, interleave, percentiles
from segmodels import create_model
from segmodels.engine.build import keep_freed_memory

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A model at one size."""

    model: str
    batch: int
    size: tuple[int, int]
    train: bool
    classes: int = 21
    amp: bool = False

    def __str__(self) -> str:
        what = "training step" if self.train else "inference"
        return f"{self.model} {what}, {self.batch}x{self.size[0]}x{self.size[1]}{' bf16 autocast' if self.amp else ''}"


CASES = [
    Case("deeplabv3plus_efficientnet_lite0", 8, (360, 360), True, 11),
    Case("deeplabv3plus_efficientnet_lite0", 16, (321, 321), True),
    Case("deeplabv3plus_efficientnet_lite0", 1, (360, 480), False, 11),
    Case("deeplabv3_resnet50", 1, (513, 513), False),
]


def _calls(case: Case) -> dict[str, Call]:
    torch.manual_seed(0)
    image = torch.randn(case.batch, 3, *case.size)
    label = torch.randint(0, case.classes, (case.batch, *case.size))
    calls: dict[str, Call] = {}
    for layout, memory_format in LAYOUTS.items():
        torch.manual_seed(0)
        model = create_model(case.model, num_classes=case.classes).to(memory_format=memory_format).train(case.train)
        x = image.contiguous(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)

        def step(model: Any = model, x: torch.Tensor = x, optimizer: Any = optimizer) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
                if not case.train:
                    with torch.inference_mode():
                        return model(x)["out"]
                loss = F.cross_entropy(model(x)["out"].float(), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        for name, backend in (("ours auto", "auto"), ("torch", "torch")):

            def call(step: Call = step, backend: str = backend) -> torch.Tensor:
                with ak.backend(backend):
                    return step()

            calls[f"{name} {layout}"] = call
    return calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_model(benchmark: Any, case: Case) -> None:
    keep_freed_memory()  # as the training command does, for every candidate alike
    calls = _calls(case)
    first = {name: call() for name, call in calls.items()}
    reference = first["torch contiguous"]
    # The same network and weights: sums differ in order only, amplified by a few dozen layers (and, in training, one step).
    for name, value in first.items():
        torch.testing.assert_close(value, reference, rtol=5e-2, atol=5e-2, msg=name)
    times, rounds = interleave(benchmark, calls, "ours auto channels_last", budget=30.0)
    benchmark.extra_info.update(
        case=str(case),
        model=case.model,
        train=case.train,
        batch=case.batch,
        rounds=rounds,
        candidates={
            name: percentiles(t) | {"images_per_second": case.batch / sorted(t)[len(t) // 2]} for name, t in times.items()
        },
    )
