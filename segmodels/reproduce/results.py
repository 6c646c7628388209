"""Results of rows as committed files, and what they were computed on."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segmodels.data import SegmentationDataset
from segmodels.engine.checkpoints import write_json
from segmodels.reproduce.rows import METRICS, Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
#: one file per row and seed
REPRODUCTION = RESULTS / "reproduction"

#: Images of the published splits (their papers). VOC: train_aug is that of Hariharan et al. 2011.
OFFICIAL_IMAGES = {
    ("voc", "train"): 1464, ("voc", "train_aug"): 10582, ("voc", "val"): 1449, ("voc", "trainval"): 2913,
    ("voc", "trainval_aug"): 12031, ("voc", "sbd_train"): 8498, ("voc", "seg11valid"): 736, ("voc", "reduced_val"): 346,
    ("camvid", "train"): 367, ("camvid", "val"): 101, ("camvid", "test"): 233,
    ("kitti", "train"): 100, ("kitti", "test"): 46,
    ("cityscapes", "train"): 2975, ("cityscapes", "val"): 500,
    ("ade20k", "train"): 20210, ("ade20k", "val"): 2000,
    ("pascal_context", "train"): 4998, ("pascal_context", "val"): 5105,
    ("person_part", "train"): 1716, ("person_part", "val"): 1817,
    ("nyudv2", "train"): 795, ("nyudv2", "test"): 654,
    ("siftflow", "train"): 2488, ("siftflow", "test"): 200,
}  # fmt: skip


class StandIn(NamedTuple):
    """A committed result that is not what the row says, but the nearest there is.

    Attributes:
        row: its name.
        result: file below ``benchmarks/results``.
        instead: what differs from the row.
    """

    row: str
    result: str
    instead: str


_ZOO = "deeplabv3_mobilenetv2_voc-subset_513x513"
_OURS = "deeplabv3plus_effnetlite0_os16_voc-subset_321x321_b16_stage3"
STAND_INS = (
    StandIn("deeplabv3_mobilenetv2_os16_voc_513x513_published_zoo-trainaug", f"published/{_ZOO}_os16.auto.json",
            "the authors' weights on a subset of val"),
    StandIn("deeplabv3_mobilenetv2_os8_voc_513x513_published_zoo-trainaug-ms-flip", f"published/{_ZOO}_os8.auto.json",
            "the authors' weights on a subset of val, one scale, not mirrored"),
    StandIn("deeplabv3_mobilenetv2_os8_voc_513x513_published_zoo-trainaug-ms-flip", f"published/{_ZOO}_os16.msflip.json",
            "the authors' weights on a subset of val, at output stride 16"),
    StandIn("deeplabv3plus_xception65_os16_voc_513x513_b16_zoo-trainaug", f"training/{_OURS}.json",
            "EfficientNet-Lite0 in place of Xception-65, 1,000 training images, without COCO, crops of 321, a subset of val"),
    StandIn("deeplabv3plus_xception65_os8_voc_513x513_b16_zoo-trainaug-ms-flip", f"training/{_OURS}.msflip.json",
            "EfficientNet-Lite0 in place of Xception-65, 1,000 training images, without COCO, crops of 321, a subset of val, "
            "output stride 16"),
    StandIn("dilation8_vgg16_os8_camvid_852x852_b1_t5",
            "training/deeplabv3plus_effnetlite0_os16_camvid_360x360_b8.json",
            "another network (DeepLabv3+ on EfficientNet-Lite0), images of 480 x 360, val in place of test"),
)  # fmt: skip


def result_path(row: str, seed: int, folder: Path = REPRODUCTION) -> Path:
    return folder / f"{row}_seed{seed}.json"


def seeds_of(row: str, folder: Path = REPRODUCTION) -> list[int]:
    """Seeds for which the row has a result."""
    matches = (re.fullmatch(rf"{re.escape(row)}_seed(\d+)", path.stem) for path in folder.glob(f"{row}_seed*.json"))
    return sorted(int(match[1]) for match in matches if match)


def load_results(row: str, folder: Path = REPRODUCTION) -> list[dict[str, Any]]:
    """The row's results in the order of their seeds."""
    return [json.loads(result_path(row, seed, folder).read_text()) for seed in seeds_of(row, folder)]


def save_result(row: Row, seed: int, computed: dict[str, Any], facts: dict[str, Any], folder: Path) -> Path:
    """Writes what a run or an evaluation reported as the result of a row.

    Args:
        computed: what ``metrics.json`` or :func:`segmodels.evaluate.evaluate` says.
        facts: what only this command knows: data sets, overrides, start, times.
    """
    config = computed["config"]
    for section, key in (("data", "root"), ("model", "weights"), ("model", "weights_backbone")):
        config[section][key] = None  # folders of one machine; facts say what was read
    kept = ("config", "backend", "machine", "versions", "parameters", "iteration", "images_per_second", "split", "images")
    obtained = {metric: None if computed[metric] is None else 100 * computed[metric] for metric in METRICS}
    content = {
        "row": row.name,
        "published": row.published,
        "obtained": obtained,
        "seed": seed,
        **facts,
        **{key: computed[key] for key in kept if key in computed},
        "iou": computed["iou"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(row.name, seed, folder)
    write_json(path, content)
    return path


def describe_data(name: str, dataset: SegmentationDataset) -> dict[str, Any]:
    """What a split was: its size against the published one, and a fingerprint.

    The fingerprint is SHA-256 over the names of all items, the classes, and the labels of up to 16 items spread over the split
    (images are left out: decoders of JPEG differ in the last bit).
    """
    digest = hashlib.sha256("\n".join([*dataset.classes, *map(dataset.name, range(len(dataset)))]).encode())
    for index in sorted(set(np.linspace(0, len(dataset) - 1, 16).round().astype(int).tolist())):
        label = dataset[index][1]
        digest.update(repr(label.shape).encode() + np.ascontiguousarray(label).tobytes())
    official = OFFICIAL_IMAGES.get((name, dataset.split))
    return {
        "name": name,
        "split": dataset.split,
        "images": len(dataset),
        "published_images": official,
        "classes": dataset.num_classes,
        "fingerprint": digest.hexdigest(),
    }
