"""``python -m segmodels.evaluate --checkpoint FILE [section.key=value ...]`` (or ``--config RECIPE`` with published weights).

One confusion matrix over a split, at the images' own size: mIoU, IoU per class, accuracies as a table and as JSON. The
settings are those of the checkpoint or of the recipe; overrides come on top. Under torchrun the images are shared out.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import atrous_kernels
from segmodels.config import ConfigError
from segmodels.data import DataError
from segmodels.engine import report
from segmodels.engine.build import build_dataset, build_predictor, load_trained, prepare_runtime
from segmodels.engine.checkpoints import write_json
from segmodels.engine.cli import add_inference_flags, build_parser, flag_overrides, run_command, split_overrides
from segmodels.engine.distributed import join
from segmodels.engine.inference import evaluate_dataset
from segmodels.engine.progress import Reporter, console, say
from segmodels.engine.visualize import sheet, write_png


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Errors as the functions it is made of."""
    parser = build_parser("evaluate", (__doc__ or "").strip())
    add_inference_flags(parser)
    parser.add_argument("--split", metavar="NAME", help="data.val_split")
    parser.add_argument(
        "--output", metavar="FILE", help="the JSON; by default evaluate_SPLIT.json beside the checkpoint, or in runs/RECIPE"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, see below")
    flags = parser.parse_intermixed_args(arguments)
    overrides, rest = split_overrides(flags.overrides)
    if rest:
        raise ConfigError(f"argument {rest[0]!r}: expected section.key=value, for example eval.flip=true")
    overrides += flag_overrides(flags) + ([f"data.val_split={flags.split}"] if flags.split else [])
    result = evaluate(flags.checkpoint, overrides, flags.output, flags.config)
    return 0 if result else 1


def evaluate(
    checkpoint: str | None, overrides: list[str], output: str | None = None, recipe: str | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint, or the published weights of a recipe; prints the table, writes the JSON and, with
    ``eval.sheet``, a picture beside it.

    Args:
        checkpoint: of :mod:`segmodels.train`.
        overrides: ``section.key=value`` on top of the settings.
        output: the JSON file; None puts it beside the checkpoint, or into ``runs/RECIPE``.
        recipe: instead of a checkpoint.

    Returns:
        What was written.

    Raises:
        CheckpointError, ConfigError, DataError: the message says what is wrong with which file or setting.
    """
    model, config, raw, origin = load_trained(checkpoint, recipe, overrides)
    processes = join(config)
    console.quiet = not processes.first
    device = prepare_runtime(config)
    model.to(device)
    split = config.data.val_split
    dataset = build_dataset(config, split)
    if dataset.classes != origin.classes:
        raise DataError(
            f"{dataset!r} has the classes {dataset.classes}: expected those that {origin.path} was trained on, {origin.classes}"
        )
    beside = Path(checkpoint).parent if checkpoint else Path("runs") / Path(str(recipe)).stem
    path = Path(output) if output else beside / f"evaluate_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    total = min(len(dataset), config.eval.limit or len(dataset))
    began = time.monotonic()

    reporter = Reporter("evaluate", -(-total // processes.world), seconds=config.run.print_seconds)

    def progress(done: int, total: int) -> bool:
        reporter.update(done, f"{done * processes.world / (time.monotonic() - began):.2f} images/s")
        return True

    with reporter, atrous_kernels.backend(config.run.backend), processes.watching(lambda: "evaluating"):
        found = evaluate_dataset(
            build_predictor(config, model, device),
            dataset,
            limit=config.eval.limit,
            samples=config.eval.sheet,
            part=(processes.rank, processes.world),
            progress=progress,
        )
        assert found is not None  # progress never asks to stop
        matrix = found.matrix
        matrix.matrix = processes.total(matrix.matrix.to(device)).cpu()
    seconds = time.monotonic() - began
    for key in ("work_dir", "resume", "overwrite"):
        raw["run"].pop(key)
    result = {
        "config": raw,
        "backend": config.run.backend,
        "commit": report.current_commit(),
        "machine": report.machine(),
        "versions": report.versions(),
        "trained_iterations": origin.iteration,
        "weights_sha256": hashlib.sha256(Path(origin.path).read_bytes()).hexdigest(),
        "split": split,
        "images": total,
        "seconds": round(seconds, 2),
        "images_per_second": round(total / seconds, 4),
        "processes": processes.world,
        **matrix.to_dict(dataset.classes),
    }
    if not processes.first:
        return result
    console.print(matrix.table(dataset.classes, f"{config.model.name}, {config.data.name} {split}, {total} images"))
    write_json(path, result)
    say(f"wrote {path}")
    if found.samples:
        picture = path.with_suffix(".png")
        write_png(picture, sheet(found.samples, dataset.classes, dataset.colors))
        say(f"wrote {picture}")
    return result


if __name__ == "__main__":
    sys.exit(run_command(main))
