"""``python -m segmodels.weak.pictures --checkpoint FILE [section.key=value ...]``: image, truth and estimated labels of some weak
images, as the E-step of the trained network (or the method without one) gives them.

The settings are those of the checkpoint; the label maps that the data set has for its weak images are read for the picture only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import atrous_kernels
from segmodels.config import ConfigError
from segmodels.data.transforms import to_tensor
from segmodels.engine.build import build_predictor, build_train_set, load_trained, normalization, prepare_runtime
from segmodels.engine.cli import build_parser, flag_overrides, run_command, split_overrides
from segmodels.engine.progress import say
from segmodels.engine.visualize import sheet, write_png
from segmodels.weak.dataset import LATENT, WeakDataset
from segmodels.weak.supervision import WeakSupervision


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Errors as the functions it is made of."""
    parser = build_parser("weak.pictures", (__doc__ or "").strip())
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best.pt or last.pt of segmodels.train")
    parser.add_argument("--output", metavar="FILE", help="the PNG; by default weak_METHOD.png beside the checkpoint")
    parser.add_argument("--count", metavar="N", type=int, default=6, help="rows (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, see below")
    flags = parser.parse_intermixed_args(arguments)
    overrides, rest = split_overrides(flags.overrides)
    if rest:
        raise ConfigError(f"argument {rest[0]!r}: expected section.key=value, for example weak.method=bbox_seg")
    model, config, _, _ = load_trained(flags.checkpoint, None, overrides + flag_overrides(flags))
    device = prepare_runtime(config)
    dataset = build_train_set(config)
    if not isinstance(dataset, WeakDataset) or not dataset.weak.any():
        raise ConfigError(f"weak.method={config.weak.method}, weak.strong={config.weak.strong}: expected some weak images")
    supervision = WeakSupervision(config.weak, dataset, config.run.seed)
    predictor = build_predictor(config, model.to(device), device)
    weak = np.flatnonzero(dataset.weak)
    rows = []
    with atrous_kernels.backend(config.run.backend):
        for index in weak[np.linspace(0, len(weak) - 1, flags.count).round().astype(int)]:
            image, label = dataset[int(index)]
            if config.weak.method in LATENT:
                tensor, known = to_tensor(image, label, **normalization(model))
                # Logarithms of probabilities are scores but for a constant per pixel, which no E-step sees.
                scores = predictor.probabilities(tensor[None]).clamp_min(1e-30).log()
                estimated = supervision.estimate(scores, known[None].to(device), np.array([index]), 0)
                label = estimated[0].to(torch.uint8).cpu().numpy()
            rows.append((image, dataset.dataset[int(index)][1], label))
    path = Path(flags.output) if flags.output else Path(flags.checkpoint).with_name(f"weak_{config.weak.method}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, sheet(rows, dataset.classes, dataset.colors, titles=("image", "truth (not seen)", config.weak.method)))
    say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
