"""What the commands share: flags, overrides, and errors as one line instead of a traceback."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from segmodels.config import SECTIONS, ConfigError, describe, recipes
from segmodels.data import DataError
from segmodels.engine.checkpoints import CheckpointError
from segmodels.engine.distributed import ProcessLost
from segmodels.engine.progress import complain
from segmodels.engine.trainer import TrainingError

_OVERRIDE = re.compile(rf"({'|'.join(SECTIONS)})(\.[\w.]+)?=")
# What a user can cause and mend: shown as its message. Anything else is a bug and keeps its traceback.
_EXPECTED = (
    ConfigError, DataError, CheckpointError, TrainingError, ProcessLost, OSError, ValueError, TypeError, ModuleNotFoundError,
)  # fmt: skip


def build_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the common flags; ``--help`` ends with every setting and its explanation."""
    known = "\n".join(f"  {name}" for name in recipes())
    parser = argparse.ArgumentParser(
        prog=f"python -m segmodels.{command}",
        description=description,
        epilog=f"recipes:\n{known}\n\nsettings, given as section.key=value:\n\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--seed", type=int, metavar="N", help="run.seed")
    parser.add_argument("--amp", action="store_true", help="train.amp=bf16")
    parser.add_argument("--device", metavar="D", help="run.device: cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, metavar="N", help="run.threads")
    parser.add_argument("--backend", metavar="NAME", help="run.backend: auto, reference, cpu, triton, cuda, torch")
    return parser


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of evaluate and predict."""
    parser.add_argument("--checkpoint", metavar="FILE", help="best.pt or last.pt of segmodels.train")
    parser.add_argument("--config", metavar="FILE", help="instead: a recipe whose model.weights is a published network")
    parser.add_argument("--scales", type=float, nargs="+", metavar="S", help="eval.scales")
    parser.add_argument("--flip", action="store_true", help="eval.flip=true")
    parser.add_argument("--slide", type=int, nargs=2, metavar=("H", "W"), help="eval.mode=slide eval.window=[H,W]")
    parser.add_argument("--refine", metavar="NAME", help="eval.refine: none, crf, crf_rnn, dt")


def flag_overrides(flags: argparse.Namespace) -> list[str]:
    """The common flags as ``section.key=value``."""
    given = []
    for name, key in (
        ("seed", "run.seed"), ("device", "run.device"), ("threads", "run.threads"), ("backend", "run.backend"),
        ("work_dir", "run.work_dir"), ("scales", "eval.scales"), ("refine", "eval.refine"),
    ):  # fmt: skip
        value = getattr(flags, name, None)
        if value is not None:
            given.append(f"{key}={value}")
    if getattr(flags, "slide", None) is not None:
        given += ["eval.mode=slide", f"eval.window={flags.slide}"]
    for name, override in (("amp", "train.amp=bf16"), ("resume", "run.resume=true"), ("flip", "eval.flip=true")):
        if getattr(flags, name, False):
            given.append(override)
    return given


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates ``section.key=value`` from other positional arguments (files may contain an equals sign)."""
    overrides = [text for text in arguments if _OVERRIDE.match(text) and not Path(text).exists()]
    return overrides, [text for text in arguments if text not in overrides]


def run_command(command: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> int:
    """The exit code of ``command``; 1 with a line on the error stream for anything that the user can mend."""
    try:
        return command(arguments)
    except _EXPECTED as error:
        if "--debug" in (sys.argv if arguments is None else arguments):
            raise
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
