"""What every section of docs/results.md is made of: results as they were committed, tables, ratios."""

from __future__ import annotations

import json
from math import exp, log
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Rows = list[dict[str, Any]]


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def geomean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values)) if values else float("nan")


def best(row: dict[str, Any], *prefixes: str) -> float:
    """The smallest median among the candidates whose names begin so."""
    return min(t["p50_ms"] for name, t in row["candidates"].items() if name.startswith(prefixes))


def ratio(row: dict[str, Any]) -> float:
    """Best of the framework's settings over our automatic choice: above 1, we are faster."""
    return best(row, "torch") / best(row, "ours auto")


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def machine_line(result: dict[str, Any]) -> str:
    machine, commit = result["machine_info"], result["commit_info"]
    return (
        f"{machine['cpu']['brand_raw']}, {machine['threads']} threads, {machine['instruction_set']}; torch {machine['torch']}, "
        f"Python {machine['python']}; commit `{commit['id'][:10]}`{' with changes' if commit.get('dirty') else ''}, "
        f"{result['datetime'][:10]}."
    )


def fastest(row: dict[str, Any], ours: bool) -> tuple[str, float]:
    """Name and median of the fastest of our candidates, or of everybody else's."""
    times = {name: t["p50_ms"] for name, t in row["candidates"].items() if name.startswith("ours") == ours}
    name = min(times, key=times.__getitem__)
    return name, times[name]


def with_blocks(page: Path, maker: str, blocks: dict[str, str]) -> str:
    """The text of ``page`` with the blocks that the module ``maker`` writes made anew, each between two lines that name it."""
    text = page.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: made by `python -m {maker}` -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{page.name}: expected the lines {begin!r} and {end!r}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    return text
