"""Whole networks: the same model and weights on our kernels and on the framework's own modules.

    pytest benchmarks/bench_models.py --benchmark-enable --benchmark-json=benchmarks/results/models_cpu.json
    python -m benchmarks.bench_models --all [--memory]         # inference of every model of the registry, on small images
    python -m benchmarks.bench_models 'deeplabv3_*' --size 257 257

A training step is forward, loss on logits upsampled to the labels (ours fused, as segmodels trains), backward and the
optimiser's step. Inference cases marked
``peers`` also run torch.compile with frozen weights, ONNX Runtime and OpenVINO (in fp32, with the same number of threads), where
`pip install .[peers]` has put them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import atrous_kernels as ak
from benchmarks.measure import Call, interleave, peak_growth, percentiles
from benchmarks.report_parts import RESULTS
from segmodels import create_model, list_models
from segmodels.engine.build import keep_freed_memory
from segmodels.heads.aspp import ASPP
from segmodels.heads.psp import PSPHead
from segmodels.heads.upscore import Upscore

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
    peers: bool = False
    profile: bool = True
    memory: bool = False

    def __str__(self) -> str:
        what = "training step" if self.train else "inference"
        return f"{self.model} {what}, {self.batch}x{self.size[0]}x{self.size[1]}{' bf16 autocast' if self.amp else ''}"


CASES = [
    # Inference first: after training steps of gigabytes every candidate is slower in the same process.
    Case("deeplabv3plus_efficientnet_lite0", 1, (360, 480), False, 11),
    Case("deeplabv3_resnet50", 1, (513, 513), False, peers=True),
    Case("deeplabv3_resnet50", 4, (257, 257), True),
    Case("deeplabv3plus_efficientnet_lite0", 8, (360, 360), True, 11),
    Case("deeplabv3plus_efficientnet_lite0", 16, (321, 321), True),
]


def cases() -> list[Case]:
    """:data:`CASES`, or what the command line asks for; it comes through the environment, since pytest runs the cases."""
    asked = os.environ.get("BENCH_MODELS")
    if asked is None:
        return CASES
    given = json.loads(asked)
    names = dict.fromkeys(name for pattern in given["patterns"] for name in list_models(pattern))
    height, width = given["size"]
    return [Case(name, given["batch"], (height, width), False, profile=False, memory=given["memory"]) for name in names]


def _calls(case: Case) -> dict[str, Call]:
    torch.manual_seed(0)
    image = torch.randn(case.batch, 3, *case.size)
    label = torch.randint(0, case.classes, (case.batch, *case.size))
    calls: dict[str, Call] = {}
    for layout, memory_format in LAYOUTS.items():
        torch.manual_seed(0)
        model = create_model(case.model, num_classes=case.classes).train(case.train)
        x = image.contiguous(memory_format=memory_format)
        for name, mine, loss in (("ours auto", model, _fused_loss), ("torch", plain(model), _plain_loss)):
            calls[f"{name} {layout}"] = _call(case, mine.to(memory_format=memory_format), loss, x, label)
    if case.peers:
        calls |= _peers(plain(model), x)
    return calls


def _fused_loss(model: Any, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return ak.upsample_cross_entropy(model.logits(x)["out"], label)


def _plain_loss(model: Any, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x)["out"].float(), label)


def _call(case: Case, model: Any, loss_of: Callable[..., torch.Tensor], x: torch.Tensor, label: torch.Tensor) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def infer() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.amp), torch.inference_mode():
            return model(x)["out"]

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
            loss = loss_of(model, x, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step if case.train else infer


def _profile(call: Call) -> dict[str, float]:
    """Milliseconds per call that each operator spends in itself, the most first."""
    for _ in range(2):
        call()
    calls = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            call()
    spent = {event.key: event.self_cpu_time_total / calls / 1e3 for event in profiler.key_averages()}
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """The same network and weights in the framework's own modules: convolutions, and what is made of them.

    The filter of ``deeplabdt`` has no counterpart there and stays ours.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ak.nn.Conv2d):
            module.__class__ = torch.nn.Conv2d
        if isinstance(module, ASPP):
            module.separable = True  # it then calls its branches one by one and concatenates
        elif isinstance(module, PSPHead):
            module.forward = partial(_plain_psp, module)  # type: ignore[method-assign]
        elif isinstance(module, Upscore):
            module.forward = partial(_plain_upscore, module)  # type: ignore[method-assign]
    return model


def _plain_psp(head: PSPHead, x: torch.Tensor) -> torch.Tensor:
    pool = F.adaptive_max_pool2d if head.mode == "max" else F.adaptive_avg_pool2d
    levels = [pool(x, bins) for bins in head.ppm.bins]
    if len(head.ppm.features):
        levels = [layers[1:](level) for layers, level in zip(head.ppm.features, levels, strict=True)]  # type: ignore[index]
    aligned = head.ppm.align_corners
    grown = [F.interpolate(level, x.shape[-2:], mode="bilinear", align_corners=aligned) for level in levels]
    return head.cls(torch.cat([x, *grown], 1))


