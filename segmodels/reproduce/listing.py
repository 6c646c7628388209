"""``python -m segmodels.reproduce list [--paper KEY] [PATTERN ...]``: the published rows that have a recipe."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from segmodels.config import ConfigError
from segmodels.engine.progress import console
from segmodels.reproduce.results import seeds_of
from segmodels.reproduce.rows import METRICS, Row, find_rows, rows


def main(arguments: list[str]) -> int:
    """The command; returns its exit code. Raises ConfigError for a paper or a pattern without rows."""
    parser = argparse.ArgumentParser(prog="python -m segmodels.reproduce list", description=(__doc__ or "").strip())
    papers = sorted({row.key for row in rows().values()})
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="of names, as in a shell")
    parser.add_argument("--paper", metavar="KEY", help=f"only this one: {', '.join(papers)}")
    parser.add_argument("--stages", action="store_true", help="the stages that rows start from as well")
    flags = parser.parse_args(arguments)
    if flags.paper is not None and flags.paper not in papers:
        raise ConfigError(f"--paper {flags.paper}: expected one of {', '.join(papers)}")
    found = find_rows(flags.patterns) if flags.patterns else list(rows().values())
    found = [row for row in found if flags.paper in (None, row.key) and (flags.stages or flags.patterns or not row.is_stage)]
    # In a pipe the console takes itself for 80 columns wide and cuts the names.
    Console(width=max(console.width, 200)).print(table(found))
    return 0


def table(found: list[Row]) -> Table:
    """Paper, table, row, published values, data set and recipe, and which seeds have a result."""
    result = Table(title=f"{sum(not row.is_stage for row in found)} published rows")
    for column in ("paper", "table", "row"):
        result.add_column(column)
    result.add_column("published [%]", justify="right")
    for column in ("data set", "recipe"):
        result.add_column(column, no_wrap=column == "recipe")
    result.add_column("seeds done", justify="right")
    for row in found:
        values = ", ".join(f"{value:g} {METRICS[metric]}" for metric, value in row.published.items()) or "stage"
        done = ", ".join(str(seed) for seed in seeds_of(row.name))
        result.add_row(row.key, row.table, row.row, values, f"{row.dataset} {row.split}", row.name, done)
    return result
