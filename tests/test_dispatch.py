"""Choosing an implementation: quiet when automatic, loud when asked for by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import atrous_kernels as ak
from atrous_kernels import __main__ as command
from atrous_kernels import dispatch
from atrous_kernels.dispatch import Implementation
from atrous_kernels.problem import ConvProblem

PROBLEM = ConvProblem(1, 4, 4, (8, 8), (3, 3))


@pytest.fixture
def toy_op() -> str:
    def never(problem: ConvProblem) -> str:
        return "it is only a test"

    def fine(problem: ConvProblem) -> None:
        return None

    dispatch.register(
        "toy",
        [
            Implementation("broken", lambda: "broken", never, fine),
            Implementation("slow", lambda: "slow", fine, lambda problem: "known to lose"),
            Implementation("good", lambda: "good", fine, fine),
            Implementation("spare", lambda: "spare", fine, fine),
        ],
    )
    yield "toy"
    del dispatch._implementations["toy"]
    dispatch.forget()


def test_automatic_choice_takes_the_first_that_can_run_and_does_not_lose(toy_op: str) -> None:
    assert dispatch.choose(toy_op, PROBLEM, "auto", ("key",)).run() == "good"
    assert dispatch.cached(toy_op, "auto", ("key",)).run() == "good"


def test_a_name_is_obeyed_or_refused_with_the_reason(toy_op: str) -> None:
    assert dispatch.choose(toy_op, PROBLEM, "slow", ()).run() == "slow"
    with pytest.raises(RuntimeError, match=r"'broken' cannot run 1x4->4 8x8 .*: it is only a test"):
        dispatch.choose(toy_op, PROBLEM, "broken", ())
    with pytest.raises(ValueError, match=r"unknown backend 'nope': expected one of auto, broken, slow, good, spare"):
        dispatch.choose(toy_op, PROBLEM, "nope", ())


def test_explain_gives_every_implementation_a_reason(toy_op: str) -> None:
    explanation = dispatch.explain(toy_op, PROBLEM)
    assert explanation.chosen == "good"
    reasons = {choice.name: choice.reason for choice in explanation.choices}
    assert reasons == {
        "broken": "cannot run: it is only a test",
        "slow": "known to lose",
        "good": "chosen",
        "spare": "could run; good comes first",
    }
    assert "-> good" in str(explanation)


def test_explain_of_a_call() -> None:
    x, w = torch.randn(1, 4, 8, 8), torch.randn(6, 4, 3, 3)
    for op in ("conv2d", "conv2d_input", "conv2d_weight"):
        explanation = ak.explain(op, x, w, padding="same", dilation=2)
        assert {c.name for c in explanation.choices} == {
            "winograd", "cpu", "triton", "tensor_core", "cuda", "torch", "reference"
        }  # fmt: skip
        assert explanation.problem.out_size == (8, 8)
    assert ak.explain("conv2d", x, w, backend="reference").chosen == "reference"
    with pytest.raises(ValueError, match="unknown op 'conv3d': expected one of conv2d, conv2d_input, conv2d_weight"):
        ak.explain("conv3d", x, w)
    with pytest.raises(RuntimeError, match="runs on CUDA devices, not on cpu"):
        ak.explain("conv2d", x, w, backend="cuda")


def test_the_backend_context_restores_itself_and_checks_its_name() -> None:
    x, w = torch.randn(1, 4, 8, 8), torch.randn(6, 4, 3, 3)
    with ak.backend("reference"):
        assert ak.explain("conv2d", x, w).chosen == "reference"
        assert dispatch.default_backend() == "reference"
    assert dispatch.default_backend() == "auto"
    message = "unknown backend 'gpu': expected one of auto, cpu, reference, winograd, triton, tensor_core, cuda, torch"
    with pytest.raises(ValueError, match=message), ak.backend("gpu"):
        pass
    with pytest.raises(RuntimeError, match="cuda"), ak.backend("cuda"):
        ak.conv2d(x, w)
    assert dispatch.default_backend() == "auto"


def test_report_names_what_decides(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    out = capsys.readouterr().out
    for line in ("torch", "CPU library", "CUDA library", "Triton", "GPU"):
        assert line in out


def test_explain_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--input", "1,2048,33,33", "--weight", "256,2048,3,3"]
    assert command.main(["explain", "conv2d", *sizes, "--padding", "12", "--dilation", "12"]) == 0
    out = capsys.readouterr().out
    assert "57% of dense" in out
    assert "->" in out
    assert command.main(["explain", "conv2d", *sizes, "--padding", "12", "--device", "cuda"]) == 0
    assert "on cuda" in capsys.readouterr().out
    assert command.main(["explain", "conv2d", "--input", "1,3,4,4", "--weight", "2,5,3,3"]) == 2
    assert "to have 5 channels, but got 3 channels" in capsys.readouterr().err
    assert command.main(["explain", "conv2d", "--input", "1,3", "--weight", "2,3,3,3"]) == 2
    assert "--input [1, 3]: expected four sizes" in capsys.readouterr().err


def test_everything_works_without_the_compiled_library_and_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None  # import fails, as where it is not installed
from pathlib import Path
from atrous_kernels import native
native.LIBRARY_DIR = Path("nowhere")
import torch, atrous_kernels as ak
x, w = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
explanation = ak.explain("conv2d", x, w, padding=4, dilation=4)
assert explanation.chosen == "torch"
assert "libatrous_cpu.so was not built" in str(explanation)
torch.testing.assert_close(ak.conv2d(x, w, padding=4, dilation=4), torch.nn.functional.conv2d(x, w, padding=4, dilation=4))
from atrous_kernels.__main__ import report
assert "was not built" in report()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_op_without_the_default_backend_stays_automatic() -> None:
    x = torch.randn(1, 3, 9, 9)
    with ak.backend("winograd"):
        assert len(ak.pyramid_pool(x, (1, 2))) == 2
        assert ak.upsample_argmax(x, (18, 18)).shape == (1, 18, 18)
