"""``python -m segmodels.train --config RECIPE [section.key=value ...]``; several processes: ``torchrun -m segmodels.train ...``.

Exit codes: 0 at the end of training, 1 for an error, 128 + N after signal N (130 for Ctrl-C, 143 for SIGTERM), with
everything saved; the same command with ``--resume`` continues. A recipe with stages trains one after the other, each from the
weights of the one before, in the folders stage1, stage2 ... of the work-dir.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from segmodels.config import Config, ConfigError, load_stages
from segmodels.engine.build import build_dataset, build_model, build_train_set, prepare_runtime, write_out_published_options
from segmodels.engine.checkpoints import load_checkpoint
from segmodels.engine.cli import build_parser, flag_overrides, run_command, split_overrides
from segmodels.engine.distributed import check_training, is_first, is_restart, join
from segmodels.engine.progress import console, say
from segmodels.engine.trainer import Trainer

_OURS = ("last.pt", "best.pt", "metrics.json", "curves.png", "samples.png", "config.yaml")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Errors as the functions it is made of."""
    parser = build_parser("train", (__doc__ or "").strip())
    parser.add_argument("--config", metavar="FILE", help="a YAML recipe, or the name of one below")
    parser.add_argument("--work-dir", metavar="DIR", help="run.work_dir")
    parser.add_argument("--resume", action="store_true", help="run.resume=true: continue what is in the work-dir")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, see below")
    flags = parser.parse_intermixed_args(arguments)
    overrides, rest = split_overrides(flags.overrides)
    overrides += flag_overrides(flags) + (["run.resume=true"] if is_restart() else [])
    console.quiet = not is_first()
    if rest:
        raise ConfigError(f"argument {rest[0]!r}: expected section.key=value, for example train.lr=0.02")
    recipe = flags.config
    if recipe is None and flags.resume and flags.work_dir and (Path(flags.work_dir) / "last.pt").is_file():
        recipe = load_checkpoint(Path(flags.work_dir) / "last.pt")["config"]
    stages = load_stages(recipe, overrides)
    first = stages[0][0]
    name = Path(flags.config).stem if flags.config else f"{first.model.name}_{first.data.name}"
    work_dir = Path(first.run.work_dir or f"runs/{name}")
    if len(stages) == 1:
        return train(*stages[0], work_dir)
    for number, (config, raw) in enumerate(stages, 1):
        if config.run.resume and _is_finished(work_dir / f"stage{number}"):
            say(f"stage {number} of {len(stages)} is finished")
            continue
        if number > 1:
            config.model.weights = raw["model"]["weights"] = str(work_dir / f"stage{number - 1}" / "last.pt")
            config.model.weights_backbone = raw["model"]["weights_backbone"] = None
        say(f"stage {number} of {len(stages)}")
        code = train(config, raw, work_dir / f"stage{number}")
        if code:
            return code
    return 0


def train(config: Config, raw: dict[str, Any], work_dir: Path) -> int:
    """Trains one stage into its folder; returns the exit code.

    Args:
        config, raw: as :func:`segmodels.config.load_config` returns them; changed in place.
        work_dir: made where it is missing.
    """
    write_out_published_options(config, raw)
    check_training(config)
    processes = join(config)
    # Not part of what was computed, and true only of this call: kept out of checkpoints and reports.
    for key in ("work_dir", "resume", "overwrite"):
        raw["run"].pop(key)
    if processes.first:
        _check_folder(work_dir, config)
    device = prepare_runtime(config)
    train_set = build_train_set(config)
    val_set = build_dataset(config, config.data.val_split)
    prepare_runtime(config)  # again: the weights must not depend on whether a data set draws numbers
    model = build_model(config, train_set.num_classes)
    with processes.watching(lambda: "setting up"):
        trainer = Trainer(config, raw, work_dir, model, train_set, val_set, device, processes)
    work_dir.mkdir(parents=True, exist_ok=True)
    if config.run.overwrite and not config.run.resume and processes.first:
        _remove_outputs(work_dir)
    say(f"{config.model.name} on {train_set!r}, validation on {val_set!r}")
    last = work_dir / "last.pt"
    if config.run.resume and last.is_file():
        trainer.resume(last)
        say(f"resumed {last} at iteration {trainer.iteration} of {config.train.iterations}")
    elif config.run.resume:
        say(f"nothing to resume in {work_dir}: starting from the beginning")
    signum = trainer.run()
    if signum is not None:
        say(f"stopped by signal {signum} at iteration {trainer.iteration}; wrote {last}; --resume continues")
        return 128 + signum
    say(f"wrote {work_dir}: " + ", ".join(name for name in _OURS if (work_dir / name).is_file()))
    return 0


def _check_folder(work_dir: Path, config: Config) -> None:
    if work_dir.exists() and not work_dir.is_dir():
        raise ConfigError(f"run.work_dir={str(work_dir)!r} is a file: expected a folder")
    if work_dir.is_dir() and any(work_dir.iterdir()) and not (config.run.resume or config.run.overwrite):
        raise ConfigError(
            f"run.work_dir={str(work_dir)!r} is not empty: expected an empty or new folder, --resume to continue what is in "
            "it, or run.overwrite=true to replace it"
        )


def _is_finished(work_dir: Path) -> bool:
    metrics = work_dir / "metrics.json"
    return metrics.is_file() and bool(json.loads(metrics.read_text())["finished"])


def _remove_outputs(work_dir: Path) -> None:
    for name in _OURS:
        (work_dir / name).unlink(missing_ok=True)
    shutil.rmtree(work_dir / "tensorboard", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
