"""``python -m segmodels.reproduce findings list | run | report``: the papers' controlled comparisons, on small networks.

Each finding (:mod:`.definitions`) is a set of arms that differ in one thing, and the order in which the paper found them. ``run``
trains arms with several seeds and keeps one small file per run; ``report`` compares arms seed by seed and says which findings
hold here.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Errors as :mod:`segmodels.reproduce.findings.command`."""
    from segmodels.reproduce.findings import command  # slow to import

    return command.main(sys.argv[1:] if arguments is None else arguments)