def _plain_upscore(head: Upscore, x: torch.Tensor) -> torch.Tensor:
    weight = head.weight.to(x.dtype)
    return F.conv_transpose2d(x, weight, stride=head.stride, groups=head.groups)


def _peers(model: torch.nn.Module, x: torch.Tensor) -> dict[str, Call]:
    """What else a user would serve the model with, where it is installed."""
    compiled = torch.compile(model, options={"freezing": True})

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return compiled(x)["out"]

    call()
    with tempfile.TemporaryDirectory() as folder:
        return {"torch.compile frozen": call, **_onnx_peers(model, x, Path(folder) / "model.onnx")}


def _onnx_peers(model: torch.nn.Module, x: torch.Tensor, path: Path) -> dict[str, Call]:
    try:
        import onnxruntime
        import openvino
        import openvino.properties.hint as hint
    except ImportError:
        return {}
    with torch.no_grad():
        torch.onnx.export(model, (x.contiguous(),), path, input_names=["image"], output_names=["out"], dynamo=True)
    threads = torch.get_num_threads()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # By default OpenVINO computes in bf16 where the processor can.
    settings = {hint.inference_precision: openvino.Type.f32, openvino.properties.inference_num_threads: threads}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings | {hint.performance_mode: hint.PerformanceMode.LATENCY})
    image = x.contiguous().numpy()
    return {
        "ONNX Runtime": lambda: torch.from_numpy(session.run(None, {"image": image})[0]),
        "OpenVINO": lambda: torch.from_numpy(compiled([image])[0]),
    }


def _extra_peak_bytes(case: Case, name: str) -> int:
    """Of the first call of this size in a fresh process, after one on a smaller image."""
    program = f"from benchmarks import bench_models as b; b.report_peak({case.model!r}, {case.batch}, {case.size}, {name!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def report_peak(model: str, batch: int, size: tuple[int, int], name: str) -> None:
    """Prints what inference adds to the resident memory at its peak, weights that it rearranges included; channels-last."""
    network = create_model(model).eval()
    network = network if name.startswith("ours") else plain(network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call(height: int, width: int) -> torch.Tensor:
        x = torch.randn(batch, 3, height, width).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            return network(x)["out"]

    call(33, 33)  # loads the libraries
    print(peak_growth(partial(call, *size)))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_model(benchmark: Any, case: Case) -> None:
    keep_freed_memory()  # as the training command does, for every candidate alike
    calls = _calls(case)
    first = {name: call() for name, call in calls.items()}
    reference = first["torch contiguous"]
    # The same network and weights: sums differ in order only, amplified by a few dozen layers (and, in training, one step).
    atol = 5e-2 * max(1.0, float(reference.abs().max()))  # logits of a network that was never trained may be of any size
    for name, value in first.items():
        torch.testing.assert_close(value, reference, rtol=5e-2, atol=atol, msg=name)
    times, rounds = interleave(benchmark, calls, "ours auto channels_last", budget=30.0)
    candidates: dict[str, dict[str, float]] = {
        name: percentiles(t) | {"images_per_second": case.batch / sorted(t)[len(t) // 2]} for name, t in times.items()
    }
    if case.memory:
        for name in ("ours auto channels_last", "torch channels_last"):
            candidates[name]["extra_peak_bytes"] = _extra_peak_bytes(case, name)
    benchmark.extra_info.update(
        case=str(case), model=case.model, train=case.train, batch=case.batch, rounds=rounds, candidates=candidates
    )
    if case.profile:
        benchmark.extra_info["profile"] = _profile(calls["ours auto channels_last"])


def main(arguments: list[str] | None = None) -> int:
    """Times inference of the models that the patterns name; returns pytest's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_models", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="as in list_models: 'deeplabv3_*'")
    parser.add_argument("--all", action="store_true", help="every model of the registry")
    parser.add_argument("--size", type=int, nargs=2, default=(129, 129), metavar=("H", "W"), help="of the images (129 129)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (1)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of interleaved rounds per model (2)")
    parser.add_argument("--memory", action="store_true", help="peak memory as well, each in a fresh process (Linux)")
    parser.add_argument("--output", type=Path, default=RESULTS / "models_all_cpu.json", metavar="FILE", help="the results")
    flags = parser.parse_args(arguments)
    patterns = ["*"] if flags.all else flags.patterns
    if not any(list_models(pattern) for pattern in patterns):
        parser.error(f"no model matches {' '.join(patterns) or 'nothing'}: expected --all or a pattern as 'deeplabv3_*'")
    asked = {"patterns": patterns, "size": flags.size, "batch": flags.batch, "memory": flags.memory}
    os.environ |= {"BENCH_MODELS": json.dumps(asked), "BENCH_SECONDS": str(flags.seconds)}
    return pytest.main([__file__, "--benchmark-enable", f"--benchmark-json={flags.output}", "-q"])


if __name__ == "__main__":
    sys.exit(main())
