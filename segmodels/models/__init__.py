"""Systems: one file per paper."""

from __future__ import annotations

from collections.abc import Callable

from segmodels.models.base import SegmentationModel
from segmodels.models.deeplabv3 import DeepLabV3
from segmodels.models.deeplabv3plus import DeepLabV3Plus

SYSTEMS: dict[str, Callable[..., SegmentationModel]] = {"deeplabv3": DeepLabV3, "deeplabv3plus": DeepLabV3Plus}

__all__ = ["SYSTEMS", "DeepLabV3", "DeepLabV3Plus", "SegmentationModel"]
