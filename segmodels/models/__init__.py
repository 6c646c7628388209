"""Systems: one file per paper."""

from __future__ import annotations

from typing import Any

from segmodels.models.base import SegmentationModel
from segmodels.models.deeplabv3 import DeepLabV3
from segmodels.models.deeplabv3plus import DeepLabV3Plus
from segmodels.models.fcn_dilated import DilatedFCN
from segmodels.models.pspnet import PSPNet

SYSTEMS: dict[str, type[Any]] = {
    "deeplabv3": DeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
    "fcn": DilatedFCN,
    "pspnet": PSPNet,
}

__all__ = ["SYSTEMS", "DeepLabV3", "DeepLabV3Plus", "DilatedFCN", "PSPNet", "SegmentationModel"]
