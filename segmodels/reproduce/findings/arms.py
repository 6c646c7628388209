"""The networks that the findings compare: a recipe each, on scenes of 96 pixels or on CamVid at a quarter of its size.

A ResNet-18 of a quarter of the width trains from scratch in seconds on one core. Rates are the papers', divided by the ratio of
the maps: 6, 12, 18 on the 33 x 33 of a 513-pixel crop are 1, 2, 3 on the 6 x 6 of 96 pixels. AdamW and classes weighted against
their frequency, where the papers have SGD: so few steps would otherwise not get to the rare classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One network and how it is trained, or how one that another arm has trained is evaluated.

    Attributes:
        text: what it is, in a table.
        settings: sections of a recipe.
        start: the arm whose weights, of the same seed, it starts from.
        evaluates: the arm whose network, of the same seed, it evaluates; it then trains nothing.
    """

    text: str
    settings: Sections
    start: str | None = None
    evaluates: str | None = None


def merged(*parts: Sections) -> dict[str, dict[str, Any]]:
    """Sections on top of each other; ``model.options`` and ``data.options`` key by key."""
    result: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            mine = result.setdefault(section, {})
            for key, value in values.items():
                mine[key] = {**mine.get(key, {}), **value} if key == "options" else value
    return result


def model(name: str, output_stride: int = 8, *, aux_loss: bool = False, **options: Any) -> Sections:
    settings = {"name": name, "output_stride": output_stride, "options": options}
    return {"model": {**settings, "aux_loss": True} if aux_loss else settings}


def train(**values: Any) -> Sections:
    return {"train": values}


def evaluate(**values: Any) -> Sections:
    return {"eval": values}


SCENES: Sections = {
    "data": {
        "name": "synthetic", "options": {"size": 96, "length": 800}, "crop": [96, 96], "scale": [1.0, 1.0], "cache": False,
    },
    "train": {
        "iterations": 300, "batch_size": 8, "optimizer": "adamw", "lr": 0.003, "weight_decay": 0.01, "warmup_iterations": 20,
        "balance": 0.3,
    },
    "eval": {"limit": 160, "sheet": 0},
    "run": {"threads": 1, "checkpoint_every": 0, "tensorboard": False, "print_seconds": 1000.0},
}  # fmt: skip
#: every image and crop at a quarter of its size; classification weights make a short training enough
CAMVID: Sections = {
    "data": {
        "name": "camvid", "root": "${oc.env:ATROUS_SHARED}/data/camvid", "crop": [120, 160], "scale": [0.22, 0.3], "cache": False,
    },
    "train": {
        "iterations": 80, "batch_size": 8, "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.01, "warmup_iterations": 10,
        "backbone_rate": 0.3, "balance": 0.15, "norm_decay": 0.9,
    },
    "eval": {"canvas": [120, 160], "sheet": 0},
    "run": SCENES["run"],
}  # fmt: skip
#: as the authors of DeepLabv3: 16 k + 1 pixels and aligned corners, so that scores of every stride lie where their features do;
#: scaled images
ALIGNED: Sections = {
    "data": {"options": {"size": 97}, "crop": [97, 97], "scale": [0.75, 1.33]}, "model": {"options": {"align_corners": True}},
}  # fmt: skip
NARROW: dict[str, Any] = {"width_mult": 0.25}

_V3: dict[str, Any] = {
    **NARROW, "head_channels": 64, "head_conv": False, "dropout": 0.0, "rates": [1, 2, 3], "multi_grid": [1, 2],
}  # fmt: skip
_PSP: dict[str, Any] = {**NARROW, "stem": "conv7", "head_channels": 32}


def _v3(text: str, output_stride: int = 16, *more: Sections, **options: Any) -> Arm:
    return Arm(text, merged(SCENES, model("deeplabv3_resnet18", output_stride, **{**_V3, **options}), ALIGNED, *more))


def _block4(text: str, output_stride: int, **options: Any) -> Arm:
    network = model("deeplabv3_resnet18", output_stride, aspp=False, **NARROW, **options)
    return Arm(text, merged(SCENES, network, train(iterations=200)))


