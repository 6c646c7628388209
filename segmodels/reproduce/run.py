"""``python -m segmodels.reproduce run ROW [ROW ...] --data NAME=ROOT [--seed N] [section.key=value ...]``.

Trains as the row's recipe says, or evaluates what another row has trained (which is then trained first, if need be), and writes
one result file. A run that was interrupted continues; a row whose result is there is skipped. Settings on the command line are
recorded in the result: it is then no longer the published configuration.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from segmodels import evaluate, train
from segmodels.config import Config, ConfigError, load_config
from segmodels.data import DATASETS, DataError
from segmodels.engine.build import build_dataset, build_train_set
from segmodels.engine.checkpoints import load_checkpoint
from segmodels.engine.cli import split_overrides
from segmodels.engine.progress import say
from segmodels.reproduce.miniature import miniature_recipe
from segmodels.reproduce.results import REPRODUCTION, describe_data, result_path, save_result
from segmodels.reproduce.rows import STARTS, Row, find_rows, rows


class Interrupted(Exception):
    """A signal stopped a training; everything is saved. ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped with exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Options:
    """Of one call of ``run``.

    Attributes:
        data: data set -> its folder. weights: backbone or model -> file of its published weights.
        scratch: where such weights are missing, start from random ones. miniature: seconds in place of days, on drawn scenes.
    """

    data: dict[str, str]
    weights: dict[str, str]
    settings: tuple[str, ...]
    scratch: bool = False
    miniature: bool = False
    work_dir: Path = Path("runs/reproduction")
    results: Path = REPRODUCTION
    again: bool = False


def main(arguments: list[str]) -> int:
    """The command; returns its exit code. Errors name the row, what is missing, and what was expected."""
    parser = argparse.ArgumentParser(
        prog="python -m segmodels.reproduce run", description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("rows", nargs="+", metavar="ROW", help="names or patterns of rows, and settings (section.key=value)")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=ROOT", help="the folder of a data set")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE",
                        help="published weights of a backbone (resnet101=FILE), or of a whole network, by the model's name")
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights where --weights has none")
    parser.add_argument("--seed", type=int, action="append", metavar="N", help="run.seed; may be given several times (0)")
    parser.add_argument("--work-dir", type=Path, default=Options.work_dir, metavar="DIR", help="checkpoints (runs/reproduction)")
    parser.add_argument("--results", type=Path, default=REPRODUCTION, metavar="DIR", help="result files")
    parser.add_argument("--again", action="store_true", help="rows that have a result as well")
    parser.add_argument("--dry-run", action="store_true", help="print settings and commands, for one and for several GPUs")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="of the command for several (8)")
    parser.add_argument("--miniature", action="store_true",
                        help="a tiny network on drawn scenes, in seconds: shows that the row runs, and leaves no result")
    flags = parser.parse_intermixed_args(arguments)
    settings, patterns = split_overrides(flags.rows)
    options = Options(
        data=_pairs("--data", flags.data, sorted(DATASETS)), weights=_pairs("--weights", flags.weights),
        settings=tuple(settings), scratch=flags.from_scratch or flags.miniature, miniature=flags.miniature,
        work_dir=flags.work_dir, results=flags.work_dir / "miniature" if flags.miniature else flags.results, again=flags.again,
    )  # fmt: skip
    for row in find_rows(patterns):
        for seed in flags.seed or [0]:
            if flags.dry_run:
                dry_run(row, seed, options, flags.gpus)
                continue
            try:
                reproduce(row, seed, options)
            except Interrupted as stop:
                return stop.code
    return 0


def reproduce(row: Row, seed: int, options: Options) -> Path:
    """Trains or evaluates a row and writes its result.

    Returns:
        The result file, an earlier one where there is one and ``options.again`` is not set.

    Raises:
        ConfigError, DataError, CheckpointError: what is missing or does not fit, with the row's name.
        Interrupted: by a signal.
    """
    path = result_path(row.name, seed, options.results)
    if path.is_file() and not options.again:
        say(f"{row.name} seed {seed}: done, see {path}")
        return path
    begin, overrides = start_of(row, seed, options)
    recipe = _recipe(row, options)
    config, raw = load_config(recipe, overrides)
    sets = _data_sets(row, config)
    if row.trained_by is None and row.start != "published":
        computed = _train(row, seed, options, overrides)
    else:
        checkpoint = None
        if row.trained_by is not None:
            checkpoint = str(_trained(rows()[row.trained_by], seed, options))
        elif config.model.weights is None and begin["file"] is None:
            raise ConfigError(f"{row.name} evaluates published weights: expected --weights {config.model.name}=FILE")
        folder = _folder(row, seed, options)
        say(f"{row.name} seed {seed}: evaluates {checkpoint or begin['file']}")
        given = [*_evaluation(raw), *overrides] if checkpoint else overrides
        computed = evaluate.evaluate(checkpoint, given, str(folder / "evaluation.json"), None if checkpoint else str(recipe))
    commits = [computed["commit"]] if "commit" in computed else [entry["commit"] for entry in computed["commits"]]
    facts = {
        "settings": list(options.settings),
        "miniature": options.miniature,
        "start": begin,
        "trained_by": row.trained_by,
        "commits": commits,
        "seconds": computed["seconds"],
        "data": sets,
    }
    path = save_result(row, seed, computed, facts, options.results)
    published = ", ".join(f"{metric} {value:g}" for metric, value in row.published.items()) or "nothing (a stage)"
    say(f"{row.name} seed {seed}: published {published}; obtained {computed['miou'] or 0:.2%} mIoU; wrote {path}")
    return path


