"""A CamVid folder of a few tiny images and the settings of a network that trains on it in seconds."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

SETTINGS = [
    "data.name=camvid", "data.crop=[33,33]", "data.scale=[0.75,1.25]", "data.jitter=0.2",
    "model.name=deeplabv3plus_mobilenetv2", "model.options.head_channels=16", "model.options.low_channels=8",
    "train.iterations=6", "train.batch_size=2", "train.lr=0.02", "train.ema_decay=0.9", "train.warmup_iterations=2",
    "run.log_every=2", "run.tensorboard=false", "run.threads=1", "eval.sheet=2",
]  # fmt: skip


def write_camvid(root: Path, train: int = 5, val: int = 2, size: tuple[int, int] = (36, 44)) -> Path:
    """Halves of noise in two tones, labelled sky and road, with a little void."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for folder in ("images", "labels"):
            (root / split / folder).mkdir(parents=True)
        for index in range(count):
            label = np.zeros(size, np.uint8)
            label[size[0] // 3 + index :] = 3
            label[0, :5] = 11
            image = rng.integers(0, 60, (*size, 3), dtype=np.uint8) + (label == 0)[..., None] * np.uint8(150)
            cv2.imwrite(str(root / split / "images" / f"{split}{index}.png"), image)
            cv2.imwrite(str(root / split / "labels" / f"{split}{index}.png"), label)
    return root
