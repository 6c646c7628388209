"""Label maps as the evaluation servers of the benchmarks take them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from segmodels.data.ade20k import ADE20K
from segmodels.data.cityscapes import Cityscapes
from segmodels.data.dataset import voc_colormap
from segmodels.engine.checkpoints import atomic_write

#: For each kind of submission, what the server expects in place of the class ids.
IDS = {
    "cityscapes": np.asarray(Cityscapes.SUBMISSION_IDS),
    "ade20k": np.asarray(ADE20K.SUBMISSION_IDS),
    "voc": np.arange(21, dtype=np.uint8),
}
VOC_FOLDER = Path("results/VOC2012/Segmentation/comp6_test_cls")


def check_classes(kind: str, classes: int) -> None:
    """Raises ValueError for a network of another number of classes, or an unknown kind."""
    if kind not in IDS:
        raise ValueError(f"submission {kind!r}: expected one of {', '.join(IDS)}")
    if classes != len(IDS[kind]):
        raise ValueError(f"a submission to {kind} has {len(IDS[kind])} classes: expected a network with as many, not {classes}")


def write_submission(kind: str, folder: Path, stem: str, label: np.ndarray) -> Path:
    """Writes one prediction as PNG and returns its path.

    Cityscapes: ``STEM.png`` with label ids, where the stem of the image begins with city, sequence and frame. ADE20K:
    ``STEM.png`` with 1 to 150. VOC 2012: ``results/VOC2012/Segmentation/comp6_test_cls/STEM.png``, with the colours of VOC as
    palette; pack ``results`` as the archive that is uploaded.

    Args:
        kind: a key of :data:`IDS`.
        folder: of the whole submission.
        stem: of the image.
        label: uint8 ``[H, W]``, at the image's own size.

    Raises:
        OSError: the file could not be written.
    """
    picture = Image.fromarray(IDS[kind][label])
    path = folder / f"{stem}.png"
    if kind == "voc":
        picture.putpalette(voc_colormap(256).ravel().tolist())
        path = folder / VOC_FOLDER / f"{stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic_write(path, content.getvalue())
    return path
