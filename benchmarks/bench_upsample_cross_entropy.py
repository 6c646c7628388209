"""upsample_cross_entropy beside F.cross_entropy of F.interpolate, forward + backward, on the shapes of segmentation networks.

    pytest benchmarks/bench_upsample_cross_entropy.py --benchmark-enable \
        --benchmark-json=benchmarks/results/upsample_cross_entropy_cpu.json

Every candidate of a case runs once per round, in a random order, in one process with the same threads. Error is the largest
difference from float64, relative to the root mean square of the float64 result, of the loss and of the gradient. Extra
peak memory is what one call adds to the resident memory of a fresh process (Linux).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from benchmarks.measure import DEVICE, ceilings, interleave, peak_growth, percentiles

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PEERS = ("torch", "torch.compile")


@dataclass(frozen=True)
class Case:
    """The loss of one network at the resolution of its labels; a tenth of the pixels is not labelled."""

    name: str
    batch: int
    classes: int
    size: int
    out: int
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        options = "".join(f" {key} {value}" for key, value in self.options.items())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {self.batch}x{self.classes} {self.size}x{self.size} to {self.out}x{self.out}{options} {dtype}"


CASES = [
    Case("DeepLabv3 OS16", 4, 21, 33, 513),
    Case("DeepLabv3 OS16", 4, 21, 33, 513, dtype=torch.bfloat16),
    Case("DeepLabv3+ OS4", 4, 21, 129, 513),
    Case("DeepLabv3 OS8", 2, 19, 97, 769),
    Case("DeepLabv3 OS8", 2, 19, 97, 769, {"hard_fraction": 0.25}),
    Case("PSPNet ADE20K", 2, 150, 60, 473),
    Case("PSPNet ADE20K", 2, 150, 60, 473, {"label_smoothing": 0.1}),
    Case("CamVid", 8, 11, 23, 360),
]


def framework(logits: Tensor, target: Tensor, hard_fraction: float = 1.0, **options: Any) -> Tensor:
    """What a user writes instead."""
    z = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
    if hard_fraction == 1:
        return F.cross_entropy(z, target, ignore_index=255, **options)
    loss = F.cross_entropy(z, target, ignore_index=255, reduction="none", **options).flatten()
    return loss.topk(int(hard_fraction * loss.numel())).values.mean()


def operands(case: Case, layout: str) -> tuple[Tensor, Tensor]:
    """Logits, which require a gradient, and labels in patches of 32 x 32 pixels."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(case.batch, case.classes, case.size, case.size)).to(DEVICE, case.dtype)
    patches = torch.randint(0, case.classes, (case.batch, 1, case.out // 32 + 1, case.out // 32 + 1)).float()
    patches[torch.rand(patches.shape) < 0.1] = 255
    target = F.interpolate(patches, scale_factor=32)[:, 0, : case.out, : case.out].long().contiguous().to(DEVICE)
    return logits.contiguous(memory_format=LAYOUTS[layout]).requires_grad_(), target


def call(case: Case, loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> Callable[[], list[Tensor]]:
    def both() -> list[Tensor]:
        value = loss(logits, target, **case.options)
        return [value.detach(), *torch.autograd.grad(value, logits)]

    return both


def losses(backend: str = "auto") -> dict[str, Callable[..., Tensor]]:
    def ours(*arguments: Any, **options: Any) -> Tensor:
        return ak.upsample_cross_entropy(*arguments, backend=backend, **options)

    return {"ours auto": ours, "torch": framework, "torch.compile": torch.compile(framework, dynamic=False)}


def extra_peak_bytes(index: int, name: str, layout: str) -> int | None:
    """What one forward + backward of a candidate adds to the resident memory of a fresh process."""
    if not Path("/proc/self/clear_refs").exists() or DEVICE != "cpu":
        return None
    program = f"from benchmarks.{Path(__file__).stem} import report_peak; report_peak({index}, {name!r}, {layout!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def report_peak(index: int, name: str, layout: str) -> None:
    """Prints the growth; once the libraries are loaded and, where it compiles, the same call was compiled."""
    case = CASES[index]
    small = Case("warm-up", 1, case.classes, 2, 40, case.options, case.dtype)
    loss = losses()[name]
    arguments = operands(case, layout)
    for _ in range(2):
        call(
            case if name == "torch.compile" else small, loss, *(arguments if name == "torch.compile" else operands(small, layout))
        )()
    print(peak_growth(call(case, loss, *arguments)))


def error(results: list[Tensor], truth: list[Tensor]) -> float:
    """The worst of loss and gradient."""
    pairs = zip(results, truth, strict=True)
    return max(((a.double() - b).abs().max() / b.square().mean().sqrt()).item() for a, b in pairs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_upsample_cross_entropy(benchmark: Any, case: Case) -> None:
    torch._dynamo.reset()
    calls = {
        f"{name} {layout}": call(case, loss, *operands(case, layout)) for layout in LAYOUTS for name, loss in losses().items()
    }
    logits, target = operands(case, "contiguous")
    exact = logits.detach().double().requires_grad_()
    truth = call(case, losses("reference")["ours auto"], exact, target)()
    errors = {name: error(run(), truth) for name, run in calls.items()}  # also compiles
    times, rounds = interleave(benchmark, calls, "ours auto contiguous")
    peaks = {
        f"{name} {layout}": extra_peak_bytes(CASES.index(case), name, layout)
        for layout in LAYOUTS
        for name in ("ours auto", *PEERS)
    }
    best = min(torch.tensor(times[name]).median().item() for name in times if not name.startswith("ours"))
    ours = min(torch.tensor(times[name]).median().item() for name in times if name.startswith("ours"))
    bandwidth = ceilings(torch.float32)[1]
    benchmark.extra_info.update(
        case=str(case),
        name=case.name,
        backward=True,
        dtype=str(case.dtype).removeprefix("torch."),
        rounds=rounds,
        chosen=ak.explain("upsample_cross_entropy", logits, target).chosen,
        floor_ms=(target.nbytes + 3 * logits.nbytes) / bandwidth * 1e3,  # labels and logits in, gradient out and scaled
        copy_gbytes_per_second=bandwidth / 1e9,
        ratio=best / ours,
        candidates={
            name: {**percentiles(t), "error": errors[name], "extra_peak_bytes": peaks[name]} for name, t in times.items()
        },
    )
    # Ours only: of a hard fraction the framework keeps a share of all pixels, not of the labelled ones. float32 sums of up to a
    # million pixels; a bf16 gradient is rounded to 8 bits, its largest elements are several times the root mean square.
    tolerance = 1e-3 if case.dtype is torch.float32 else 5e-2
    assert max(value for name, value in errors.items() if name.startswith("ours")) < tolerance, errors
