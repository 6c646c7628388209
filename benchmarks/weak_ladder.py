"""The ladder of supervision on the VOC subset: ``python -m benchmarks.weak_ladder [RUNG ...] [--seeds 0 1 2]``.

Trains each rung with each seed as its recipe says and keeps the metrics in ``results/weak/RUNG_seedN.json``, from which
:mod:`benchmarks.report` makes a table. A run takes minutes on one core; one that was stopped continues where it was, one that
is kept is not repeated.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from segmodels import train
from segmodels.engine.cli import run_command
from segmodels.weak.__main__ import main as derive

RESULTS = Path(__file__).parent / "results" / "weak"
RECIPE = "deeplabv3plus_effnetlite0_os16_voc-subset_193x193_b16"
LABELS = Path("runs/weak/voc-subset_train_aug.json")
# name -> (recipe, its settings, what the network is told)
RUNGS: dict[str, tuple[str, list[str], str]] = {
    "tags": ("weak", [], "tags of 1,000 images, EM-Adapt"),
    "boxes_rect": ("weak", ["weak.method=bbox_rect"], "boxes of 1,000 images, Bbox-Rect"),
    "boxes_em": ("weak", ["weak.method=bbox_em_fixed"], "boxes of 1,000 images, Bbox-EM-Fixed"),
    "boxes_seg": ("weak", ["weak.method=bbox_seg"], "boxes of 1,000 images, Bbox-Seg"),
    "few": ("strong", ["weak.strong=200"], "label maps of 200 images, the other 800 left out"),
    "semi": ("semi", [], "label maps of 200 images, tags of 800, EM-Adapt"),
    "semi_boxes": ("semi", ["weak.method=bbox_seg"], "label maps of 200 images, boxes of 800, Bbox-Seg"),
    "strong": ("strong", [], "label maps of 1,000 images"),
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code of the first run that did not end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weak_ladder", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=f"of {', '.join(RUNGS)} (default: tags semi strong)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    flags = parser.parse_args(arguments)
    unknown = [rung for rung in flags.rungs if rung not in RUNGS]
    if unknown or "ATROUS_SHARED" not in os.environ:
        problem = f"unknown rung {unknown[0]!r}: expected one of {', '.join(RUNGS)}" if unknown else "ATROUS_SHARED is not set"
        raise ValueError(f"{problem}; ATROUS_SHARED is the folder that holds data/voc2012_subset")
    if not LABELS.is_file():
        root = Path(os.environ["ATROUS_SHARED"]) / "data" / "voc2012_subset"
        derive(["voc", str(root), "--split", "train_aug", "--out", str(LABELS)])
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in flags.seeds:
        for rung in flags.rungs or ["tags", "semi", "strong"]:
            kept = RESULTS / f"{rung}_seed{seed}.json"
            if kept.is_file():
                continue
            recipe, settings, _ = RUNGS[rung]
            folder = Path("runs") / "weak" / f"{rung}_seed{seed}"
            command = ["--config", f"{RECIPE}_{recipe}", "--seed", str(seed), "--work-dir", str(folder), "--resume", *settings]
            code = train.main(command)
            if code:
                return code
            shutil.copyfile(folder / "metrics.json", kept)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
