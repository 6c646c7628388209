"""Label maps as the evaluation servers of the benchmarks take them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from segmodels.data import DATASETS, voc_colormap
from segmodels.engine.checkpoints import atomic_write

#: Number of classes of each kind of submission.
CLASSES = {kind: len(DATASETS[kind].CLASSES) for kind in ("cityscapes", "ade20k", "voc")}
VOC_FOLDER = Path("results/VOC2012/Segmentation/comp6_test_cls")


def check_classes(kind: str, classes: int) -> None:
    """Raises ValueError for a network of another number of classes, or an unknown kind."""
    if kind not in CLASSES:
        raise ValueError(f"submission {kind!r}: expected one of {', '.join(CLASSES)}")
    if classes != CLASSES[kind]:
        raise ValueError(f"a submission to {kind} has {CLASSES[kind]} classes: expected a network with as many, not {classes}")


def write_submission(kind: str, folder: Path, stem: str, label: np.ndarray) -> Path:
    """Writes one prediction as PNG and returns its path.

    Cityscapes: ``STEM.png`` with label ids, where the stem of the image begins with city, sequence and frame. ADE20K:
    ``STEM.png`` with 1 to 150. VOC 2012: ``results/VOC2012/Segmentation/comp6_test_cls/STEM.png``, with the colours of VOC as
    palette; pack ``results`` as the archive that is uploaded.

    Args:
        kind: a key of :data:`CLASSES`.
        folder: of the whole submission.
        stem: of the image.
        label: uint8 ``[H, W]``, at the image's own size.

    Raises:
        OSError: the file could not be written.
    """
    if kind == "voc":
        picture = Image.fromarray(label)
        picture.putpalette(voc_colormap(256).ravel().tolist())
        path = folder / VOC_FOLDER / f"{stem}.png"
    else:
        ids = DATASETS[kind].SUBMISSION_IDS
        assert ids is not None
        picture = Image.fromarray(ids[label])
        path = folder / f"{stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())
    return path
