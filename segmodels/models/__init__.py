"""Systems: one file per paper."""

from __future__ import annotations

from typing import Any

from segmodels.models.base import SegmentationModel
from segmodels.models.deeplabdt import DeepLabDT
from segmodels.models.deeplabv3 import DeepLabV3
from segmodels.models.deeplabv3plus import DeepLabV3Plus
from segmodels.models.pspnet import PSPNet

SYSTEMS: dict[str, type[Any]] = {"deeplabv3": DeepLabV3, "deeplabv3plus": DeepLabV3Plus, "pspnet": PSPNet}
SYSTEMS |= {"deeplabdt": DeepLabDT}

__all__ = ["SYSTEMS", "DeepLabDT", "DeepLabV3", "DeepLabV3Plus", "PSPNet", "SegmentationModel"]
