"""``python -m segmodels.demo``: trains a small DeepLabv3 on drawn scenes, with and without ASPP, and shows what it learned.

Writes ``metrics.json``, ``curves.png``, overlays and an ``index.html`` that shows them. Exit code 1 where the network does not
reach the mIoU that this demo promises, or does not beat its twin without ASPP.
"""

from __future__ import annotations

import argparse
import html
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from segmodels import train
from segmodels.engine.checkpoints import atomic_write, write_json
from segmodels.engine.cli import run_command
from segmodels.engine.progress import say

RECIPE = "deeplabv3_resnet18-quarter_os16_synthetic_256x256_b16"
PROMISED_MIOU = 0.80
# Without ASPP: no rates, no image pooling, the same 1x1 convolution, projection and classifier.
VARIANTS: dict[str, list[str]] = {
    "aspp": [],
    "no_aspp": ["model.options.rates=[]", "model.options.image_pooling=false"],
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m segmodels.demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work-dir", default="runs/demo", help="output folder (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of segmodels.train")
    flags = parser.parse_args(arguments)
    folder = Path(flags.work_dir)
    runs: dict[str, dict[str, Any]] = {}
    for name, options in VARIANTS.items():
        say(f"--- {name}")
        command = ["--config", RECIPE, "--work-dir", str(folder / name), "run.overwrite=true", *options, *flags.overrides]
        code = train.main(command)
        if code != 0:
            return code
        runs[name] = json.loads((folder / name / "metrics.json").read_text())
    miou = runs["aspp"]["miou"]
    margin = miou - runs["no_aspp"]["miou"]
    summary = {
        "miou": miou,
        "miou_without_aspp": runs["no_aspp"]["miou"],
        "margin": margin,
        "promised_miou": PROMISED_MIOU,
        "seconds": sum(run["seconds"] for run in runs.values()),
        "runs": runs,
    }
    write_json(folder / "metrics.json", summary)
    shutil.copyfile(folder / "aspp" / "curves.png", folder / "curves.png")
    shutil.copyfile(folder / "aspp" / "samples.png", folder / "overlays.png")
    atomic_write(folder / "index.html", _page(summary).encode())
    say(f"mIoU on unseen scenes: {miou:.3f} with ASPP, {miou - margin:.3f} without: a margin of {margin:.3f}")
    say(f"wrote {folder / 'index.html'}, metrics.json, curves.png, overlays.png")
    if miou <= PROMISED_MIOU or margin <= 0:
        say(f"expected a mIoU above {PROMISED_MIOU} and above that without ASPP")
        return 1
    return 0


def _page(summary: dict[str, Any]) -> str:
    runs = summary["runs"]
    names = list(runs["aspp"]["iou"])

    def cell(value: float | None) -> str:
        return "absent" if value is None else f"{value:.3f}"

    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell(runs[v]['iou'][name])}</td>" for v in VARIANTS) + "</tr>"
        for name in names
    )
    return f"""<!doctype html>
<meta charset="utf-8"><title>atrous_kernels demo</title>
<style>body{{font:16px sans-serif;max-width:60em;margin:2em auto}}img{{max-width:100%}}td,th{{padding:.2em 1em;text-align:right}}
td:first-child{{text-align:left}}</style>
<h1>DeepLabv3 on drawn scenes</h1>
<p>The thing on a deck is a boat, a car or a tent by the ground around the deck alone. mIoU on unseen scenes:
<b>{summary["miou"]:.3f}</b> with ASPP, <b>{summary["miou_without_aspp"]:.3f}</b> without; trained in
{summary["seconds"] / 60:.1f} minutes on {runs["aspp"]["machine"]["threads"]} CPU threads.</p>
<table><tr><th>IoU</th><th>with ASPP</th><th>without</th></tr>{rows}</table>
<h2>With ASPP: image, truth, prediction</h2><img src="overlays.png">
<h2>Without ASPP</h2><img src="no_aspp/samples.png">
<h2>Learning</h2><img src="curves.png">
"""


if __name__ == "__main__":
    sys.exit(run_command(main))
