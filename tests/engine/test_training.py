"""The commands, end to end on a CamVid folder of five tiny images; resuming to the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny import SETTINGS, write_camvid

from segmodels import create_model, evaluate, predict, train
from segmodels.config import ConfigError
from segmodels.data import DataError
from segmodels.engine.checkpoints import CheckpointError, load_checkpoint
from segmodels.engine.cli import run_command
from segmodels.engine.trainer import Trainer, TrainingError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def camvid(tmp_path_factory) -> Path:
    return write_camvid(tmp_path_factory.mktemp("camvid"))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(camvid: Path, work_dir: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"data.root={camvid}", "--work-dir", str(work_dir), *more]


@pytest.fixture(scope="module")
def trained(camvid, tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("trained")
    assert train.main(arguments(camvid, work_dir, "run.validate_every=4", "run.tensorboard=true")) == 0
    return work_dir


def assert_equal_bits(one: Any, other: Any, path: str = "checkpoint") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal_bits(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal_bits(*pair, f"{path}[{index}]")
    else:
        assert one == other, path


@pytest.mark.parametrize("extra", [(), ("train.optimizer=adamw", "train.amp=bf16", "data.workers=1", "train.balance=0.3")])
def test_resumed_run_equals_straight_run_in_every_bit(camvid, tmp_path, monkeypatch, extra: tuple[str, ...]) -> None:
    # 2 steps per epoch: step 3 ends in the middle of the second one
    settings = [*extra, "run.validate_every=2"]
    assert train.main(arguments(camvid, tmp_path / "straight", *settings)) == 0

    log = Trainer._log

    def stop_at_three(self: Trainer, *values: Any) -> None:
        log(self, *values)
        if self.iteration == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_log", stop_at_three)
    assert train.main(arguments(camvid, tmp_path / "halves", *settings)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "halves" / "last.pt")["iteration"] == 3
    assert train.main(arguments(camvid, tmp_path / "halves", *settings, "--resume")) == 0

    for name in ("last.pt", "best.pt"):
        straight, halves = (load_checkpoint(tmp_path / run / name) for run in ("straight", "halves"))
        assert straight["iteration"] == halves["iteration"]
        for state in (straight, halves):
            for key in ("seconds", "train_seconds", "commits"):
                state.pop(key, None)
        assert_equal_bits(straight, halves)


def test_a_signal_during_validation_leaves_it_to_the_resumed_run(camvid, tmp_path, monkeypatch) -> None:
    load = Trainer._validate

    def interrupted(self: Trainer, stop: Any) -> bool:
        signal.raise_signal(signal.SIGINT)
        # a second one would act at once
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        return load(self, stop)

    monkeypatch.setattr(Trainer, "_validate", interrupted)
    assert train.main(arguments(camvid, tmp_path / "run")) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL, "the handlers are put back"
    assert load_checkpoint(tmp_path / "run" / "last.pt")["validated"] == 0
    monkeypatch.undo()
    assert train.main(["--resume", "--work-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["miou"] is not None


def test_sigterm_in_a_process_of_its_own(camvid, tmp_path) -> None:
    work_dir = tmp_path / "run"
    command = [sys.executable, "-m", "segmodels.train", *arguments(camvid, work_dir, "train.iterations=30")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "text": True}
    with subprocess.Popen([*command, "run.print_seconds=0.001"], stdout=subprocess.PIPE, **options) as process:
        assert process.stdout is not None
        seen = any(line.startswith("train ") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM, output
    assert seen
    assert "--resume continues" in output
    stopped_at = load_checkpoint(work_dir / "last.pt")["iteration"]
    assert 0 < stopped_at < 30
    again = subprocess.run([*command, "--resume"], capture_output=True, timeout=120, **options)
    assert again.returncode == 0, again.stderr
    assert f"at iteration {stopped_at} of 30" in again.stdout
    assert load_checkpoint(work_dir / "last.pt")["iteration"] == 30


def test_what_a_run_leaves(trained, camvid) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["finished"] is True
    assert [point["iteration"] for point in metrics["curve"]["train"]] == [2, 4, 6]
    assert [point["iteration"] for point in metrics["curve"]["validation"]] == [4, 6]
    assert metrics["miou"] == metrics["curve"]["validation"][-1]["miou"]
    assert set(metrics["iou"]) == set(load_checkpoint(trained / "best.pt")["classes"])
    assert metrics["images_per_second"] > 0
    assert metrics["machine"]["threads"] == 1
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", metrics["commits"][0]["commit"])
    assert str(trained) not in json.dumps(metrics), "the output folder is nobody's business"
    for name in ("curves.png", "samples.png"):
        assert cv2.imread(str(trained / name)).shape[2] == 3
    assert list((trained / "tensorboard").iterdir())
    # the checkpoints are read without running code, and every value in them is plain
    assert load_checkpoint(trained / "last.pt")["schedule"] == {"iteration": 6, "total": 6}


def test_evaluate_repeats_the_validation(trained, camvid, tmp_path, capsys) -> None:
    output = tmp_path / "scores" / "x.json"
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--output", str(output)]) == 0
    scores = json.loads(output.read_text())
    metrics = json.loads((trained / "metrics.json").read_text())
    assert scores["confusion"] == metrics["confusion"]
    assert scores["images"] == 2
    assert "pixel" in capsys.readouterr().out
    assert output.with_suffix(".png").is_file()
    # the framework's convolution adds in another order: a pixel on the fence may fall to the other side
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--output", str(output), "--backend", "torch"]) == 0
    swapped = json.loads(output.read_text())
    assert swapped["backend"] == "torch"
    assert np.abs(np.array(swapped["confusion"]) - scores["confusion"]).sum() <= 0.01 * np.sum(scores["confusion"])
    # other scales give another answer in general, never another number of pixels
    assert evaluate.main(["--checkpoint", str(trained / "best.pt"), "--output", str(output), "--flip",
                          "--scales", "0.5", "1.5", "--split", "train"]) == 0  # fmt: skip
    many = json.loads(output.read_text())
    assert (many["split"], many["images"], many["config"]["eval"]["flip"]) == ("train", 5, True)


def test_evaluate_published_weights(camvid, tmp_path) -> None:
    """Without a checkpoint: the recipe names the file, and the file's reader the options of its authors' code."""
    weights, recipe, output = tmp_path / "fcn.pth", tmp_path / "published.yaml", tmp_path / "scores.json"
    torch.save(create_model("fcn_resnet18", 11, width_mult=0.125).state_dict(), weights)  # torchvision's names
    recipe.write_text(
        f"data: {{name: camvid, root: {camvid}}}\neval: {{sheet: 0}}\nrun: {{threads: 1}}\n"
        f"model: {{name: fcn_resnet18, output_stride: 8, weights: {weights}, options: {{width_mult: 0.125}}}}\n"
    )
    assert evaluate.main(["--config", str(recipe), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert (found["images"], found["trained_iterations"]) == (2, None)
    assert found["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    options = found["config"]["model"]["options"]
    assert options == {"first_block": "previous", "width_mult": 0.125}
    with pytest.raises(ConfigError, match="expected either --checkpoint FILE or --config RECIPE"):
        evaluate.main(["--config", str(recipe), "--checkpoint", str(weights)])


def test_a_second_stage_starts_from_the_first_ones_weights(trained, camvid, tmp_path) -> None:
    first = load_checkpoint(trained / "last.pt")
    # A rate near zero: after one step the weights still are those of the first stage. fp32, values around 1.
    command = arguments(camvid, tmp_path / "second", f"model.weights={trained / 'last.pt'}", "train.lr=1e-12")
    assert train.main([*command, "train.iterations=1", "train.warmup_iterations=0"]) == 0
    second = load_checkpoint(tmp_path / "second" / "last.pt")["model"]
    weights = first["ema"]["model"] if first["ema"] else first["model"]
    for name, value in weights.items():
        if name.endswith("weight"):
            torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match="does not fit deeplabv3"):
        train.main([*command, "run.overwrite=true", "model.options.image_pooling=false"])
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist"):
        train.main(arguments(camvid, tmp_path / "third", "model.weights=nowhere.pt"))


def test_predict(trained, camvid, tmp_path, capsys) -> None:
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name, size in (("tiny.png", (1, 1)), ("wide.jpg", (7, 90)), ("a/wide.png", (40, 20))):
        cv2.imwrite(str(folder / name), rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    (folder / "broken.png").write_bytes(b"\x89PNG nothing more")
    (tmp_path / "list.txt").write_text("photos/tiny.png\n\n")
    common = ["--checkpoint", str(trained / "best.pt"), "--masks", "--output", str(tmp_path / "out")]
    assert predict.main([*common, str(folder), str(tmp_path / "list.txt")]) == 1
    said = capsys.readouterr()
    assert "broken.png" in said.err
    assert "wrote 4 overlays" in said.out
    assert "skipped 1" in said.out
    written = {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (tmp_path / "out").iterdir()}
    assert written["wide_mask.png"].shape == (7, 90)
    assert written["a_wide_mask.png"].shape == (40, 20)
    assert written["tiny_overlay.png"].shape == (1, 1, 3)
    assert "photos_tiny_mask.png" in written
    assert max(int(mask.max()) for name, mask in written.items() if name.endswith("mask.png")) < 11
    with pytest.raises(DataError, match=r"broken\.png"):
        predict.main([*common, str(folder), "--stop-on-error"])
    with pytest.raises(ConfigError, match="does not exist"):
        predict.main([*common, str(tmp_path / "nothing.png")])


def test_work_dir_is_not_overwritten_by_accident(trained, camvid, tmp_path) -> None:
    before = (trained / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"is not empty: expected an empty or new folder, --resume"):
        train.main(arguments(camvid, trained))
    with pytest.raises(CheckpointError, match=r"train\.lr: 0\.02 then, 0\.5 now"):
        train.main(arguments(camvid, trained, "--resume", "train.lr=0.5"))
    assert (trained / "last.pt").read_bytes() == before
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    (folder / "last.pt").write_text("old")
    assert train.main(arguments(camvid, folder, "run.overwrite=true", "train.iterations=3")) == 0
    assert (folder / "notes.txt").read_text() == "keep me"
    assert load_checkpoint(folder / "last.pt")["iteration"] == 3


def test_a_loss_that_is_not_finite_stops_with_iteration_and_images(camvid, tmp_path) -> None:
    settings = ("train.lr=1e30", "train.warmup_iterations=0", "run.checkpoint_every=1")
    with pytest.raises(
        TrainingError, match=r"iteration [1-5]: the .* is (nan|inf) on the images train\d, train\d;.*last\.pt holds"
    ):
        train.main(arguments(camvid, tmp_path / "run", *settings))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["iteration"] >= 1


def test_mistakes_give_one_line_and_exit_code_1(camvid, tmp_path, capsys) -> None:
    for command, given, message in (
        (train, ["train.lr=x"], "train.lr='x'"),
        (train, [f"data.root={tmp_path}/none", "data.name=camvid"], "does not exist"),
        (train, arguments(camvid, tmp_path / "a", "train.class_weights=[1,2]"), "expected 11, one per class"),
        (train, arguments(camvid, tmp_path / "b", "train.batch_size=6"), "5 items give no batch of 6"),
        (train, arguments(camvid, tmp_path / "c", "model.name=deeplabv4"), "unknown model 'deeplabv4'"),
        (train, arguments(camvid, tmp_path / "d", "model.options.rats=[1]"), "did you mean rates"),
        (train, arguments(camvid, tmp_path / "e", "--device", "cuda:99"), "run.device='cuda:99'"),
        (train, arguments(camvid, tmp_path / "f", "--backend", "fast"), "unknown backend 'fast'"),
        (evaluate, ["--checkpoint", str(tmp_path / "none.pt")], "does not exist"),
        (evaluate, [], "expected either --checkpoint FILE or --config RECIPE"),
        (evaluate, ["--config", "deeplabv3_resnet18-quarter_os16_synthetic_256x256_b16"], "is null: expected a file"),
    ):
        assert run_command(command.main, given) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("command", [train, evaluate, predict])
def test_help_explains_every_setting(command, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert "train.backbone_rate=1.0" in text
    assert "deeplabv3plus_effnetlite0_os16_camvid" in text
