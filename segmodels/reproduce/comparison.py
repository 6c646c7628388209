"""Published beside obtained: what the report is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from segmodels.reproduce.results import OFFICIAL_IMAGES, REPRODUCTION, RESULTS, STAND_INS, load_results, result_path
from segmodels.reproduce.rows import METRICS, Row, rows


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        obtained: metric -> percent of every seed, in their order.
        data: the data set actually used.
        differs: from the published configuration, in words; empty where nothing does.
        links: to the raw results, relative to ``benchmarks/results``.
        stand_in: not a run of this row, but the nearest there is.
    """

    row: Row
    seeds: list[int]
    obtained: dict[str, list[float]]
    data: str
    differs: str
    links: list[str]
    stand_in: bool

    @property
    def mean(self) -> float:
        """Of the metric that the paper compares first."""
        return mean(self.obtained[self.row.metric])

    def spread(self) -> str:
        """``mean ± standard deviation (n seeds)`` of the metric that the paper compares first."""
        values = self.obtained[self.row.metric]
        return f"{self.mean:.2f}" + (f" ± {stdev(values):.2f} ({len(values)} seeds)" if len(values) > 1 else "")


def lines(folder: Path = REPRODUCTION) -> list[Line]:
    """Of all rows that have a result, or a stand-in, in the order of :func:`segmodels.reproduce.rows.rows`."""
    found = []
    for row in rows().values():
        if row.is_stage:
            continue
        for group in _alike(load_results(row.name, folder)):
            found.append(_own(row, group, folder))
        found += [_stand_in(row, entry.result, entry.instead) for entry in STAND_INS if entry.row == row.name]
    return found


def _alike(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results of different seeds, apart where settings, start or data differ: only what is alike has a mean."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        same = {key: result[key] for key in ("settings", "start", "data")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(result)
    return list(groups.values())


def _own(row: Row, group: list[dict[str, Any]], folder: Path) -> Line:
    first = group[0]
    differs = []
    settings = [setting for setting in first["settings"] if not setting.startswith("run.")]
    if settings:
        differs.append("with " + ", ".join(settings))
    if first["start"]["from"] != (row.trained_by or row.start):
        differs.append(f"starts from {first['start']['from']}")
    for part in first["data"].values():
        if part["published_images"] not in (None, part["images"]):
            differs.append(f"{part['images']:,} of {part['published_images']:,} images of {part['split']}")
    if row.split != first["split"]:
        differs.append(f"{first['split']} in place of {row.split}")
    return Line(
        row=row,
        seeds=[result["seed"] for result in group],
        obtained={metric: [_number(result["obtained"][metric]) for result in group] for metric in METRICS},
        data=f"{first['data']['val']['name']} {first['split']}, {first['images']:,} images",
        differs="; ".join(differs),
        links=[f"{folder.name}/{result_path(row.name, result['seed']).name}" for result in group],
        stand_in=False,
    )


def _number(value: float | None) -> float:
    """A score that is undefined (no labelled pixel) is null in a file."""
    return float("nan") if value is None else value


def _stand_in(row: Row, name: str, instead: str) -> Line:
    result = json.loads((RESULTS / name).read_text())
    data = result["config"]["data"]
    official = OFFICIAL_IMAGES.get((data["name"], result["split"]))
    of = f" of {official:,}" if official not in (None, result["images"]) else ""
    return Line(
        row=row,
        seeds=[result["config"]["run"]["seed"]],
        obtained={metric: [100 * result[metric]] for metric in METRICS},
        data=f"{Path(data['root'] or data['name']).name} {result['split']}, {result['images']:,}{of} images",
        differs=instead,
        links=[name],
        stand_in=True,
    )
