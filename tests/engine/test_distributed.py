"""Several processes compute what one does; a killed one is replaced, a silent one is named. Everything over gloo, in float64.

Tolerances: sums over images are split among processes and added in another order. After four steps that is some hundred
roundings of 1e-16, amplified by training; 1e-9 leaves room and is far below any mistake.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replicas
import torch
from tiny import write_camvid

from segmodels import create_model, train
from segmodels.data.loader import ResumableSampler
from segmodels.engine.checkpoints import CheckpointError, load_checkpoint
from segmodels.weak.sampler import MixedSampler

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
NEAR = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    command = [sys.executable, replicas.__file__, str(folder), *replicas.CASES]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def finished(runs: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checkpoint and metrics of a run."""
    printed = (runs / f"{name}.0.txt").read_text()
    assert (runs / f"{name}.code").read_text().startswith("0 "), printed
    return load_checkpoint(runs / name / "last.pt"), json.loads((runs / name / "metrics.json").read_text())


def losses(metrics: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in metrics["curve"]["train"]]


def assert_near(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert type(one) is torch.Tensor
        torch.testing.assert_close(one, other, **NEAR)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_near(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_near(*pair)
    else:
        assert one == pytest.approx(other)


@pytest.mark.parametrize("name", ["sync2", "sync4"])
def test_with_common_statistics_any_number_of_processes_is_one(runs, name: str) -> None:
    state, metrics = finished(runs, "sync1")
    split_state, split = finished(runs, name)
    assert split["processes"] == int(name[-1])
    np.testing.assert_allclose(losses(split), losses(metrics), **NEAR)
    for key in ("model", "optimizer", "sampler"):
        assert_near(split_state[key], state[key])
    assert split["confusion"] == metrics["confusion"], "the validation is shared out as well"
    assert not (runs / f"{name}.1.txt").read_text(), "one process talks"


def test_with_statistics_of_their_own_processes_are_parts_of_a_batch(runs) -> None:
    """DeepLabv3, table 11: replicas, each with the batch norm of its own images, as one process that computes a batch in parts.

    Two processes in two parts each exchange their gradients once, in the second part; of four processes, two and two share.
    """
    halves, quarters = (losses(finished(runs, name)[1]) for name in ("halves1", "quarters1"))
    np.testing.assert_allclose(losses(finished(runs, "quarters2")[1]), quarters, **NEAR)
    np.testing.assert_allclose(losses(finished(runs, "pairs4")[1]), halves, **NEAR)
    assert_near(finished(runs, "quarters2")[0]["optimizer"], finished(runs, "quarters1")[0]["optimizer"])
    assert not np.allclose(halves, losses(finished(runs, "sync1")[1]), rtol=1e-3), "batch norm does see another batch"


def test_evaluation_is_shared_out(runs) -> None:
    assert (runs / "evaluate2.code").read_text().startswith("0 "), (runs / "evaluate2.0.txt").read_text()
    scores, metrics = json.loads((runs / "evaluate2.json").read_text()), finished(runs, "sync1")[1]
    assert (scores["images"], scores["processes"]) == (3, 2)
    # In float32: a pixel on the fence may fall to the other side.
    assert np.sum(scores["confusion"]) == np.sum(metrics["confusion"])
    assert np.abs(np.array(scores["confusion"]) - metrics["confusion"]).sum() <= 0.01 * np.sum(metrics["confusion"])


def test_fsdp_continues_a_checkpoint_of_one_process_and_leaves_one(runs) -> None:
    state, metrics = finished(runs, "sync1")
    sharded_state, sharded = finished(runs, "fsdp2")
    assert load_checkpoint(runs / "sync1" / "half.pt")["iteration"] == 2
    np.testing.assert_allclose(losses(sharded), losses(metrics), **NEAR)
    for key in ("model", "optimizer"):
        assert_near(sharded_state[key], state[key])
    assert sharded["confusion"] == metrics["confusion"]
    assert sharded["parameters"] == metrics["parameters"]
    options = sharded["config"]["model"]["options"]
    create_model(sharded["config"]["model"]["name"], 11, **options).load_state_dict(sharded_state["model"])


def test_a_silent_process_is_named_within_the_timeout(runs) -> None:
    code, seconds = (runs / "stall.code").read_text().split()
    printed = (runs / "stall.0.txt").read_text()
    assert code == "1", printed
    assert float(seconds) < 30  # 2 of timeout, the rest is work on a busy machine
    assert "iteration 1: process 0 of 2 lost another one" in printed
    assert "distributed.timeout=2 seconds" in printed
    assert "Traceback" not in printed


def test_a_killed_process_is_replaced_and_the_result_is_the_same(runs) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
               "--monitor-interval=0.1", replicas.__file__, str(runs)]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert "at iteration 2 of 4" in done.stdout, "resumed from the last checkpoint"
    killed, undisturbed = load_checkpoint(runs / "elastic" / "last.pt"), finished(runs, "sync2")[0]
    for name, value in undisturbed["model"].items():
        assert torch.equal(killed["model"][name], value), name  # every bit: the order of all sums is fixed
    assert killed["curve"] == undisturbed["curve"]


def test_a_full_disk_during_a_checkpoint_leaves_the_last_one(tmp_path) -> None:
    """The system refuses more bytes in the middle of the second checkpoint; the run goes on from the first one later."""
    command = [*replicas.SETTINGS, f"data.root={write_camvid(tmp_path / 'camvid', train=8)}", "run.checkpoint_every=1"]
    run = [*command, "--work-dir", str(tmp_path / "run")]
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    threads = torch.get_num_threads()
    save = train.Trainer.save

    def filling(self: train.Trainer) -> None:
        if self.iteration == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        save(self)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Trainer, "save", filling)
            with pytest.raises(CheckpointError, match=r"last\.pt: File too large; the previous one is untouched"):
                train.main(run)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert load_checkpoint(tmp_path / "run" / "last.pt")["iteration"] == 1
        assert train.main([*run, "--resume"]) == 0
        assert train.main([*command, "--work-dir", str(tmp_path / "undisturbed")]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        torch.set_num_threads(threads)
    resumed, undisturbed = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("run", "undisturbed"))
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_what_cannot_be_shared_out_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    for settings, message in (
        ([], "train.batch_size=8 in 3 processes: expected a multiple of 3"),
        (["train.batch_size=12", "train.accumulate=3"], r"in 3 processes and 3 parts \(train.accumulate\): expected a multiple"),
        (["distributed.sync_bn_processes=2"], "distributed.sync_bn_processes=2 of 3 processes: expected a divisor of 3"),
        (["train.ema_decay=0.9", "distributed.mode=fsdp"], "train.ema_decay=0.9 with distributed.mode=fsdp"),
        (["model.aux_loss=true", "train.aux_weight=0"], "train.aux_weight=0 with model.aux_loss=true"),
    ):
        more = ["train.batch_size=9", *settings] if settings else []
        with pytest.raises(ValueError, match=message):
            train.main([*replicas.SETTINGS, *more, "--work-dir", str(tmp_path)])


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_a_batch_are_the_batch(world: int) -> None:
    def samplers() -> list[ResumableSampler]:
        weak = MixedSampler(np.arange(9), np.arange(9, 30), 4, 12)
        return [ResumableSampler(27, seed=3, batch_size=8, drop_last=True), weak]

    for whole, *shares in zip(samplers(), *([samplers() for _ in range(world)]), strict=True):
        for rank, share in enumerate(shares):
            share.split(rank, world)
        size = whole.batch_size
        for sampler in (whole, *shares):
            sampler.advance(size)
        rest, parts = list(whole), [list(share) for share in shares]
        for start in range(0, len(rest), size):
            mine = [part[start // world : (start + size) // world] for part in parts]
            assert sorted(rest[start : start + size]) == sorted(key for part in mine for key in part)
        assert [index for _, index in parts[1][: size // world]] == shares[1].next_batch().tolist()
        assert shares[0].state_dict() == whole.state_dict()
        if isinstance(whole, MixedSampler):  # strong images first
            assert [index < 9 for index in shares[1].next_batch()] == [True] * (4 // world) + [False] * (8 // world)
            with pytest.raises(ValueError, match=r"batches of 4 \+ 8 images in 3 processes: expected multiples of 3"):
                samplers()[1].split(0, 3)
