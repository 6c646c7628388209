"""Systems: one file per paper."""

from __future__ import annotations

from typing import Any

from segmodels.models.attention import AttentionToScale
from segmodels.models.base import SegmentationModel
from segmodels.models.deeplabdt import DeepLabDT
from segmodels.models.deeplabv1 import DeepLabV1
from segmodels.models.deeplabv2 import DeepLabV2
from segmodels.models.deeplabv3 import DeepLabV3
from segmodels.models.deeplabv3plus import DeepLabV3Plus
from segmodels.models.dilation import Dilation7, Dilation8, Dilation10, FrontEnd
from segmodels.models.fcn import FCN8s, FCN16s, FCN32s
from segmodels.models.fcn_dilated import DilatedFCN
from segmodels.models.pspnet import PSPNet

SYSTEMS: dict[str, type[Any]] = {
    "deeplabv3": DeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
    "fcn": DilatedFCN,
    "pspnet": PSPNet,
}
SYSTEMS |= {"fcn32s": FCN32s, "fcn16s": FCN16s, "fcn8s": FCN8s}
SYSTEMS |= {"frontend": FrontEnd, "dilation7": Dilation7, "dilation8": Dilation8, "dilation10": Dilation10}
SYSTEMS |= {"deeplabv1": DeepLabV1, "deeplabv2": DeepLabV2, "attentiontoscale": AttentionToScale}
SYSTEMS |= {"deeplabdt": DeepLabDT}

__all__ = [
    "SYSTEMS", "AttentionToScale", "DeepLabDT", "DeepLabV1", "DeepLabV2", "DeepLabV3", "DeepLabV3Plus", "DilatedFCN",
    "Dilation7", "Dilation8", "Dilation10", "FCN8s", "FCN16s", "FCN32s", "FrontEnd", "PSPNet", "SegmentationModel",
]  # fmt: skip
