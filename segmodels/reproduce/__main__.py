"""``python -m segmodels.reproduce list | run | report | findings``; ``COMMAND --help`` explains each.

The first three are about single rows of the papers' tables, the last about comparisons between them.
"""

from __future__ import annotations

import importlib
import sys

from segmodels.config import ConfigError
from segmodels.engine.cli import run_command
from segmodels.engine.progress import say

#: command -> the module whose ``main(arguments) -> exit code`` it is
COMMANDS = {
    "list": "segmodels.reproduce.listing",
    "run": "segmodels.reproduce.run",
    "report": "segmodels.reproduce.report",
    "findings": "segmodels.reproduce.findings",
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Raises ConfigError for an unknown one, and what the command raises."""
    name, *rest = sys.argv[1:] if arguments is None else arguments or ["--help"]
    if name in ("-h", "--help"):
        say((__doc__ or "").strip())
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}")
    return int(importlib.import_module(COMMANDS[name]).main(rest))


if __name__ == "__main__":
    sys.exit(run_command(main))
