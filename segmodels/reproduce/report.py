"""``python -m segmodels.reproduce report``: published and obtained side by side.

Writes its part of docs/reproduction.md from the committed results (the findings have the other), and a page with plots under
runs/. ``--check`` writes nothing and fails where the text has drifted from the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from segmodels.engine.checkpoints import atomic_write
from segmodels.engine.progress import say
from segmodels.reproduce.comparison import Line, lines
from segmodels.reproduce.marks import marked, replaced
from segmodels.reproduce.results import ROOT
from segmodels.reproduce.rows import METRICS, rows

PAGE = ROOT / "docs" / "reproduction.md"
HTML = Path("runs/reproduction/report")


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m segmodels.reproduce report", description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the text differs from the results")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the text (docs/reproduction.md)")
    parser.add_argument("--html", type=Path, default=HTML, metavar="DIR", help="the page with plots (runs/reproduction/report)")
    flags = parser.parse_args(arguments)
    before = flags.page.read_text() if flags.page.is_file() else ""
    text = with_rows(before, page())
    if flags.check:
        if before != text:
            print(f"{flags.page} differs from the results; run python -m segmodels.reproduce report", file=sys.stderr)
            return 1
        return 0
    from segmodels.reproduce.pictures import write_html

    atomic_write(flags.page, text.encode())
    index = write_html(flags.html, lines())
    say(f"wrote {flags.page} and {index}")
    return 0


def with_rows(document: str, text: str) -> str:
    """The document with the text between its marks, or before everything else where there are none."""
    first = marked("rows", text) + (f"\n{document.lstrip()}" if document.strip() else "")
    return replaced(document, "rows", text) or first


def page() -> str:
    """The text, made of ``SECTIONS``."""
    return "\n".join(section for section in (make() for make in SECTIONS) if section)


def head_section() -> str:
    return """# Reproduction

Made by `python -m segmodels.reproduce report` from `benchmarks/results/` and the recipes in `segmodels/recipes/papers/`; do not
edit.

Every row of the papers' tables that defines a configuration is a recipe; `python -m segmodels.reproduce run ROW --data NAME=ROOT`
runs it and leaves one result file per seed. Published values are in percent.
"""


def summary_section() -> str:
    """How many rows of each paper have a result."""
    found = lines()
    cells = []
    published = [row for row in rows().values() if not row.is_stage]
    for key in dict.fromkeys(row.key for row in published):
        own = [row for row in published if row.key == key]
        beside = [line for line in found if line.row.key == key]
        done, near = ({line.row.name for line in beside if line.stand_in is kind} for kind in (False, True))
        titles = "; ".join(dict.fromkeys(row.title for row in own))
        cells.append([f"`{key}`", titles, str(len(own)), str(len(done)), str(len(near - done))])
    total = [str(sum(int(cell[i]) for cell in cells)) for i in (2, 3, 4)]
    cells.append(["all", "", *total])
    header = ["paper", "title", "rows", "with a result", "with only a stand-in"]
    return f"""## What there is

A *stand-in* is a committed result that is not what the row says, but the nearest there is; its line says what differs.

{_table(header, cells)}
"""


def obtained_section() -> str:
    """The rows that have something beside them."""
    cells = [
        [
            f"`{line.row.key}` {line.row.table}: {line.row.row}",
            METRICS[line.row.metric],
            f"{line.row.published[line.row.metric]:g} ({line.row.dataset} {line.row.split})",
            f"**{line.spread()}**" if not line.stand_in else f"{line.spread()} (stand-in)",
            line.data,
            line.differs or "nothing",
            ", ".join(f"[{index + 1}](../benchmarks/results/{link})" for index, link in enumerate(line.links)),
        ]
        for line in lines()
    ]
    header = ["row", "metric", "published", "obtained", "data actually used", "what differs", "raw"]
    body = _table(header, cells) if cells else "None yet."
    return f"""## Published and obtained

Mean and standard deviation over the seeds. A score on other images than the paper's compares with nothing but scores on the same
images.

{body}
"""


def rows_section() -> str:
    """All rows, paper by paper."""
    found: dict[str, list[Line]] = {}
    for line in lines():
        found.setdefault(line.row.name, []).append(line)
    parts = ["## All rows\n"]
    published = [row for row in rows().values() if not row.is_stage]
    for key in dict.fromkeys(row.key for row in published):
        own = [row for row in published if row.key == key]
        cells = [
            [
                row.table,
                row.row,
                f"{row.dataset} {row.split}",
                ", ".join(f"{value:g} {METRICS[metric]}" for metric, value in row.published.items()),
                _state(found.get(row.name, [])),
                f"`{row.name}`",
                row.note,
            ]
            for row in own
        ]
        sources = "; ".join(dict.fromkeys(row.source for row in own))
        header = ["table", "row", "data set", "published", "obtained", "recipe", "note"]
        parts.append(f"### `{key}`\n\nValues from: {sources}.\n\n{_table(header, cells)}\n")
    return "\n".join(parts)


def missing_section() -> str:
    """Rows that define a configuration which the settings cannot express."""
    return """## Rows without a recipe

- FCN on NYUDv2 with colour and depth together: the network takes four or six channels, no data set here gives them. The geometric
  head on SIFT Flow, the 33-class form of PASCAL-Context, pool3 and pool4 alone, and the masking experiments.
- CRF-RNN trained end to end: the layer is there (`eval.refine=crf_rnn`), a network that trains it with FCN-8s is not.
- Domain transform and weak supervision with COCO; weak supervision on the test split.
- Rows that a paper quotes from others define no configuration.
"""


#: The page, section by section.
SECTIONS: list[Callable[[], str]] = [head_section, summary_section, obtained_section, missing_section, rows_section]


def _state(own: list[Line]) -> str:
    texts = [f"{line.spread()}{' (stand-in)' if line.stand_in else ''}" for line in own]
    return "; ".join(texts) or "no result"


def _table(header: list[str], cells: list[list[str]]) -> str:
    table = [header, ["---"] * len(header), *[[cell.replace("|", "\\|") for cell in row] for row in cells]]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)
