"""The tuner of launch configurations, its tables, and what a chip without one does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atrous_kernels import tune, tune_calls
from atrous_kernels.gpus import GPUS
from atrous_kernels.tables import FOLDER
from atrous_kernels.triton import launch_table

# How many a configuration of each kind of kernel has.
NUMBERS = {"dense": 5, "aspp": 5, "depthwise": 3, "psp_conv": 4, "passes": 3, "pooling": 3, "upsample": 2}


def check(table: dict[str, Any]) -> None:
    """What every table says, and what it may not say."""
    assert table["commit"]
    assert {"name", "capability", "multiprocessors"} <= set(table["gpu"])
    assert {"torch", "cuda", "triton"} <= set(table["versions"])
    assert set(table["kernels"]) <= set(NUMBERS)
    for kind, rows in table["kernels"].items():
        for row in rows.values():
            assert len(row["config"]) == NUMBERS[kind]
            assert row["microseconds"] <= (1 - tune.LEAST_GAIN) * row["rule_microseconds"] * 1.001  # rounded
    assert not any("the rule" in reasons for reasons in table["rejected"].values())


def test_shipped_tables_are_measured() -> None:
    for path in FOLDER.glob("gpu_*.json"):
        table = json.loads(path.read_text())
        check(table)
        assert table["times"] == "measured", path


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "modelled.json"
    assert tune.main(["--dry-run", "--gpu", "a100", "--output", str(path), "--calls", "2"]) == 0
    table = json.loads(path.read_text())
    check(table)
    assert table["times"] == "modelled, not measured"
    assert table["gpu"] == {"name": "NVIDIA A100-SXM4-80GB", "capability": [8, 0], "multiprocessors": 108}
    assert table["kernels"]["dense"]
    assert "2/2 dense" in capsys.readouterr().out
    tune.main(["--dry-run", "--output", str(path), "--minutes", "-1", "--calls", "2"])
    assert json.loads(path.read_text())["not_reached"] == 2


def test_every_kind_of_kernel_is_tuned_and_changes_with_its_configuration() -> None:
    """What the tuner hands to a kernel is what its launches have; the rule is what they have without it."""
    found = {}
    for task in tune.tasks(tune_calls.calls()):
        found.setdefault(task.kind, task)
    assert set(found) == set(NUMBERS)
    for kind, task in found.items():
        others = list(tune._fitting(task, GPUS["h200"]))
        assert {len(config) for config in others} == {NUMBERS[kind]}

        def blocks(config: launch_table.Config, task: tune.Task = task) -> list[Any]:
            with launch_table.use(task.kind, config):
                return [(one.constants, one.num_warps, one.num_stages, one.grid) for one in task.calls[0].untouched()]

        plain = [(one.constants, one.num_warps, one.num_stages, one.grid) for one in task.calls[0].untouched()]
        assert blocks(launch_table.RULE) == plain
        assert any(blocks(config) != plain for config in others[:4]), kind


@pytest.mark.parametrize("arguments", [[], ["--output", str(FOLDER / "gpu_h200.json")]])
def test_a_model_never_becomes_a_shipped_table(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--dry-run", *arguments])
    assert "a model is not a measurement" in capsys.readouterr().err


def test_candidates_fit_the_chip_and_the_rule_is_one() -> None:
    (forward, *_) = tune.tasks(list(tune_calls.convolutions(tune_calls.conv_problems(torch.bfloat16)[0])))
    for gpu in GPUS.values():
        found = tune.candidates(forward, gpu)
        assert launch_table.RULE in found
        assert len(found) <= tune.MOST_CANDIDATES + 1
        for config in set(found) - {launch_table.RULE}:
            m, n, k, warps, stages = config
            assert (m + n) * k * 2 * stages <= gpu.shared_bytes
            assert m * n <= 128 * 32 * warps
            with launch_table.use("dense", config):
                constants = forward.calls[0].untouched()[0].constants
            assert (constants["BLOCK_M"], constants["BLOCK_N"], constants["BLOCK_K"]) == (m, n, k)


def test_kernels_follow_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    row = {"bfloat16 ieee vectors 16384x256x2048": (128, 256, 64, 8, 4)}
    monkeypatch.setattr(launch_table, "table", lambda device: {"dense": row})

    def choice(*sizes: int, kind: str = "dense") -> tuple[int, ...]:
        return launch_table.choose(kind, on_gpu, "ieee vectors", sizes, (1, 2, 3, 4, 5))

    assert choice(17424, 256, 2048) == choice(16000, 250, 2000) == (128, 256, 64, 8, 4)
    assert choice(17424, 256, 512) == choice(17424, 256, 2048, kind="depthwise") == (1, 2, 3, 4, 5)
    with launch_table.use("dense", launch_table.RULE):  # the tuner compares with the rule, not with an older table
        assert choice(17424, 256, 2048) == (1, 2, 3, 4, 5)
    on_gpu.is_cuda = False
    assert choice(17424, 256, 2048) == (1, 2, 3, 4, 5)


def test_a_chip_without_a_table_takes_that_of_its_nearest_relative(tmp_path: Path) -> None:
    for name, capability, count in (("H200", (9, 0), 132), ("H20", (9, 0), 78), ("A100", (8, 0), 108)):
        gpu = {"name": name, "capability": capability, "multiprocessors": count}
        (tmp_path / f"gpu_{name}.json").write_text(json.dumps({"gpu": gpu}))
    paths = sorted(tmp_path.glob("*.json"))

    def chosen(name: str, capability: tuple[int, int], count: int) -> str | None:
        path = launch_table.nearest_table(name, capability, count, paths)
        return path and path.stem

    assert chosen("H200", (9, 0), 132) == "gpu_H200"
    assert chosen("GH200", (9, 0), 114) == "gpu_H200"
    assert chosen("H20", (9, 0), 130) == "gpu_H20"
    assert chosen("A40", (8, 6), 84) is None  # less shared memory than an A100
    assert launch_table.nearest_table("H200", (9, 0), 132, []) is None
