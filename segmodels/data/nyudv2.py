"""NYU Depth v2 (Silberman et al. 2012) with the 40 classes of Gupta et al. (2013)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segmodels.data.dataset import PairedFiles, voc_colormap
from segmodels.data.files import DataError, find_root, must_be_whole, need_folders, pair_listed, read_bytes, read_list
from segmodels.data.prepare import Progress, label_of, read_mat, write_file, write_label, write_list

# fmt: off
CLASSES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand", "toilet",
    "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture", "otherprop",
)
# fmt: on
ARCHIVE = "nyu_depth_v2_labeled.mat"
MODALITIES = ("rgb", "depth", "hha")
NEAR, FAR = 500, 10000  # millimetres: the range of the sensor


class NYUDv2(PairedFiles):
    """``<root>/rgb/*.png``, ``depth/*.png`` (16 bits, millimetres), ``labels/*.png`` (0 is void, 1 to 40) and ``<split>.txt``,
    which ``prepare`` makes of the publisher's ``nyu_depth_v2_labeled.mat`` and ``splits.mat``, with ``labels40.mat`` or
    ``classMapping40.mat``. ``hha/*.png`` under the same names are made by the tools of Gupta et al. (2014).

    Args:
        root: the folder that holds these.
        split: "train" or "test".
        modality: what an image is: "rgb"; "depth", the logarithm of the depth between 0.5 and 10 m in three equal channels;
            "hha".

    Raises:
        DataError: a folder or list is missing (not prepared), or an image or a mask.
        ValueError: another modality.
    """

    TITLE = "NYU Depth v2, 40 classes; modality=rgb, depth or hha"
    CLASSES = CLASSES
    COLORS = voc_colormap(41)[1:]
    COUNTS = {"train": 795, "test": 654}
    MEMBERS = rf"{ARCHIVE}|splits\.mat|labels40\.mat|classMapping40\.mat|hha/[^/]+\.png"

    def __init__(self, root: str | Path | None, split: str = "train", modality: str = "rgb"):
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r} of dataset 'nyudv2'; expected one of {', '.join(MODALITIES)}")
        folder = find_root(root, "nyudv2", "rgb, depth, labels and train.txt")
        need_folders(folder, "nyudv2", [modality, "labels"])
        listed = folder / f"{split}.txt"
        pairs = pair_listed(listed, read_list(listed), folder / modality, [folder / "labels"], ".png")
        self.modality = modality
        ids = {value + 1: value for value in range(40)}
        super().__init__(pairs, self.CLASSES, self.COLORS, split, folder, (0,), ids)

    def load_image(self, index: int) -> np.ndarray:
        if self.modality != "depth":
            return super().load_image(index)
        path = self.pairs[self._check(index)][0]
        data = read_bytes(path)
        must_be_whole(data, path)
        depth = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if depth is None or depth.dtype != np.uint16 or depth.ndim != 2:
            raise DataError(f"{path}: expected one 16-bit channel of depths in millimetres")
        share = np.log(np.clip(depth, NEAR, FAR) / NEAR) / np.log(FAR / NEAR)
        return np.repeat(np.rint(255 * share).astype(np.uint8)[..., None], 3, 2)

    @classmethod
    def prepare(cls, root: Path, progress: Progress) -> list[str]:
        """The publisher's MATLAB files to PNG files."""
        splits = root / "splits.mat"
        numbers = {split: read_mat(splits, f"{split}Ndxs").ravel().astype(int) for split in cls.COUNTS}
        with _open(root / ARCHIVE) as archive:
            images, depths, raw = (archive[key] for key in ("images", "depths", "labels"))
            labels = _labels(root, raw)
            written = 0
            for k in range(len(images)):
                progress("frames", k, len(images))
                name = f"{k + 1:04d}.png"
                if (root / "labels" / name).is_file():  # the last of the three
                    continue
                # MATLAB's order of axes is the reverse of what HDF5 tells.
                rgb = np.ascontiguousarray(images[k].transpose(2, 1, 0))
                write_file(root / "rgb" / name, cv2.imencode(".png", rgb[..., ::-1])[1].tobytes())
                millimetres = np.clip(np.rint(depths[k].T * 1000.0), 0, 65535).astype(np.uint16)
                write_file(root / "depth" / name, cv2.imencode(".png", millimetres)[1].tobytes())
                write_label(root / "labels" / name, label_of(labels(k), root / ARCHIVE, 40))
                written += 1
            total = len(images)
        for split, chosen in numbers.items():
            write_list(root / f"{split}.txt", [f"{k:04d}" for k in chosen])
        return [f"{written} of {total} frames written"] + [f"{split}.txt: {len(k)} images" for split, k in numbers.items()]


def _open(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: missing, the publisher's file of labelled frames")
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: reading it needs h5py: pip install 'atrous-kernels[data]'") from error
    try:
        archive = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not readable as HDF5 ({error}); an interrupted download?") from error
    lost = [key for key in ("images", "depths", "labels") if key not in archive]
    if lost:
        raise DataError(f"{path}: no {lost[0]!r} in it; expected the publisher's {ARCHIVE}")
    return archive


def _labels(root: Path, raw: Any) -> Any:
    """Frame number (from 0) to its map of 0 to 40, from whichever of the two files is there."""
    whole, mapping = root / "labels40.mat", root / "classMapping40.mat"
    if whole.is_file():
        maps = read_mat(whole, "labels40")
        return lambda k: maps[..., k]
    if mapping.is_file():
        table = np.concatenate([[0], read_mat(mapping, "mapClass").ravel()])
        return lambda k: table[raw[k].T]
    raise DataError(f"{whole}: missing, and so is {mapping.name}; expected one of them, the classes of Gupta et al.")
