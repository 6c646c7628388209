"""torchvision: ``deeplabv3_resnet*`` and ``fcn_resnet*`` (output stride 8, first blocks of a stage at the rate before it).

The names are ours already.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from segmodels.readers.published import Published, resnet_name


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "backbone.layer1.0.conv1.weight" in state and (
        "classifier.0.convs.0.0.weight" in state or "classifier.4.weight" in state
    )


def read(state: Mapping[str, Tensor]) -> Published:
    system = "deeplabv3" if "classifier.0.convs.0.0.weight" in state else "fcn"
    options = {"output_stride": 8, "first_block": "previous"}
    if system == "deeplabv3":
        options |= {"rates": [6, 12, 18], "head_conv": True}
    return Published(f"{system}_{resnet_name(state, 'backbone.')}", options, dict(state))
