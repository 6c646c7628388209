"""hszhao/semseg: ``PSPNet`` on ResNets with a deep stem (whole stages at one rate, aligned corners)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from segmodels.readers.published import Published, renamed, resnet_name

# Of layer0: convolution and BatchNorm three times, ReLU between; our deep stem's last BatchNorm is bn1.
_NAMES = {
    "layer0.7.": "backbone.bn1.",
    "layer0.": "backbone.conv1.",
    **{f"layer{n}.": f"backbone.layer{n}." for n in range(1, 5)},
    "ppm.": "classifier.ppm.",
    "cls.": "classifier.cls.",
    "aux.": "aux_classifier.",
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "layer0.0.weight" in state and "cls.0.weight" in state


def read(state: Mapping[str, Tensor]) -> Published:
    bins = {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 3, 6)}
    levels = sum(key.startswith("ppm.features.") and key.endswith(".1.weight") for key in state)
    options = {"output_stride": 8, "stem": "deep", "first_block": "full", "align_corners": True}
    if levels in bins:
        options["bins"] = list(bins[levels])
    return Published(f"pspnet_{resnet_name(state)}", options, renamed(state, _NAMES))
