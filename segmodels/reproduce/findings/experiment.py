"""One run: an arm and a seed become a row, a small JSON file that is committed."""

from __future__ import annotations

import datetime
import json
import shutil
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import atrous_kernels
from segmodels.config import Config, load_config
from segmodels.data import SegmentationDataset
from segmodels.engine import report
from segmodels.engine.build import build_dataset, build_model, build_predictor, build_train_set, load_trained, prepare_runtime
from segmodels.engine.checkpoints import write_json
from segmodels.engine.inference import evaluate_dataset
from segmodels.engine.trainer import Trainer
from segmodels.reproduce.findings.arms import ARMS, Arm

ROOT = Path(__file__).resolve().parents[3]
#: rows; committed
ROWS = ROOT / "benchmarks" / "results" / "findings"
#: checkpoints, which evaluations and further stages start from; not committed
RUNS = Path("runs") / "findings"


class InMemory(SegmentationDataset):
    """The items of a data set, each read once in a process, whichever run reads it."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        super().__init__(dataset.classes, dataset.colors, dataset.split, len(dataset))
        self.dataset = dataset
        self._items: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._items:
            self._items[index] = self.dataset[index]
        return self._items[index]

    def name(self, index: int) -> str:
        return self.dataset.name(index)


class Interrupted(Exception):
    """A signal stopped a training; ``code`` is the exit code that says so."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.code = 128 + signum


def row_path(arm: str, seed: int, rows: Path = ROWS) -> Path:
    return rows / f"{arm}_seed{seed}.json"


def load_rows(rows: Path = ROWS) -> dict[tuple[str, int], dict[str, Any]]:
    """(arm, seed) -> row, of every finished run."""
    found = [json.loads(path.read_text()) for path in sorted(rows.glob("*_seed*.json"))]
    return {(row["arm"], row["seed"]): row for row in found}


def checkpoint_path(arm: str, seed: int, runs: Path = RUNS) -> Path:
    return runs / f"{arm}_seed{seed}" / "last.pt"


def needed(arm: Arm) -> str | None:
    """The arm whose checkpoint this one needs."""
    return arm.evaluates or arm.start


def run(name: str, seed: int, rows: Path = ROWS, runs: Path = RUNS) -> dict[str, Any]:
    """Trains or evaluates an arm and writes its row.

    Returns:
        The row.

    Raises:
        Interrupted: by a signal; there is no row then, and the next call begins anew.
        ConfigError, DataError, CheckpointError, ValueError: as :mod:`segmodels.train` and :mod:`segmodels.evaluate`.
    """
    arm = ARMS[name]
    began = time.monotonic()
    found = _evaluate(arm, seed, runs) if arm.evaluates else _train(arm, name, seed, runs)
    commit, _, changes = report.current_commit().partition("+")
    row = {
        "arm": name,
        "seed": seed,
        "settings": arm.settings,
        "start": arm.start,
        "evaluates": arm.evaluates,
        "commit": commit,
        "dirty": bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(time.monotonic() - began, 2),
        "machine": report.machine(),
        "versions": report.versions(),
        **found,
    }
    rows.mkdir(parents=True, exist_ok=True)
    write_json(row_path(name, seed, rows), row)
    return row


def settings_of(name: str, seed: int, runs: Path = RUNS) -> tuple[Config, dict[str, Any]]:
    """The checked configuration of a training arm; errors as :func:`segmodels.config.load_config`."""
    arm = ARMS[name]
    overrides = [f"run.seed={seed}"]
    if arm.start is not None:
        overrides.append(f"model.weights={checkpoint_path(arm.start, seed, runs)}")
    return load_config({section: dict(values) for section, values in arm.settings.items()}, overrides)


def evaluation_overrides(arm: Arm) -> list[str]:
    """What an arm that evaluates another's network sets in its place."""
    return [f"eval.{key}={json.dumps(value)}" for key, value in arm.settings["eval"].items()]


def validation_set(config: Config) -> SegmentationDataset:
    """The validation split, kept in memory."""
    return _validation_set(json.dumps([config.data.name, config.data.root, config.data.val_split, config.data.options]))


def _train(arm: Arm, name: str, seed: int, runs: Path) -> dict[str, Any]:
    config, raw = settings_of(name, seed, runs)
    for key in ("work_dir", "resume", "overwrite"):  # true only of this call: no part of what was computed
        raw["run"].pop(key)
    train_set = _train_set(json.dumps(raw["data"], sort_keys=True))
    device = prepare_runtime(config)
    folder = checkpoint_path(name, seed, runs).parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = build_model(config, train_set.num_classes)
    trainer = Trainer(config, raw, folder, model, train_set, validation_set(config), device)
    signum = trainer.run()
    if signum is not None:
        raise Interrupted(signum)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "best.pt").unlink(missing_ok=True)  # validated once, at the end: it is last.pt
    kept = ("parameters", "train_seconds", "images", "miou", "pixel_accuracy", "mean_accuracy", "fwiou", "iou")
    curve = [[point["iteration"], round(point["loss"], 4)] for point in metrics["curve"]["train"]]
    return {**{key: metrics[key] for key in kept}, "loss": curve}


def _evaluate(arm: Arm, seed: int, runs: Path) -> dict[str, Any]:
    assert arm.evaluates is not None
    model, config, _, _ = load_trained(str(checkpoint_path(arm.evaluates, seed, runs)), None, evaluation_overrides(arm))
    device = prepare_runtime(config)
    dataset = validation_set(config)
    with atrous_kernels.backend(config.run.backend):
        found = evaluate_dataset(build_predictor(config, model.to(device), device), dataset, limit=config.eval.limit)
    assert found is not None
    scores = found.matrix.to_dict(dataset.classes)
    scores.pop("confusion")
    return {"images": min(len(dataset), config.eval.limit or len(dataset)), **scores}


@lru_cache(maxsize=4)
def _train_set(data: str) -> SegmentationDataset:
    """By the section ``data`` as JSON: whatever changes the images is in it."""
    config, _ = load_config({"data": json.loads(data)})
    return InMemory(build_train_set(config))


@lru_cache(maxsize=4)
def _validation_set(data: str) -> SegmentationDataset:
    name, root, split, options = json.loads(data)
    config, _ = load_config({"data": {"name": name, "root": root, "options": options}})
    return InMemory(build_dataset(config, split))
