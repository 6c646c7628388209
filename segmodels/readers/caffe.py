"""Caffe: the authors' FCN, DeepLab v1 and v2, and Dilation networks (``.caffemodel``).

Their input is blue first, with a mean colour subtracted and not scaled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segmodels.backbones.resnet import DEPTHS
from segmodels.backbones.surgery import CAFFE_MEAN, VGG16_LAYERS, renamed_layers
from segmodels.models.deeplabv1 import BRANCH_STRIDES
from segmodels.readers.published import Published

#: Mean colours (blue first) of Yu & Koltun by data set; the number of classes says which.
_DILATION_MEANS = {
    "dilation7_vgg16": (96.194, 95.551, 91.347),  # KITTI
    "dilation8_vgg16": (102.93, 111.36, 116.52),  # VOC
    "dilation10_vgg16": (72.39, 82.91, 73.16),  # Cityscapes
}
_NYUD_MEAN, _NYUD_CLASSES = (116.190, 97.203, 92.318), 40
_CAMVID_MEAN = (110.703, 108.778, 105.412)
_DEEPLAB_MEAN = (104.008, 116.669, 122.675)
_FC6_BY_KERNEL = {3: "largefov", 4: "4x4", 7: "7x7"}


def recognises(state: Mapping[str, Tensor]) -> bool:
    layers = _layers(state)
    return bool({"conv1_1", "conv1", "conv1_1color", "conv1_1_bgrd"} & layers) and any(
        layer.startswith(("score_fr", "fc8_", "fc1_")) or layer in ("final", "fc-final") for layer in layers
    )


def read(state: Mapping[str, Tensor]) -> Published:
    layers = _layers(state)
    if "bn_conv1" in layers:
        return _deeplab_resnet(state)
    if any(layer.startswith("score_fr") for layer in layers):
        return _fcn(state, layers)
    if {"final", "fc-final"} & layers:
        return _dilation(state, layers)
    return _deeplab_vgg(state, layers)


def _fcn(state: Mapping[str, Tensor], layers: set[str]) -> Published:
    """NYUDv2's among them: depth as a fourth channel (the logarithm of its value minus 7.844), or a second network for HHA (as
    stored, 0 to 255, minus 132.431, 94.076 and 118.477). Neither is scaled."""
    alexnet = "conv1" in layers
    streams = {"color": "backbone", "hha": "backbone_hha"} if "conv1_1color" in layers else {"": "backbone"}
    heads = {"out": ""}
    options: dict[str, Any] = {}
    if "score_fr_sem" in layers:  # SIFT Flow
        heads = {"out": "_sem", "geometric": "_geo"}
        options["geometric_classes"] = state["score_fr_geo.0"].shape[0]
    names: dict[str, str] = {}
    body = {f"conv{i}": f"conv{i}" for i in range(1, 6)} if alexnet else _vgg16()
    body |= {"fc6": "fc6", "fc7": "fc7"}
    for index, (stream, backbone) in enumerate(streams.items()):
        names |= {f"{theirs}{stream}": f"{backbone}.{ours}" for theirs, ours in body.items()}
        for head, suffix in heads.items():
            for theirs, depth in (("score_fr", "out"), ("score_pool4", "pool4"), ("score_pool3", "pool3")):
                names[f"{theirs}{suffix}{stream}"] = f"classifier.{head}.scores.{index}.score.{depth}"
    if len(streams) > 1:
        options["late_fusion"] = True
    if "conv1_1_bgrd" in layers:
        names["conv1_1_bgrd"] = "backbone.features.0"
        options["in_channels"] = 4
    stride = 8 if any(layer.startswith("score_pool3") for layer in layers) else 16
    stride = stride if any(layer.startswith("score_pool4") for layer in layers) else 32
    if "scale_pool4" in layers:
        options["at_once"] = True
    # The transposed convolutions are bilinear interpolation, which ours are by themselves.
    ours = renamed_layers(state, names, leave_out=("upscore*", "scale_pool*"))
    first = "backbone.conv1" if alexnet else "backbone.features.0"
    score = ours.get("classifier.out.scores.0.score.out.weight")
    mean = _NYUD_MEAN if score is not None and len(score) == _NYUD_CLASSES else CAFFE_MEAN
    return _published(f"fcn{stride}s_{'alexnet' if alexnet else 'vgg16'}", options, ours, first, mean)


def _dilation(state: Mapping[str, Tensor], layers: set[str]) -> Published:
    names = {theirs: f"backbone.{ours}" for theirs, ours in (_vgg16() | {"fc6": "fc6", "fc7": "fc7"}).items()}
    names |= {"final": "classifier.final", "fc-final": "classifier.final"}
    context = [layer for layer in layers if re.fullmatch(r"ctx?_(conv\d+_\d|fc1)", layer)]
    prefix = "ctx_" if "ctx_fc1" in layers else "ct_"
    order = [f"{prefix}conv1_1", f"{prefix}conv1_2", *(f"{prefix}conv{i}_1" for i in range(2, len(context) - 1))]
    for index, layer in enumerate([*order, f"{prefix}fc1"]):
        names[layer] = f"classifier.context.layers.{index}"
    names[f"{prefix}final"] = "classifier.context.final"
    classes = state["final.0" if "final" in layers else "fc-final.0"].shape[0]
    options: dict[str, Any] = {}
    # The numbers in their names count the 1x1 layer too.
    model = f"dilation{len(context) + 1}_vgg16" if context else "frontend_vgg16"
    mean = _DILATION_MEANS.get(model, _DILATION_MEANS["dilation8_vgg16"])
    if model == "dilation8_vgg16":
        large = state.get(f"{prefix}conv1_1.0", torch.empty(0)).shape[:1] != (classes,)
        options["context"] = "large" if large else "basic"
        mean = mean if large else _CAMVID_MEAN
    ours = renamed_layers(state, names, leave_out=("ctx_upsample",))
    return _published(model, options, ours, "backbone.features.0", mean)


def _deeplab_vgg(state: Mapping[str, Tensor], layers: set[str]) -> Published:
    names = {theirs: f"backbone.{ours}" for theirs, ours in _vgg16().items()}
    options: dict[str, Any] = {}
    model = "deeplabv2_vgg16" if "fc6_1" in layers else "deeplabv1_vgg16"
    for layer in layers:
        fc8 = re.fullmatch(r"fc8_.*?(?:_(\d))?", layer)
        branch = re.fullmatch(r"fc([67])_(\d)", layer)
        if model == "deeplabv1_vgg16" and layer.startswith("fc8_"):
            names[layer] = "classifier.fc8"
        elif fc8 and fc8[1]:
            names[layer] = f"classifier.branches.{int(fc8[1]) - 1}.6"
        elif branch:
            names[layer] = f"classifier.branches.{int(branch[2]) - 1}.{0 if branch[1] == '6' else 3}"
    if model == "deeplabv1_vgg16":
        names |= {"fc6": "backbone.fc6", "fc7": "backbone.fc7"}
        for branch_name in BRANCH_STRIDES:
            theirs = "data" if branch_name == "image" else branch_name
            for part, index in (("conv", 0), ("fc", 3), ("ms", 6)):
                names[f"{theirs}_{part}"] = f"classifier.{branch_name}.{index}"
        options["msc"] = "data_ms" in layers
        if "fc6" in layers:
            options["fc6"] = _FC6_BY_KERNEL.get(state["fc6.0"].shape[-1], "largefov")
    ours = renamed_layers(state, names)
    return _published(model, options, ours, "backbone.features.0", _DEEPLAB_MEAN)


def _deeplab_resnet(state: Mapping[str, Tensor]) -> Published:
    """Of the three copies of the network, one per scale, the first; they share their weights."""
    ours: dict[str, Tensor] = {}
    blocks: dict[int, list[str]] = {}
    for key in state:
        found = re.fullmatch(r"res([2-5])([a-z]\d*)_branch1\.0|res([2-5])([a-z]\d*)_branch2a\.0", key)
        if found:
            stage, block = found[1] or found[3], found[2] or found[4]
            blocks.setdefault(int(stage), []).append(block)
    order = {stage: sorted(set(names), key=lambda name: (name[0], int(name[1:] or 0))) for stage, names in blocks.items()}
    for key, value in state.items():
        layer, _, index = key.rpartition(".")
        if layer.endswith(("_res075", "_res05")):
            continue
        classifier = re.fullmatch(r"fc1_.*_c(\d)", layer)
        unit = re.fullmatch(r"(res|bn|scale)([2-5])([a-z]\d*)_branch(1|2[abc])", layer)
        if classifier:
            ours[f"classifier.branches.{classifier[1]}.{'weight' if index == '0' else 'bias'}"] = value
        elif layer == "conv1" and index == "0":
            ours["backbone.conv1.weight"] = value
        elif layer in ("bn_conv1", "scale_conv1"):
            _batch_norm(ours, state, "backbone.bn1", layer, layer.startswith("bn"), index)
        elif unit and unit[3] in order.get(int(unit[2]), ()):
            module = f"backbone.layer{int(unit[2]) - 1}.{order[int(unit[2])].index(unit[3])}."
            branch = {"1": 0, "2a": 1, "2b": 2, "2c": 3}[unit[4]]
            if unit[1] == "res":
                name = f"{module}conv{branch}" if branch else f"{module}downsample.0"
                ours[f"{name}.weight"] = value
            else:
                name = f"{module}bn{branch}" if branch else f"{module}downsample.1"
                _batch_norm(ours, state, name, layer, unit[1] == "bn", index)
        else:
            ours[key] = value
    counts = tuple(len(order.get(stage, ())) for stage in range(2, 6))
    depth = next((depth for depth, known in DEPTHS.items() if known == (True, counts)), None)
    if depth is None:
        raise ValueError(f"no ResNet that is known here has {counts} bottlenecks")
    return _published(f"deeplabv2_resnet{depth}", {"scales": [1.0, 0.75, 0.5]}, ours, "backbone.conv1", _DEEPLAB_MEAN)


def _batch_norm(
    ours: dict[str, Tensor], state: Mapping[str, Tensor], name: str, layer: str, statistics: bool, index: str
) -> None:
    """Caffe keeps sums of statistics and their weight in one layer, gain and bias in the next."""
    value = state[f"{layer}.{index}"]
    if not statistics:
        ours[f"{name}.{'weight' if index == '0' else 'bias'}"] = value
    elif index in ("0", "1"):
        weight = state.get(f"{layer}.2", torch.ones(1)).flatten()[0]
        ours[f"{name}.{'running_mean' if index == '0' else 'running_var'}"] = value / torch.where(weight == 0, 1, weight)


def _published(
    model: str, options: dict[str, Any], state: dict[str, Tensor], first: str, mean: tuple[float, float, float]
) -> Published:
    """With what reads the image turned from blue first to red first, and the normalisation in the options."""
    for name in (first, "classifier.image.0"):  # of MSc
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.dim() == 4 and weight.shape[1] in (3, 4):
            state[f"{name}.weight"] = weight[:, [2, 1, 0, 3][: weight.shape[1]]].contiguous()
    options |= {"input_mean": [value / 255 for value in reversed(mean)], "input_std": [1 / 255] * 3}
    return Published(model, options, state)


def _layers(state: Mapping[str, Tensor]) -> set[str]:
    return {key.rpartition(".")[0] for key in state if key.rpartition(".")[2].isdigit()}


def _vgg16() -> dict[str, str]:
    """Caffe's names of the convolutions -> those of torchvision, whose indices count ReLUs and pools."""
    stages = (2, 2, 3, 3, 3)
    indices = [2 * sum(stages[:stage]) + stage + 2 * i for stage, count in enumerate(stages) for i in range(count)]
    return {layer: f"features.{index}" for layer, index in zip(VGG16_LAYERS, indices, strict=True)}
