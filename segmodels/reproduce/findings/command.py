"""``python -m segmodels.reproduce findings list | run | report``: which findings of the papers hold on small networks.

``list`` shows findings, arms and how many seeds are done; ``run`` trains what is missing, as much as fits into ``--budget``;
``report`` writes the tables, plots and the page from the rows.
"""

from __future__ import annotations

import argparse
import fcntl
import re
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from segmodels.config import ConfigError
from segmodels.engine.checkpoints import CheckpointError
from segmodels.engine.progress import complain, console, say
from segmodels.engine.trainer import TrainingError
from segmodels.reproduce.findings.arms import ARMS
from segmodels.reproduce.findings.definitions import FINDINGS, SEEDS
from segmodels.reproduce.findings.experiment import ROWS, RUNS, Interrupted, checkpoint_path, load_rows, needed, row_path, run


def main(arguments: list[str]) -> int:
    """The command; returns its exit code. Raises ConfigError for what does not exist, and what a run raises."""
    parser = argparse.ArgumentParser(
        prog="python -m segmodels.reproduce findings", description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {"list": "findings and arms", "run": "train what is missing", "report": "tables, plots and the page"}
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--rows", type=Path, default=ROWS, metavar="DIR", help="results, one file per run")
        command.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help=f"checkpoints, the page ({RUNS})")
        if name == "run":
            command.add_argument("--only", action="append", metavar="NAME", help="a finding or an arm; may be repeated")
            command.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"seeds 0 to N - 1 ({SEEDS})")
            command.add_argument("--budget", type=seconds_of, metavar="120m", help="begin no run that would end later")
        if name == "report":
            command.add_argument("--pictures", action="store_true", help="predict with the checkpoints: overlays and failures")
            command.add_argument("--check", action="store_true", help="write nothing; fail where the document differs")
    flags = parser.parse_args(arguments)
    if flags.command == "list":
        show(flags.rows)
        return 0
    if flags.command == "run":
        return run_missing(flags)
    from segmodels.reproduce.findings import report  # imports matplotlib

    return report.main(flags.rows, flags.runs, pictures=flags.pictures, check=flags.check)


def seconds_of(text: str) -> float:
    """Seconds of "120m", "2h" or "90s"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number and s, m or h, for example 120m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def show(folder: Path) -> None:
    """Prints every arm under its first finding, with its score and number of seeds."""
    rows = load_rows(folder)
    table = Table("finding", "arm", "what", "published", "seeds", "mIoU")
    for name, finding in FINDINGS.items():
        for arm, published in finding.arms.items():
            scores = [row["miou"] for (other, _), row in rows.items() if other == arm]
            mean = f"{100 * statistics.fmean(scores):.1f}" if scores else ""
            table.add_row(name, arm, ARMS[arm].text, "" if published is None else f"{published}", str(len(scores)), mean)
            name = ""
    console.print(table)


def pending(rows: dict[tuple[str, int], dict[str, Any]], arms: Iterable[str], seeds: int) -> list[tuple[str, int]]:
    """Runs without a row, in the order to do them: all arms of a seed before the next seed, the cheapest first, but what an arm
    needs before it and its evaluations right behind it."""
    seconds = {arm: estimate(rows, arm) for arm in arms}
    order = sorted((arm for arm in seconds if ARMS[arm].evaluates is None), key=lambda arm: (depth(arm), seconds[arm], arm))
    behind = {arm: [other for other in seconds if ARMS[other].evaluates == arm] for arm in ARMS}
    order = [one for arm in order for one in (arm, *behind[arm])]
    order += [arm for arm in seconds if arm not in order]
    return [(arm, seed) for seed in range(seeds) for arm in order if (arm, seed) not in rows]


def depth(arm: str) -> int:
    """Number of trainings before it."""
    parent = needed(ARMS[arm])
    return 0 if parent is None else 1 + depth(parent)


def estimate(rows: dict[tuple[str, int], dict[str, Any]], arm: str) -> float:
    """Seconds of a run: of the arm with other seeds, otherwise of the arm that it is like or of all."""
    for arms in ({arm}, {other for other in ARMS if (ARMS[other].evaluates is None) == (ARMS[arm].evaluates is None)}):
        known = [row["seconds"] for (other, _), row in rows.items() if other in arms]
        if known:
            return statistics.median(known)
    return 30.0


def selected(only: list[str] | None) -> list[str]:
    """Arms of the named findings and arms with those they need, in the order of their definition; of all findings without names.

    Raises:
        ConfigError: a name that is neither.
    """
    chosen: set[str] = set()
    for name in only or FINDINGS:
        if name not in FINDINGS and name not in ARMS:
            raise ConfigError(f"--only {name!r}: expected a finding ({', '.join(FINDINGS)}) or an arm ({', '.join(ARMS)})")
        arms = list(FINDINGS[name].arms) if name in FINDINGS else [name]
        chosen.update(arms, (parent for parent in map(needed, map(ARMS.__getitem__, arms)) if parent is not None))
    return [arm for arm in ARMS if arm in chosen]


@contextmanager
def claimed(arm: str, seed: int, rows: Path, runs: Path, *, again: bool) -> Iterator[bool]:
    """Whether this process is to do the run: not where another one on this machine is at it or, unless ``again``, has done it.

    The claim is a lock on a file, so that it ends with the process, however that ends.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f".{arm}_seed{seed}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield again or not row_path(arm, seed, rows).is_file()


def run_missing(flags: argparse.Namespace) -> int:
    """Runs, also beside other processes that do, until nothing is missing or the budget is spent; what is finished stays.
    Returns 1 where a run failed."""
    end = time.monotonic() + flags.budget if flags.budget is not None else float("inf")
    rows = load_rows(flags.rows)
    todo = pending(rows, selected(flags.only), flags.seeds)
    failed = elsewhere = 0
    for count, (arm, seed) in enumerate(todo):
        if time.monotonic() + estimate(rows, arm) > end:
            say(f"budget spent: {len(todo) - count} runs are missing")
            return 0
        parent = needed(ARMS[arm])
        # A parent's row may be committed while its weights, which are not, are missing.
        first = [parent] if parent is not None and not checkpoint_path(parent, seed, flags.runs).is_file() else []
        try:
            for each in (*first, arm):
                with claimed(each, seed, flags.rows, flags.runs, again=each != arm) as ours:
                    if not ours:
                        elsewhere += 1
                        break
                    rows[each, seed] = row = run(each, seed, flags.rows, flags.runs)
                    say(f"{each} seed {seed}: mIoU {row['miou']:.2%} in {row['seconds']:.0f} s ({count + 1} of {len(todo)})")
        except Interrupted as stop:
            return stop.code
        except (TrainingError, CheckpointError, ValueError, OSError) as error:  # of one arm: the others can go on
            complain(f"error: {arm} seed {seed}: {error}")
            failed += 1
    if failed or elsewhere:
        say(f"{failed} runs failed, {elsewhere} are done by others")
    else:
        say(f"{len(rows)} rows in {flags.rows}, none is missing")
    return 1 if failed else 0
