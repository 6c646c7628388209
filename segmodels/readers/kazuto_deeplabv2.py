"""kazuto1011/deeplab-pytorch: DeepLab v2 on ResNets (three scales, corners not aligned).

Its input is blue first, with a mean colour subtracted and not scaled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from segmodels.readers.published import Published, renamed, resnet_name

_MEAN = (122.675, 116.669, 104.008)
#: Of a block: 1x1, 3x3, 1x1 convolution and the shortcut, each ``conv`` and ``bn``.
_PARTS = {"reduce": ("conv1", "bn1"), "conv3x3": ("conv2", "bn2"), "increase": ("conv3", "bn3"),
          "shortcut": ("downsample.0", "downsample.1"), "proj": ("downsample.0", "downsample.1")}  # fmt: skip
_RATES = (6, 12, 18, 24)


def recognises(state: Mapping[str, Tensor]) -> bool:
    return any(re.fullmatch(r"(base\.|scale\.)?layer2\.block1\.reduce\.conv\.weight", key) for key in state)


def read(state: Mapping[str, Tensor]) -> Published:
    # Networks that see several scales wrap the one that they share.
    wrapper = next((name for name in ("base.", "scale.") if any(key.startswith(name) for key in state)), "")
    inner = {key.removeprefix(wrapper): value for key, value in state.items()}
    names = {"layer1.conv1.conv.": "backbone.conv1.", "layer1.conv1.bn.": "backbone.bn1."}
    for key in inner:
        found = re.match(r"layer([2-5])\.block(\d+)\.(\w+)\.(conv|bn)\.", key)
        branch = re.match(r"aspp\.(?:stages\.)?c(\d)\.", key)
        if found and found[3] in _PARTS:
            part = _PARTS[found[3]][found[4] == "bn"]
            names[found[0]] = f"backbone.layer{int(found[1]) - 1}.{int(found[2]) - 1}.{part}."
        elif branch:
            names[branch[0]] = f"classifier.branches.{branch[1]}."
    ours = renamed(inner, names)
    first = ours.get("backbone.conv1.weight")
    if first is not None and first.dim() == 4 and first.shape[1] == 3:
        ours["backbone.conv1.weight"] = first[:, [2, 1, 0]].contiguous()
    options = {
        "rates": list(_RATES),
        "scales": [1.0, 0.75, 0.5] if wrapper else [1.0],
        "align_corners": False,
        "input_mean": [value / 255 for value in _MEAN],
        "input_std": [1 / 255] * 3,
    }
    return Published(f"deeplabv2_{resnet_name(ours, 'backbone.')}", options, ours)
