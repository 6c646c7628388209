"""Caffe: the authors' PSPNet (``.caffemodel``), without the auxiliary head, which only their training has.

Against hszhao/semseg: ResNet-50 strides in the 1x1 convolutions and ResNet-101 in the 3x3, the pooled levels follow from fine to
coarse, the max pool rounds up; the input is blue first, with a mean colour subtracted and not scaled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from segmodels.readers.published import Published, resnet_name

_MEAN = (103.939, 116.779, 123.68)  # blue first
_BINS = (6, 3, 2, 1)
_NORM = ("weight", "bias", "running_mean", "running_var")
#: Their layer -> our convolution and the BatchNorm behind it.
_LAYERS = {
    "conv1_1_3x3_s2": ("backbone.conv1.0", "backbone.conv1.1"),
    "conv1_2_3x3": ("backbone.conv1.3", "backbone.conv1.4"),
    "conv1_3_3x3": ("backbone.conv1.6", "backbone.bn1"),
    "conv5_4": ("classifier.cls.0", "classifier.cls.1"),
    "conv6": ("classifier.cls.4", ""),
    **{f"conv5_3_pool{bins}_conv": (f"classifier.ppm.features.{i}.1", f"classifier.ppm.features.{i}.2")
       for i, bins in enumerate(_BINS)},
}  # fmt: skip
_UNITS = {
    "1x1_reduce": ("conv1", "bn1"),
    "3x3": ("conv2", "bn2"),
    "1x1_increase": ("conv3", "bn3"),
    "1x1_proj": ("downsample.0", "downsample.1"),
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "conv1_1_3x3_s2.0" in state and "conv6.0" in state


def read(state: Mapping[str, Tensor]) -> Published:
    ours = {_renamed(key): value.flatten() if "/bn." in key or key.endswith(".1") else value for key, value in state.items()}
    first = "backbone.conv1.0.weight"
    ours[first] = ours[first][:, [2, 1, 0]].contiguous()
    resnet = resnet_name(ours, "backbone.")
    options = {
        "output_stride": 8, "stem": "deep", "first_block": "full", "stride_placement": "1x1" if resnet == "resnet50" else "3x3",
        "ceil_mode": True, "bins": list(_BINS), "align_corners": True,
        "input_mean": [value / 255 for value in reversed(_MEAN)], "input_std": [1 / 255] * 3,
    }  # fmt: skip
    return Published(f"pspnet_{resnet}", options, ours)


def _renamed(key: str) -> str:
    """Our name of a blob; an unknown layer keeps its own, to be named as unexpected."""
    layer, _, index = key.rpartition(".")
    convolution = layer.removesuffix("/bn")
    unit = re.fullmatch(rf"conv([2-5])_(\d+)_({'|'.join(_UNITS)})", convolution)
    if unit:
        block = f"backbone.layer{int(unit[1]) - 1}.{int(unit[2]) - 1}"
        modules = tuple(f"{block}.{module}" for module in _UNITS[unit[3]])
    elif convolution in _LAYERS:
        modules = _LAYERS[convolution]
    else:
        return key
    return f"{modules[layer.endswith('/bn')]}.{_NORM[int(index)]}"
