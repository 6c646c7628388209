"""The page: each finding with its plot, tables, learning curves and, from the checkpoints, overlays and failures."""

from __future__ import annotations

import html
from pathlib import Path

import cv2
import numpy as np
import torch

from segmodels.data import SegmentationDataset
from segmodels.engine.build import build_predictor, load_trained, prepare_runtime
from segmodels.engine.checkpoints import atomic_write
from segmodels.engine.inference import Predictor
from segmodels.engine.metrics import ConfusionMatrix
from segmodels.engine.visualize import legend, overlay, write_png
from segmodels.reproduce.findings import plots
from segmodels.reproduce.findings.arms import ARMS
from segmodels.reproduce.findings.experiment import checkpoint_path, evaluation_overrides, validation_set
from segmodels.reproduce.findings.report import explanation, interval, number
from segmodels.reproduce.findings.results import Result, Rows

STYLE = """body { font: 15px/1.45 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .6em 0; } td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: right; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; } h2 { margin-top: 2.2em; }
.holds { color: #2a7d2a; } .does-not-hold { color: #b22; } .undecided { color: #b36b00; } .not-run { color: #777; }"""

CELL = 150
#: images on which the arms of a finding are compared: so many of equal distance, so many of the largest differences
SPREAD, FAILURES = 3, 4
SEARCHED = 100


def write(folder: Path, found: dict[str, Result], rows: Rows, runs: Path | None) -> None:
    """``index.html`` and its pictures.

    Args:
        folder: output.
        runs: where the checkpoints lie; None: no overlays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictors: dict[str, tuple[Predictor, SegmentationDataset]] = {}
    parts = [f"<h1>Findings of the papers on small networks</h1>{_contents(found)}"]
    for name, result in found.items():
        plots.comparison(folder / f"{name}.png", result)
        plots.learning_curves(folder / f"{name}_loss.png", result, rows)
        pictures = runs is not None and _pictures(folder, name, result, runs, predictors)
        parts.append(_part(name, result, pictures))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Findings</title><style>{STYLE}</style>"
    atomic_write(folder / "index.html", f"{head}{''.join(parts)}</html>\n".encode())


def _contents(found: dict[str, Result]) -> str:
    lines = [
        f'<tr><td><a href="#{name}">{html.escape(result.finding.title)}</a></td><td>{html.escape(result.finding.paper)}</td>'
        f'<td class="{result.verdict.replace(" ", "-")}">{result.verdict}</td></tr>'
        for name, result in found.items()
    ]
    return f"<table><tr><th>finding</th><th>paper</th><th>here</th></tr>{''.join(lines)}</table>"


def _part(name: str, result: Result, pictures: bool) -> str:
    finding = result.finding
    rows = [[f"{ARMS[c.above].text} over {ARMS[c.below].text}", number(c.published, "+"), interval(c), c.ours.verdict]
            for c in result.comparisons]  # fmt: skip
    said = html.escape(explanation(result)).replace("**", "").replace("*", "")
    claim = f"{finding.paper}, {finding.table}: {finding.claim}."
    sheets = ""
    if pictures:
        sheets = f'<h3>Predictions, and where the arms differ most</h3><img src="{name}_pictures.png" alt="predictions">'
    return (
        f'<h2 id="{name}">{html.escape(finding.title)}</h2><p>{html.escape(claim)}</p>'
        f'<img src="{name}.png" alt="scores">{_table(["difference", "published", "ours", "verdict"], rows)}<p>{said}</p>'
        f'<h3>Learning curves</h3><img src="{name}_loss.png" alt="training loss">{sheets}'
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _pictures(
    folder: Path, name: str, result: Result, runs: Path, predictors: dict[str, tuple[Predictor, SegmentationDataset]]
) -> bool:
    """A sheet of image | truth | each arm with seed 0; False where a checkpoint is missing."""
    arms = list(result.scores)
    if not all(checkpoint_path(ARMS[arm].evaluates or arm, 0, runs).is_file() for arm in arms):
        return False
    for arm in arms:
        if arm not in predictors:
            predictors[arm] = _predictor(arm, runs)
    datasets = [predictors[arm][1] for arm in arms]
    dataset = datasets[0]
    total = min(len(dataset), SEARCHED)
    predictions = [[predictors[arm][0](dataset[index][0]) for arm in arms] for index in range(total)]
    quality = np.array([[_score(made, dataset[i][1], dataset.num_classes) for made in predictions[i]] for i in range(total)])
    spread = np.linspace(0, total - 1, SPREAD).round().astype(int).tolist()
    worst = np.argsort(quality.min(1) - quality.max(1), kind="stable")
    chosen = [*spread, *[index for index in worst.tolist() if index not in spread][:FAILURES]]
    grid = []
    for index in chosen:
        image, truth = dataset[index]
        pictures = [image, overlay(image, truth, dataset.colors, 0.7)]
        pictures += [overlay(image, made, dataset.colors, 0.7) for made in predictions[index]]
        height = max(1, round(CELL * image.shape[0] / image.shape[1]))
        cells = [cv2.resize(picture, (CELL, height), interpolation=cv2.INTER_AREA) for picture in pictures]
        marks = ["image", "truth", *(f"{100 * value:.0f}" for value in quality[index])]
        for cell, mark in zip(cells, marks, strict=True):
            cv2.putText(cell, mark, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 3, cv2.LINE_AA)
            cv2.putText(cell, mark, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
        grid.append(np.concatenate([np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255) for cell in cells], 1))
    width = grid[0].shape[1]
    header = np.full((4 + 12 * 3, width, 3), 255, np.uint8)
    for column, text in enumerate(["image", "truth", *(ARMS[arm].text for arm in arms)]):
        for line, part in enumerate(_wrapped(text)):
            cv2.putText(header, part, (column * (CELL + 4) + 3, 12 + 12 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1,
                        cv2.LINE_AA)  # fmt: skip
    write_png(folder / f"{name}_pictures.png", np.concatenate([header, *grid, legend(dataset.classes, dataset.colors, width)]))
    return True


def _predictor(arm: str, runs: Path) -> tuple[Predictor, SegmentationDataset]:
    given = evaluation_overrides(ARMS[arm]) if ARMS[arm].evaluates else []
    model, config, _, _ = load_trained(str(checkpoint_path(ARMS[arm].evaluates or arm, 0, runs)), None, given)
    device = prepare_runtime(config)
    predictor = build_predictor(config, model.to(device), device)
    return predictor, validation_set(config)


def _score(prediction: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """mIoU of one image."""
    matrix = ConfusionMatrix(classes)
    matrix.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    return matrix.scores()["miou"]


def _wrapped(text: str, length: int = 22) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > length:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:3]


