"""The page with plots: published against obtained, and the rows of each table side by side."""

from __future__ import annotations

import html
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from segmodels.engine.checkpoints import atomic_write
from segmodels.reproduce.comparison import Line
from segmodels.reproduce.results import RESULTS
from segmodels.reproduce.rows import METRICS, Row, rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:3px 8px}"


def write_html(folder: Path, found: list[Line]) -> Path:
    """``index.html`` with its PNGs; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "obtained.png", scatter(found))
    parts = [f"<!doctype html><meta charset='utf-8'><title>Reproduction</title><style>{_STYLE}</style><h1>Reproduction</h1>"]
    parts.append("<p>Published values against those obtained; crosses are stand-ins, which differ as their lines say.</p>")
    parts.append("<img src='obtained.png' alt='published against obtained'>")
    parts.append(_table(found, folder))
    published = [row for row in rows().values() if not row.is_stage]
    for key in dict.fromkeys(row.key for row in published):
        own = [row for row in published if row.key == key]
        atomic_write(folder / f"{key}.png", bars(own, found))
        parts.append(f"<h2>{html.escape(key)}</h2><img src='{key}.png' alt='rows of {html.escape(key)}'>")
    atomic_write(folder / "index.html", "\n".join(parts).encode())
    return folder / "index.html"


def scatter(found: list[Line]) -> bytes:
    """A PNG: a point per comparison, and the diagonal on which both are equal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="grey", linewidth=0.8)
    for line in found:
        point = (line.row.published[line.row.metric], line.mean)
        axes.scatter(*point, marker="x" if line.stand_in else "o", color="tab:blue")
        axes.annotate(line.row.row[:40], point, fontsize=6, xytext=(4, -8), textcoords="offset points")
    axes.set(xlabel="published [%]", ylabel="obtained [%]", xlim=(0, 100), ylim=(0, 100), aspect="equal")
    axes.grid(alpha=0.3)
    return _png(figure)


def bars(own: list[Row], found: list[Line]) -> bytes:
    """A PNG: the published value of every row as a bar, what was obtained as points over it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.22 * len(own) + 1), layout="constrained")
    axes = figure.subplots()
    places = {row.name: len(own) - 1 - index for index, row in enumerate(own)}
    axes.barh([places[row.name] for row in own], [row.published[row.metric] for row in own], color="lightgrey")
    axes.set_yticks([places[row.name] for row in own], [f"{row.table}: {row.row}"[:70] for row in own], fontsize=7)
    for line in found:
        if line.row.name in places:
            values = line.obtained[line.row.metric]
            height, marker = [places[line.row.name]] * len(values), "x" if line.stand_in else "o"
            axes.scatter(values, height, marker=marker, color="tab:blue", s=14)
    axes.set(xlabel=f"{', '.join(sorted({METRICS[row.metric] for row in own}))} [%]", xlim=(0, 100), ylim=(-1, len(own)))
    return _png(figure)


def _table(found: list[Line], folder: Path) -> str:
    header = ("paper", "table", "row", "published", "obtained", "data actually used", "what differs", "raw")
    text = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in header) + "</tr>"]
    for line in found:
        raw = ", ".join(f"<a href='{os.path.relpath(RESULTS / link, folder)}'>{seed}</a>" for seed, link in zip(
            line.seeds, line.links, strict=True))  # fmt: skip
        cells = [line.row.key, line.row.table, line.row.row, f"{line.row.published[line.row.metric]:g}"]
        cells += [line.spread() + (" (stand-in)" if line.stand_in else ""), line.data, line.differs or "nothing"]
        text.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + f"<td>seed {raw}</td></tr>")
    return "\n".join([*text, "</table>"])


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
