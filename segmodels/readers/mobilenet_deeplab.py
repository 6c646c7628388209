"""DeepLabv3 on MobileNetV2 for PASCAL VOC by the authors of DeepLab (TensorFlow), recovered from its 8-bit form.

The head has no atrous branches: image pooling and a 1x1 convolution, concatenated in this order (ours is the other), projected
and classified; the logits are upsampled with aligned corners. BatchNorm is folded into the convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from segmodels.backbones.weights import adding_batch_norm
from segmodels.readers.published import Published

# Their name -> our convolution and the BatchNorm behind it.
_HEAD = {
    "aspp.conv1x1": ("classifier.0.convs.0.0", "classifier.0.convs.0.1"),
    "aspp.image_pool": ("classifier.0.convs.1.1", "classifier.0.convs.1.2"),
    "aspp.project": ("classifier.0.project.0", "classifier.0.project.1"),
}
_STEM_WIDTH = 32


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "aspp.conv1x1.weight" in state and "backbone.features.0.0.weight" in state


def read(state: Mapping[str, Tensor]) -> Published:
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if name.startswith("backbone."):
            parent, _, index = name.rpartition(".")
            convolution, norm = name, f"{parent}.{int(index) + 1}"
        elif name in _HEAD:
            convolution, norm = _HEAD[name]
        else:  # the classifier keeps its bias; whatever else there is, the model will name as unexpected
            ours[key.replace("classifier.", "classifier.1.", 1) if name == "classifier" else key] = value
            continue
        if kind == "bias":
            ours |= adding_batch_norm(value, norm)
        else:
            ours[f"{convolution}.{kind}"] = value
    project = ours.get("classifier.0.project.0.weight")
    if project is not None:
        pooled, local = project.chunk(2, dim=1)
        ours["classifier.0.project.0.weight"] = torch.cat([local, pooled], dim=1)
    return Published(
        "deeplabv3_mobilenetv2",
        {
            "width_mult": state["backbone.features.0.0.weight"].shape[0] / _STEM_WIDTH,
            "width_divisor": 1,
            "padding": "same",
            "rates": [],
            "head_conv": False,
            "align_corners": True,
            "input_mean": [0.5, 0.5, 0.5],
            "input_std": [0.5, 0.5, 0.5],
        },
        ours,
    )
