"""Plots of findings: the papers' scores beside ours, and learning curves."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from segmodels.engine.checkpoints import atomic_write
from segmodels.reproduce.findings.arms import ARMS
from segmodels.reproduce.findings.results import Result, Rows

PAPER, OURS = "tab:gray", "tab:blue"
VERDICTS = {"holds": "tab:green", "does not hold": "tab:red", "undecided": "tab:orange", "not run": "tab:gray"}


def overview(path: Path, found: dict[str, Result], columns: int = 4) -> None:
    """All findings as small plots in one picture."""
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, result in zip(axes, found.values(), strict=False):
        draw(axis, result, short=True)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    figure.suptitle("mIoU [%]; left scale, grey: the paper; right scale, blue: ours (small points: seeds). The scales differ.")
    save(figure, path)


def comparison(path: Path, result: Result) -> None:
    """One finding."""
    figure = Figure(figsize=(max(6.0, 1.6 * len(result.scores) + 1), 4.2), layout="constrained")
    draw(figure.subplots(), result)
    save(figure, path)


def learning_curves(path: Path, result: Result, rows: Rows) -> None:
    """Training loss of each arm that trains: mean over the seeds, and their range."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    for arm in result.scores:
        curves = [row["loss"] for (name, _), row in rows.items() if name == arm and "loss" in row]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]]
        losses = list(zip(*([loss for _, loss in curve] for curve in curves), strict=True))
        (line,) = axis.plot(steps, [sum(values) / len(values) for values in losses], linewidth=1.3, label=ARMS[arm].text)
        axis.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel="iteration", ylabel="training loss", yscale="log")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize="x-small")
    save(figure, path)


def draw(axis: Axes, result: Result, short: bool = False) -> None:
    """The paper's scores on the left scale; on the right one ours, a small point per seed and their mean."""
    arms = list(result.scores)
    published = [result.finding.arms[arm] for arm in arms]
    places = list(range(len(arms)))
    known = [(place, value) for place, value in zip(places, published, strict=True) if value is not None]
    axis.plot([p for p, _ in known], [v for _, v in known], "s--", color=PAPER, markersize=5, linewidth=1, label="paper")
    ours = axis.twinx()
    means = [result.mean(arm) for arm in arms]
    ours.plot(places, means, "o-", color=OURS, markersize=6, linewidth=1.4, label="ours")
    for place, arm in zip(places, arms, strict=True):
        values = list(result.scores[arm].values())
        ours.plot([place + 0.08] * len(values), values, ".", color=OURS, alpha=0.6, markersize=5)
    every = [value for arm in arms for value in result.scores[arm].values()]
    _limits(axis, [value for _, value in known])
    _limits(ours, every)
    axis.tick_params(axis="y", labelcolor=PAPER, labelsize=7)
    ours.tick_params(axis="y", labelcolor=OURS, labelsize=7)
    labels = ["\n".join(textwrap.wrap(ARMS[arm].text, 12 if short else 18)) for arm in arms]
    axis.set_xticks(places, labels, fontsize=5 if short else 7)
    axis.set_xlim(-0.4, len(arms) - 0.6)
    axis.grid(alpha=0.25, axis="y")
    axis.set_title(f"{result.finding.title}: {result.verdict}", fontsize=8 if short else 10, color=VERDICTS[result.verdict])
    if not short:
        what = "mIoU" if isinstance(result.finding.metric, str) else "IoU of " + ", ".join(result.finding.metric)
        axis.set_ylabel("paper, mIoU [%]", color=PAPER)
        ours.set_ylabel(f"ours, {what} [%]", color=OURS)


def save(figure: Figure, path: Path) -> None:
    """As PNG, atomically, without the date and version that would change every time."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())


def _limits(axis: Axes, values: Sequence[float]) -> None:
    if not values:
        axis.set_yticks([])
        return
    low, high = min(values), max(values)
    margin = max(0.15 * (high - low), 0.3)
    axis.set_ylim(low - margin, high + margin)