def start_of(row: Row, seed: int, options: Options) -> tuple[dict[str, Any], list[str]]:
    """What a row starts from, as the result says it, and all settings that go on top of its recipe.

    Raises:
        ConfigError: weights that were not given.
    """
    config, _ = row.load()
    overrides = [f"run.seed={seed}"]
    if not options.miniature and config.data.name in options.data:
        overrides.append(f"data.root={options.data[config.data.name]}")
    begin: dict[str, Any] = {"from": row.start, "file": None}
    name = config.model.name if row.start == "published" else config.model.name.partition("_")[2]
    if row.trained_by is not None:
        begin = {"from": row.trained_by, "file": None}
    elif row.start in STARTS:
        key = "model.weights" if row.start == "published" else "model.weights_backbone"
        if row.start != "scratch" and name in options.weights:
            begin["file"] = Path(options.weights[name]).name
            overrides.append(f"{key}={options.weights[name]}")
        elif row.start == "imagenet" and config.model.weights_backbone is None and not _sets(options, key):
            if not options.scratch:
                raise ConfigError(
                    f"{row.name} starts from ImageNet weights of {name}: expected --weights {name}=FILE (.safetensors, .pth, "
                    ".pt or .caffemodel), or --from-scratch, which the result then says"
                )
            begin["from"] = "scratch"
    else:
        overrides.append(f"model.weights={_folder(rows()[row.start], seed, options) / 'last.pt'}")
    return begin, [*overrides, *options.settings]


def dry_run(row: Row, seed: int, options: Options, gpus: int) -> None:
    """Prints the settings of a row and the commands that run it."""
    config, _ = row.load()
    known = {config.model.name: "FILE", config.model.name.partition("_")[2]: "FILE"} | options.weights
    data = {config.data.name: f"ROOT_OF_{config.data.name}"} | options.data
    shown = replace(options, weights=known, data=data)
    begin, overrides = start_of(row, seed, shown)
    say(f"# {row.name}: {row.title}, table {row.table}, {row.row}")
    say(f"# published: {row.published} on {row.dataset} {row.split} ({row.source}); start: {begin['from']}")
    say(OmegaConf.to_yaml(OmegaConf.create(row.load(overrides)[1])).rstrip())
    say(f"# python -m segmodels.reproduce run {row.name} --seed {seed}" + "".join(
        f" --data {name}={root}" for name, root in shown.data.items()))  # fmt: skip
    if row.trained_by is not None:
        say(f"# evaluates what {row.trained_by} has trained")
    elif row.start != "published":
        common = f"-m segmodels.train --config papers/{row.path.parent.name}/{row.name} --work-dir {_folder(row, seed, options)}"
        settings = " ".join(map(shlex.quote, overrides))
        say(f"# one process:  python {common} --resume {settings}")
        say(f"# {gpus} GPUs:  torchrun --nproc-per-node={gpus} {common} --resume --device cuda {settings}")
        say("# afterwards, `run` finds the training finished and writes the result")


def _train(row: Row, seed: int, options: Options, overrides: list[str]) -> dict[str, Any]:
    """Trains, or continues, or finds it done; what ``metrics.json`` says."""
    if row.start not in STARTS:
        _trained(rows()[row.start], seed, options)
    folder = _folder(row, seed, options)
    say(f"{row.name} seed {seed}: trains into {folder}")
    code = train.main(["--config", str(_recipe(row, options)), "--work-dir", str(folder), "--resume", *overrides])
    if code:
        raise Interrupted(code)
    return json.loads((folder / "metrics.json").read_text())


def _trained(row: Row, seed: int, options: Options) -> Path:
    """The finished ``last.pt`` of a row or stage; trains it first where there is none."""
    last = _folder(row, seed, options) / "last.pt"
    state = load_checkpoint(last) if last.is_file() else None
    if state is None or state["schedule"]["iteration"] < state["schedule"]["total"]:
        reproduce(row, seed, replace(options, again=True))
    return last


def _data_sets(row: Row, config: Config) -> dict[str, Any]:
    """The data sets of a row, described; opened before anything is trained, so that what is missing is said at once."""
    name = config.data.name
    try:
        val = describe_data(name, build_dataset(config, config.data.val_split))
        if row.trained_by is not None or row.start == "published":
            return {"val": val}
        return {"train": describe_data(name, build_train_set(config)), "val": val}
    except (DataError, ValueError) as error:
        given = "" if config.data.root else f"; give --data {name}=ROOT"
        raise DataError(f"{row.name} needs {row.dataset}: {error}{given}") from error


def _recipe(row: Row, options: Options) -> Path:
    """The recipe, or its miniature."""
    return miniature_recipe(row, options.work_dir / "miniature") if options.miniature else row.path


def _evaluation(raw: dict[str, Any]) -> list[str]:
    """Where and how a recipe evaluates, as overrides for a checkpoint of another one."""
    settings = [f"eval.{key}={json.dumps(value)}" for key, value in raw["eval"].items()]
    return [f"data.val_split={raw['data']['val_split']}", *settings]


def _folder(row: Row, seed: int, options: Options) -> Path:
    base = options.work_dir / "miniature" if options.miniature else options.work_dir
    return base / row.name / f"seed{seed}"


def _sets(options: Options, key: str) -> bool:
    return any(setting.startswith(f"{key}=") for setting in options.settings)


def _pairs(flag: str, given: list[str], known: list[str] | None = None) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not value or (known is not None and name not in known):
            what = f"NAME one of {', '.join(known)}" if known is not None else "NAME=FILE"
            raise ConfigError(f"{flag} {text!r}: expected {what}, then = and a path")
        found[name] = value
    return found
