"""Whole runs on images that cannot be read, and on tar files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import SETTINGS, write_camvid

from segmodels import train
from segmodels.data.__main__ import main as data
from segmodels.engine.cli import run_command

SHORT = ["train.iterations=3", "train.ema_decay=0", "eval.sheet=0", "data.cache=false"]


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    root = write_camvid(tmp_path / "camvid")
    path = root / "train" / "images" / "train2.png"
    path.write_bytes(path.read_bytes()[:200])
    return root


def arguments(camvid: Path, work_dir: Path, *more: str) -> list[str]:
    return [*SETTINGS, *SHORT, f"data.root={camvid}", "--work-dir", str(work_dir), *more]


def test_a_worker_that_meets_a_cut_image_stops_the_run(camvid: Path, tmp_path: Path, capfd):
    assert run_command(train.main, arguments(camvid, tmp_path / "run", "data.workers=1")) == 1
    error = capfd.readouterr().err
    assert "train2.png: truncated PNG" in error
    assert "Traceback" not in error


def test_skipping_is_reported_and_counted(camvid: Path, tmp_path: Path, capfd):
    assert train.main(arguments(camvid, tmp_path / "run", "data.workers=1", "data.on_error=skip")) == 0
    assert "1 training images cannot be read and are skipped: train2" in capfd.readouterr().err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["skipped"] == ["train2"]
    assert metrics["finished"]


def test_training_on_tar_files(tmp_path: Path):
    root = write_camvid(tmp_path / "camvid")
    for split in ("train", "val"):
        assert data(["shard", "camvid", str(root), str(tmp_path / "shards"), "--split", split, "--items", "2"]) == 0
    more = ["data.name=shards", "data.workers=1", "data.options.shuffle_buffer=3"]
    assert train.main(arguments(tmp_path / "shards", tmp_path / "run", *more)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["finished"], metrics["images"], metrics["skipped"]) == (True, 2, [])
