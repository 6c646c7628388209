"""Published rows: what the section ``paper`` of a recipe says."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from segmodels.config import RECIPES, SECTIONS, Config, ConfigError, load_config
from segmodels.settings import read_recipe

PAPERS = RECIPES / "papers"

#: metric -> its name in tables; the published values are in percent
METRICS = {"miou": "mIoU", "pixel_accuracy": "pixel acc.", "mean_accuracy": "mean acc.", "fwiou": "f.w. IoU"}

#: starts of a training that are not another row
STARTS = ("imagenet", "published", "scratch")


@dataclass(frozen=True)
class Row:
    """One row of a published table, or (without ``published``) a stage that rows start from.

    Attributes:
        name: of the recipe, without folder and suffix; unique.
        path: the recipe.
        key, title: of the paper; the key is also its folder.
        table, row: where the paper has it, and what it calls it.
        published: metric -> percent, the one that the paper compares first.
        dataset, split: what the paper evaluates on.
        source: where our knowledge of the number comes from.
        start: ``"imagenet"`` (weights of the backbone), ``"scratch"``, ``"published"`` (the authors' network; nothing is
            trained), or the name of the row or stage whose trained network this training starts from.
        trained_by: the row whose network this one evaluates in another way; nothing is trained.
        note: what to know before comparing.
        sections: of the recipe.
    """

    name: str
    path: Path
    key: str
    title: str
    table: str
    row: str
    dataset: str
    split: str
    source: str
    published: dict[str, float] = field(default_factory=dict)
    start: str = "imagenet"
    trained_by: str | None = None
    note: str = ""
    sections: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_stage(self) -> bool:
        return not self.published

    @property
    def metric(self) -> str:
        """The metric that the paper compares first."""
        return next(iter(self.published))

    def load(self, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
        """The settings, as :func:`segmodels.config.load_config` returns them and with its errors."""
        return load_config(self.sections, list(overrides))


@functools.cache
def rows() -> dict[str, Row]:
    """All rows and stages by name, in the order of papers and tables.

    Raises:
        ConfigError: a recipe whose section ``paper`` is not what it should be.
    """
    found: dict[str, Row] = {}
    for path in sorted(PAPERS.glob("*/[!_]*.yaml")):
        row = read_row(path)
        if row.name in found:
            raise ConfigError(f"{path}: {found[row.name].path} has the same name")
        found[row.name] = row
    for row in found.values():
        for other in (row.start, row.trained_by):
            if other is not None and other not in STARTS and other not in found:
                raise ConfigError(f"{row.path}: paper names the row {other!r}, which does not exist{_closest(other, found)}")
    return dict(sorted(found.items(), key=lambda item: (item[1].key, _natural(item[1].table), item[0])))


def read_row(path: Path) -> Row:
    """The row of a recipe. Raises ConfigError for a section ``paper`` that lacks something or has too much."""
    sections = read_recipe(path, SECTIONS)
    paper = sections.pop("paper", None)
    known = {item.name for item in fields(Row)} - {"name", "path", "sections"}
    required = known - {"published", "start", "trained_by", "note"}
    if not isinstance(paper, dict) or not required <= set(paper) <= known:
        given = sorted(paper) if isinstance(paper, dict) else paper
        raise ConfigError(
            f"{path}: paper has {given}: expected {', '.join(sorted(required))} and perhaps {', '.join(sorted(known - required))}"
        )
    row = Row(name=path.stem, path=path, sections=sections, **{**paper, "table": str(paper["table"]), "row": str(paper["row"])})
    for metric, value in row.published.items():
        if metric not in METRICS or isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 100:
            raise ConfigError(
                f"{path}: paper.published has {metric}: {value!r}; expected {', '.join(METRICS)} in percent, between 0 and 100"
            )
    return row


def find_rows(patterns: Sequence[str]) -> list[Row]:
    """Rows by name or by a pattern as in a shell (``"deeplabv3_*_t5-*"``), each once.

    Raises:
        ConfigError: a pattern that no row matches; the message has the closest name.
    """
    known = rows()
    found: dict[str, Row] = {}
    for pattern in patterns:
        names = fnmatch.filter(known, pattern.removesuffix(".yaml").rpartition("/")[2])
        if not names:
            raise ConfigError(f"no row {pattern!r}{_closest(pattern, known)}; python -m segmodels.reproduce list shows all names")
        found |= {name: known[name] for name in names if not known[name].is_stage or len(names) == 1}
    return list(found.values())


def _natural(table: str) -> tuple[int, str]:
    digits = "".join(char for char in table.partition(",")[0] if char.isdigit())
    return (int(digits) if digits else 1000, table)


def _closest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.4)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
