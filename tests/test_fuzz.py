"""The fuzz itself: a short run of every op finds nothing, and a wrong result is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atrous_kernels import native
from tests import fuzz
from tests.fuzzed.draws import Op, Problem, Results

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))


@pytest.mark.parametrize("op", fuzz.OPS)
def test_two_hundred_problems(op: str) -> None:
    assert fuzz.fuzz(op, problems=200, seed=1) == []


def test_a_wrong_element_is_reported_with_the_command_that_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(2, 3)

    def run(problem: Problem) -> Results:
        yield "toy", torch.ones(2, 3), ones.double(), 0.0
        wrong = ones.clone()
        wrong[1, 2] = float("nan") if problem["threads"] == 1 else 2.0
        yield "toy", wrong, ones.double(), problem["threads"] / 4

    monkeypatch.setitem(fuzz.OPS, "toy", Op(lambda rng: {"threads": rng.randint(1, 2)}, run))
    lines = fuzz.fuzz("toy", problems=20, seed=3, first=5)
    assert len(lines) == 20
    assert {"toy differs in 1 of 6 elements, first at [1, 2]: nan", "toy differs in 1 of 6 elements, first at [1, 2]: 2.0"} == {
        line.split(" instead of")[0] for line in lines
    }
    assert "python -m tests.fuzz --op toy --seed 3 --first 24 --problems 1  # {'threads':" in lines[-1]


def test_the_outcome_is_recorded_per_op_and_instruction_set(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"
    for problems in (2, 3):
        assert fuzz.main(["--op", "conv2d", "--problems", str(problems), "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert (run["op"], run["problems"], run["mismatches"], run["seed"]) == ("conv2d", 3, 0, 0)


def test_a_recorded_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"
    run = ["--op", "upsample_argmax", "--problems", "2", "--json", str(path)]
    assert fuzz.main(run) == 0
    assert fuzz.main([*run, "--first", "2"]) == 0
    assert [each["problems"] for each in json.loads(path.read_text())["runs"]] == [4]
    for wrong in (["--first", "2"], ["--first", "4", "--seed", "1"]):
        with pytest.raises(SystemExit, match=rf"expected {path} to hold {wrong[1]} problems of upsample_argmax with this seed"):
            fuzz.main([*run, *wrong])


def test_a_library_folder_asked_for_by_name_must_have_the_library(tmp_path: Path) -> None:
    program = "from atrous_kernels import native; native.cpu_missing()"
    environment = os.environ | {"ATROUS_LIBRARY_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"ATROUS_LIBRARY_DIR={tmp_path}: expected a folder with libatrous_cpu.so" in done.stderr