def _evaluated(text: str, trained: str, arms: dict[str, Arm], **values: Any) -> Arm:
    return Arm(text, merged(arms[trained].settings, evaluate(**values)), evaluates=trained)


def _fcn(text: str, *more: Sections, aux_loss: bool = False) -> Arm:
    return Arm(text, merged(SCENES, model("fcn_resnet18", aux_loss=aux_loss, **NARROW), *more))


def _psp(text: str, **options: Any) -> Arm:
    return Arm(text, merged(SCENES, model("pspnet_resnet18", **_PSP, **options)))


ARMS: dict[str, Arm] = {
    "block4_os8": _block4("output stride 8", 8),
    "block4_os16": _block4("output stride 16", 16),
    "block4_os32": _block4("output stride 32", 32),
    "block4_grid12": _block4("Multi-grid (1, 2)", 16, multi_grid=[1, 2]),
    "block4_grid22": _block4("Multi-grid (2, 2)", 16, multi_grid=[2, 2]),
    "v3": _v3("ASPP, image pooling, output stride 16"),
    "v3_plain": _v3("ASPP without image pooling or multi-grid", image_pooling=False, multi_grid=[1, 1]),
    "v3_grid": _v3("ASPP, multi-grid (1, 2)", image_pooling=False),
    "v3_rate4": _v3("ASPP with a fourth rate", image_pooling=False, rates=[1, 2, 3, 4]),
    "v3_os8": _v3("trained at output stride 8", 8),
    "v3_os32": _v3("trained at output stride 32", 32),
    "v3_small_crop": _v3("crop of 61", 16, {"data": {"crop": [61, 61]}}),
    "v3_small_labels": _v3("labels on the grid of the scores", 16, train(labels_at="scores")),
    "v3_batch4": _v3("batch of 4", 16, train(batch_size=4)),
    "v3_batch2": _v3("batch of 2", 16, train(batch_size=2)),
    "fcn": _fcn("dilated network"),
    "fcn_aux04": _fcn("auxiliary loss, weight 0.4", aux_loss=True),
    "fcn_aux09": _fcn("auxiliary loss, weight 0.9", train(aux_weight=0.9), aux_loss=True),
    "psp_one_average": _psp("bin 1, average", bins=[1], reduction=False),
    "psp_max": _psp("bins 1, 2, 3, 6, maximum", mode="max", reduction=False),
    "psp_average": _psp("bins 1, 2, 3, 6, average", reduction=False),
    "psp_average_reduced": _psp("bins 1, 2, 3, 6, average, reduction"),
}  # fmt: skip
ARMS["v3_hard_classes"] = _v3("scenes with tents or poles twice per epoch", 16, {"data": {"hard_classes": ["tent", "pole"]}})
ARMS["v3_areas"] = _v3("trained at 16, corners not aligned", 16, {"model": {"options": {"align_corners": False}}})
_FEW: Sections = {"data": {"options": {"length": 64}}}
ARMS["few_plain"] = _fcn("64 scenes as they are", _FEW, {"data": {"flip": 0.0}})
ARMS["few_augmented"] = _fcn("64 scenes, scaled and mirrored", _FEW, {"data": {"scale": [0.75, 1.33]}})
ARMS |= {
    "v3_eval8": _evaluated("evaluated at output stride 8", "v3", ARMS, output_stride=8),
    "v3_eval8_scales": _evaluated(
        "output stride 8, three scales", "v3", ARMS, output_stride=8, scales=[0.75, 1.0, 1.25]),
    "v3_eval8_scales_flip": _evaluated(
        "output stride 8, three scales, mirrored", "v3", ARMS, output_stride=8, scales=[0.75, 1.0, 1.25], flip=True),
    "v3_os8_eval16": _evaluated("trained at 8, evaluated at 16", "v3_os8", ARMS, output_stride=16),
    "v3_os32_eval16": _evaluated("trained at 32, evaluated at 16", "v3_os32", ARMS, output_stride=16),
    "v3_areas_eval8": _evaluated("trained at 16, evaluated at 8, corners not aligned", "v3_areas", ARMS, output_stride=8),
    "v3_os32_eval8": _evaluated("trained at 32, evaluated at 8", "v3_os32", ARMS, output_stride=8),
}  # fmt: skip

