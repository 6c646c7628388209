"""A row in seconds: its recipe with a narrow network, small drawn scenes and three steps. It shows that the row runs, no more."""

from __future__ import annotations

from pathlib import Path

import yaml

from segmodels.reproduce.rows import Row

#: Backbones whose width can be changed.
_NARROW = {"vgg16": 1 / 16, "resnet": 1 / 8, "mobilenetv2": 0.25}


def miniature_recipe(row: Row, folder: Path) -> Path:
    """Writes the recipe into ``folder`` and returns its path."""
    _, raw = row.load()
    backbone = raw["model"]["name"].partition("_")[2]
    raw["data"] |= {
        "name": "synthetic", "root": None, "train_split": "train", "val_split": "val", "options": {"size": 72, "length": 4},
        "crop": [65, 65], "hard_classes": [],
    }  # fmt: skip
    width = next((width for name, width in _NARROW.items() if backbone.startswith(name)), None)
    raw["model"]["options"] |= {} if width is None else {"width_mult": width}
    raw["train"] |= {"iterations": 3, "batch_size": 2, "accumulate": min(2, raw["train"]["accumulate"])}
    raw["weak"] |= {"method": "none", "strong": 0}
    window, side = raw["eval"]["window"], raw["eval"]["long_side"]
    raw["eval"] |= {
        "canvas": None, "limit": 2, "sheet": 0, "window": window and [65, 65], "long_side": side and 72,
    }  # fmt: skip
    raw["run"] |= {"tensorboard": False}
    path = folder / f"{row.name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path
