"""Weak and semi-supervised training with the commands, on a CamVid folder of five tiny images; sky is the background."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import cv2
import pytest
import torch
from test_training import _threads, assert_equal_bits  # noqa: F401 (a fixture)
from tiny import SETTINGS, write_camvid

from segmodels import train
from segmodels.engine.checkpoints import CheckpointError, load_checkpoint
from segmodels.engine.cli import run_command
from segmodels.engine.trainer import Trainer
from segmodels.weak import pictures
from segmodels.weak.__main__ import main as derive


@pytest.fixture(scope="module")
def camvid(tmp_path_factory) -> Path:
    root = write_camvid(tmp_path_factory.mktemp("camvid"))
    assert derive(["camvid", str(root), "--out", str(root / "weak.json"), "--background", "sky"]) == 0
    return root


def arguments(camvid: Path, work_dir: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"data.root={camvid}", f"weak.labels={camvid / 'weak.json'}", "--work-dir", str(work_dir), *more]


@pytest.mark.parametrize(
    "extra",
    [
        ("weak.method=em_adapt", "weak.strong=2", "train.amp=bf16"),
        ("weak.method=bbox_em_fixed", "model.aux_loss=true"),
    ],
)
def test_resumed_run_equals_straight_run_in_every_bit(camvid, tmp_path, monkeypatch, extra) -> None:
    settings = arguments(camvid, tmp_path / "straight", *extra)
    assert train.main(settings) == 0
    log = Trainer._log

    def stop_at_three(self: Trainer, *values) -> None:
        log(self, *values)
        if self.iteration == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_log", stop_at_three)
    halves = [str(tmp_path / "halves") if text == str(tmp_path / "straight") else text for text in settings]
    assert train.main(halves) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert train.main([*halves, "--resume"]) == 0
    states = [load_checkpoint(tmp_path / run / "last.pt") for run in ("straight", "halves")]
    for state in states:
        for key in ("seconds", "train_seconds", "commits"):
            state.pop(key)
    assert_equal_bits(*states)


def test_batches_are_mixed_and_weighted(camvid, tmp_path, monkeypatch) -> None:
    seen = []
    criterion = torch.nn.Module.__call__

    def record(self, *given):
        found = criterion(self, *given)
        if type(self).__name__ == "SegmentationLoss":
            seen.append((len(given[1]), tuple(given[1].shape[1:]), float(found.detach())))
        return found

    monkeypatch.setattr(torch.nn.Module, "__call__", record)
    settings = ["weak.method=em_adapt", "weak.strong=2", "train.batch_size=4", "weak.strong_per_batch=1", "train.iterations=3"]
    assert train.main(arguments(camvid, tmp_path / "run", *settings, "train.warmup_iterations=0", "run.log_every=1")) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [count for count, _, _ in seen] == [1, 3] * 3
    assert {size for _, size, _ in seen} == {(33, 33), (9, 9)}, "weak labels are estimated at the resolution of the scores"
    for step, point in enumerate(metrics["curve"]["train"]):
        (_, _, strong), (_, _, weak) = seen[2 * step : 2 * step + 2]
        assert point["loss"] == pytest.approx(0.7 * strong + 0.3 * weak, rel=1e-6)


def test_methods_without_an_e_step_and_strong_images_alone(camvid, tmp_path) -> None:
    for number, settings in enumerate((
        ["weak.method=bbox_seg", "train.iterations=1"],
        ["weak.method=em_fixed", "weak.strong=5", "train.iterations=1"],
        ["weak.method=none", "weak.strong=2", "train.iterations=1"],
    )):  # fmt: skip
        assert train.main(arguments(camvid, tmp_path / str(number), *settings, "train.warmup_iterations=0")) == 0
    assert load_checkpoint(tmp_path / "2" / "last.pt")["sampler"]["length"] == 2
    for given, name in (([], "weak_bbox_seg.png"), (["weak.method=em_adapt", "--count", "2"], "weak_em_adapt.png")):
        assert pictures.main(["--checkpoint", str(tmp_path / "0" / "last.pt"), *given]) == 0
        assert cv2.imread(str(tmp_path / "0" / name)) is not None
    assert run_command(pictures.main, ["--checkpoint", str(tmp_path / "2" / "last.pt")]) == 1


def test_mistakes_give_one_line(camvid, tmp_path, capsys) -> None:
    (tmp_path / "half.json").write_text((camvid / "weak.json").read_text()[:200])
    for given, message in (
        (["weak.method=em_adapt", "weak.labels=null"], "weak.method=em_adapt needs weak.labels"),
        (["weak.method=em_adapt", "train.balance=0.5"], "train.balance=0.5 counts label maps"),
        (["weak.method=em"], "expected one of none, em_fixed"),
        (["weak.method=em_fixed", "weak.strong=6"], "weak.strong=6: the training split has 5 images"),
        (["weak.method=em_fixed", "weak.strong=2", "weak.strong_per_batch=2"], "in batches of train.batch_size=2"),
        (["weak.method=em_fixed", f"weak.labels={tmp_path / 'half.json'}"], "not JSON"),
        (["weak.method=em_fixed", f"weak.labels={tmp_path / 'none.json'}"], "cannot be read"),
    ):
        assert run_command(train.main, arguments(camvid, tmp_path / "run", *given)) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1


def test_a_checkpoint_from_before_the_section_resumes(camvid, tmp_path) -> None:
    settings = arguments(camvid, tmp_path / "run", "train.iterations=4", "weak.labels=null")
    assert train.main([*settings, "run.checkpoint_every=0"]) == 0
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    del state["config"]["weak"]
    torch.save(state, tmp_path / "run" / "last.pt")
    assert train.main([*settings, "--resume"]) == 0
    with pytest.raises(CheckpointError, match=r"train\.lr"):
        train.main([*settings, "--resume", "train.lr=0.5"])