#: Two stages see about as much of a scene as VGG-16 of an image.
_SHORT: dict[str, Any] = {**NARROW, "stages": 2}
_FOV: dict[str, Any] = {**_SHORT, "fc_channels": 64, "dropout": 0.1}
#: fc6 and fc7 have no batch norm, and many inputs
_GENTLE = train(head_rate=0.3)


def _v1(text: str, kernel: int, rate: int) -> Arm:
    return Arm(text, merged(SCENES, model("deeplabv1_resnet18", **_FOV, fc_kernel=kernel, fc_rate=rate), _GENTLE))


def _v2(text: str, rates: list[int], *more: Sections) -> Arm:
    options: dict[str, Any] = {**NARROW, "rates": rates, "freeze_batch_norm": False}
    return Arm(text, merged(SCENES, model("deeplabv2_resnet18", **options), *more))


def _scales(text: str, fusion: str, supervised: bool) -> Arm:
    options: dict[str, Any] = {**_FOV, "fc_rate": 3, "attention_channels": 32, "scales": [1, 0.5], "fusion": fusion}
    return Arm(text, merged(SCENES, model("attentiontoscale_resnet18", **options, extra_supervision=supervised), _GENTLE))


def _context(text: str, **options: Any) -> Arm:
    first = {"model": {"weights_skip": ["classifier.context"]}, "train": {"freeze": ["backbone", "classifier.final"]}}
    short = train(iterations=120, lr=0.001)
    settings = merged(SCENES, model("dilation8_resnet18", **NARROW, pad_first=False, **options), first, short)
    return Arm(text, settings, start="front_end")


def _camvid(text: str, **values: Any) -> Arm:
    network = model("deeplabv3_efficientnet_lite0", 16, head_channels=64, head_conv=False, dropout=0.1, rates=[2, 3, 5])
    return Arm(text, merged(CAMVID, network, {"model": {"weights_backbone": "imagenet"}}, train(**values)))


ARMS |= {
    "fcn32s": Arm("FCN-32s", merged(SCENES, model("fcn32s_resnet18", 32, **NARROW))),
    "fcn16s": Arm("FCN-16s", merged(SCENES, model("fcn16s_resnet18", 32, **NARROW))),
    "fcn8s": Arm("FCN-8s", merged(SCENES, model("fcn8s_resnet18", 32, **NARROW))),
    "front_end": Arm("front end", merged(SCENES, model("frontend_resnet18", **NARROW))),
    "context_basic": _context("front end and Basic context", context="basic"),
    "context_large": _context("front end and Large context", context="large"),
    "context_random": _context("Basic context, random initialisation", context="basic", identity=False),
    "fov_4x4": _v1("4 x 4, rate 1", 4, 1),
    "fov_7x7": _v1("7 x 7, rate 1", 7, 1),
    "fov_large": _v1("LargeFOV: 3 x 3, rate 3", 3, 3),
    "short_fcn": Arm("two stages", merged(SCENES, model("fcn_resnet18", **_SHORT))),
    "short_psp": _psp("pyramid pooling behind two stages", stages=2),
    "v2_large_fov": _v2("LargeFOV: rate 3, poly", [3]),
    "v2_step": _v2("LargeFOV: rate 3, step", [3], train(schedule="step", steps=[200])),
    "v2_aspp_small": _v2("ASPP, rates 1, 1, 2, 3", [1, 1, 2, 3]),
    "v2_aspp_large": _v2("ASPP, rates 2, 3, 5, 6", [2, 3, 5, 6]),
    "scales_max": _scales("two scales, maximum", "max", False),
    "scales_average": _scales("two scales, average", "average", False),
    "scales_attention": _scales("two scales, attention", "attention", False),
    "scales_max_supervised": _scales("maximum, each scale supervised", "max", True),
    "scales_average_supervised": _scales("average, each scale supervised", "average", True),
    "scales_attention_supervised": _scales("attention, each scale supervised", "attention", True),
    "camvid_norm": _camvid("batch norm trained"),
    "camvid_frozen_norm": _camvid("batch norm frozen", freeze_norm=True),
}
