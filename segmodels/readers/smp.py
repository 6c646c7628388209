"""segmentation_models.pytorch: ``DeepLabV3``, ``DeepLabV3Plus`` and ``PSPNet`` on ResNet encoders, with their default settings.

What a file cannot say is taken to be the peer's default: output stride 8 for DeepLabV3 and 16 for DeepLabV3Plus, ASPP rates
12, 24 and 36 at that stride. Against the papers: separable convolutions have nothing between their two halves, DeepLabV3Plus
has a further one behind ASPP and one less in the decoder, PSPNet reads a backbone of two stages and has 1x1 convolutions where
the paper has 3x3; all upsampling outside ASPP aligns corners.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segmodels.backbones.weights import adding_batch_norm
from segmodels.readers.published import Published, renamed, resnet_name

# DeepLabV3's decoder was a Sequential before it had names.
_DEEPLABV3 = {
    "encoder.": "backbone.",
    "decoder.0.": "classifier.0.",
    "decoder.1.": "classifier.1.",
    "decoder.2.": "classifier.2.",
    "decoder.aspp.": "classifier.0.",
    "decoder.conv.": "classifier.1.",
    "decoder.bn.": "classifier.2.",
    "segmentation_head.0.": "classifier.4.",
}
_DEEPLABV3PLUS = {
    "encoder.": "backbone.",
    "decoder.aspp.0.": "classifier.aspp.",
    "decoder.aspp.1.": "classifier.aspp_refine.",
    "decoder.aspp.2.": "classifier.aspp_refine.2.",
    "decoder.block1.": "classifier.project_low.",
    "decoder.block2.0.": "classifier.refine.0.",
    "decoder.block2.1.": "classifier.refine.0.2.",
    "segmentation_head.0.": "classifier.predict.",
}
_PSPNET = {
    "encoder.": "backbone.",
    "decoder.conv.": "classifier.cls.",
    "segmentation_head.0.": "classifier.cls.4.",
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    return "segmentation_head.0.weight" in state and "encoder.layer1.0.conv1.weight" in state


def read(state: Mapping[str, Tensor]) -> Published:
    resnet = resnet_name(state, "encoder.")
    if "decoder.psp.blocks.0.pool.1.0.weight" in state:
        return _pspnet(state, resnet)
    options: dict[str, Any] = {"first_block": "full", "align_corners": True, "dropout": 0.5}
    if "decoder.block1.0.weight" in state:
        ours = renamed(state, _DEEPLABV3PLUS)
        aspp, name = "classifier.aspp.convs", f"deeplabv3plus_{resnet}"
        options |= {"output_stride": 16, "rates": [12, 24, 36], "refine": 1, "aspp_refine": True}
    else:
        ours = renamed(state, _DEEPLABV3)
        aspp, name = "classifier.0.convs", f"deeplabv3_{resnet}"
        options |= {"output_stride": 8, "rates": [6, 12, 18]}  # ours are those of output stride 16
    options["separable"] = "bare" if f"{aspp}.1.0.0.weight" in ours else False
    if options["separable"]:
        # Their pair of convolutions is a module; ours stand beside their BatchNorm.
        branches = {f"{aspp}.{i}.{theirs}.": f"{aspp}.{i}.{mine}." for i in (1, 2, 3)
                    for theirs, mine in (("0.0", "0"), ("0.1", "1"), ("1", "2"))}  # fmt: skip
        ours = renamed(ours, branches)
    return Published(name, options, ours)


def _pspnet(state: Mapping[str, Tensor], resnet: str) -> Published:
    pooled = {f"decoder.psp.blocks.{i}.pool.1.{theirs}.": f"classifier.ppm.features.{i}.{mine}."
              for i in range(4) for theirs, mine in ((0, 1), (1, 2))}  # fmt: skip
    ours = renamed(state, {**_PSPNET, **pooled})
    # The level of one bin has a bias and no BatchNorm.
    bias = ours.pop("classifier.ppm.features.0.1.bias", None)
    if bias is not None:
        ours |= adding_batch_norm(bias, "classifier.ppm.features.0.2")
    # They concatenate the levels before the map, we behind it.
    fused = ours.get("classifier.cls.0.weight")
    channels = ours["classifier.ppm.features.0.1.weight"].shape[1]
    if fused is not None:
        ours["classifier.cls.0.weight"] = torch.cat([fused[:, -channels:], fused[:, :-channels]], dim=1)
    stages = next((n for n in range(1, 5) if _width(state, n) == channels), 4)
    for stage in range(stages + 1, 5):  # in the file, never read
        ours = {key: value for key, value in ours.items() if not key.startswith(f"backbone.layer{stage}.")}
    return Published(
        f"pspnet_{resnet}",
        {
            "output_stride": 2 ** (stages + 1), "stages": stages, "stem": "conv7", "first_block": "full",
            "kernel": 1, "predict_kernel": 3, "dropout": 0.2, "align_corners": True,
        },
        ours,
    )  # fmt: skip


def _width(state: Mapping[str, Tensor], stage: int) -> int:
    last = state.get(f"encoder.layer{stage}.0.conv3.weight", state.get(f"encoder.layer{stage}.0.conv2.weight"))
    return 0 if last is None else last.shape[0]
