"""Measured tables that are shipped in ``tuned/``: where they are, how sizes become buckets, what their head says."""

from __future__ import annotations

import subprocess
from math import log
from pathlib import Path

FOLDER = Path(__file__).parent / "tuned"


def nearest(value: int, base: int) -> int:
    """The power of ``base`` that is nearest to ``value`` in ratio."""
    return base ** round(log(max(value, 1), base))


def commit() -> str:
    """Commit of the checkout this package runs from, with "+changes" where its files differ; "unknown" elsewhere."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
