"""The Triton kernels of domain_transform: interpreted, against the definition in float64, and compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import interpreted
import pytest
import torch
from conftest import Interpret

import atrous_kernels as ak
from atrous_kernels import dispatch
from atrous_kernels.problem import TransformProblem
from atrous_kernels.reference import domain_transform as reference
from atrous_kernels.triton.domain_transform import can_run

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Of values of order 1: some 30 roundings that a recursion remembers, and the one of a 16-bit result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PROBLEMS = {
    "several programs": ((2, 3, 7, 13), 2, 5.0, 0.7, 2),
    "one map": ((1, 5, 8, 3), 1, 9.0, 2.0, 1),
    "one pixel": ((1, 2, 1, 1), 1, 4.0, 1.0, 1),
    "one row": ((1, 1, 1, 9), 2, 4.0, 1.0, 2),
    "empty batch": ((0, 2, 4, 4), 1, 4.0, 1.0, 1),
}
RUNS = [(name, torch.float32, list(LAYOUTS)[i % 2]) for i, name in enumerate(PROBLEMS)]
RUNS += [("several programs", torch.float32, "nhwc"), ("one map", torch.bfloat16, "nchw"), ("one map", torch.float16, "nhwc")]


@pytest.mark.parametrize(("name", "dtype", "layout"), RUNS, ids=str)
def test_against_float64(interpret: Interpret, name: str, dtype: torch.dtype, layout: str) -> None:
    size, maps, *numbers = PROBLEMS[name]
    x = torch.randn(size).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    edge = torch.rand(size[0], maps, *size[2:]) * 3
    grad = torch.randn(size).to(dtype)
    ours = interpret(interpreted.transformed, x, edge, tuple(numbers), grad)
    operands = [x.double().requires_grad_(), edge.double().requires_grad_()]
    true = ak.domain_transform(*operands, *numbers, backend="reference")
    truths = [true.detach(), *torch.autograd.grad(true, operands, grad.double())]
    assert ours[0].dtype == dtype
    assert ours[0].stride() == x.stride() or not x.numel()
    for a, b in zip(ours, truths, strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double() / scale, b / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(interpret: Interpret, tmp_path: Any, dim: int) -> None:
    x, edge, grad = torch.randn(3, 3, 3, 3), torch.rand(3, 2, 3, 3), torch.randn(3, 3, 3, 3)
    ours = interpret(interpreted.far_transformed, str(tmp_path), dim, 2**30 + 8, x, edge, grad)
    truths = [reference.domain_transform(x.double(), edge.double(), 4.0, 1.0, 1)]
    truths += reference.domain_transform_backward(grad.double(), x.double(), edge.double(), 4.0, 1.0, 1)
    for a, b in zip(ours, truths, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[torch.float32])


_COMPILE = """
import json, torch
from atrous_kernels.triton import domain_transform as ours, report
for layout, dtype in ((torch.contiguous_format, torch.float32), (torch.channels_last, torch.bfloat16)):
    x = torch.empty(2, 21, 375, 500, dtype=dtype, device="meta").contiguous(memory_format=layout)
    edge = torch.empty(2, 2, 375, 500, device="meta")
    launches = ours.plan(x, edge, 50.0, 5.0, 1)[1] + ours.plan_backward(x, x, edge, 50.0, 5.0, 1)[2]
    for launch in launches:
        for capability in report.CAPABILITIES:
            print(json.dumps(report.resources(report.compile_launch(launch, capability).asm["cubin"])))
"""


def test_compiles_for_every_target_without_spills() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * (2 + 1 + 2) * 3
    assert all(row["spill_bytes"] == 0 and row["registers"] <= 128 for row in rows), rows


def test_can_run_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = TransformProblem((1, 21, 375, 500), 3)
    assert "compiles for CUDA devices, not for cpu" in str(can_run(problem))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert can_run(problem) is None
    assert "torch.float64 is not one of" in str(can_run(TransformProblem((1, 21, 375, 500), 3, torch.float64)))
    assert "are counted in 32 bits" in str(can_run(TransformProblem((2**20, 21, 375, 500), 3)))
    on_gpu = dispatch.explain("domain_transform", TransformProblem((1, 21, 375, 500), 3, device_type="cuda"))
    assert on_gpu.chosen == "triton"  # the framework has no such filter; the plain form takes a kernel per column
