"""``benchmarks/gpu.sh``, rehearsed: every step that a GPU's minutes would be spent on, as far as it goes without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"

pytestmark = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="needs bash and timeout")


def _run(*arguments: str, **environment: str) -> Any:
    variables = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=variables, capture_output=True, text=True, check=False)


def test_rehearsal(tmp_path: Path) -> None:
    done = _run("--rehearse", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("report", "tests", "benchmark", "tune", "profile"):
        assert f"== {name} took" in done.stdout
    assert "no GPU that this PyTorch can use" in done.stdout  # the tests of the chip were found, and say why they wait
    assert json.loads((tmp_path / "upsample_argmax_rehearsal.json").read_text())["benchmarks"]
    assert json.loads((tmp_path / "tuned_rehearsal.json").read_text())["times"] == "modelled, not measured"
    assert "aten::" in (tmp_path / "profile_rehearsal.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--tune",), 2, "sees no CUDA device"),
        (("--rehearse",), 1, "a rehearsal is not a result"),
        (("--fast",), 2, "expected --tune, --profile or --rehearse, but got --fast"),
    ],
)
def test_what_it_refuses(arguments: tuple[str, ...], status: int, message: str) -> None:
    done = _run(*arguments)
    assert done.returncode == status
    assert message in done.stderr


def test_a_step_cannot_take_longer_than_all(tmp_path: Path) -> None:
    done = _run("--rehearse", OUT=str(tmp_path), SECONDS_IN_ALL="1")
    assert done.returncode == 1
    assert "report failed (124)" in done.stderr
