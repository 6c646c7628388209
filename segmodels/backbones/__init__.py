"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from segmodels.backbones.alexnet import AlexNet
from segmodels.backbones.base import OUTPUT_STRIDES, Backbone
from segmodels.backbones.efficientnet_lite import EfficientNetLite
from segmodels.backbones.googlenet import GoogLeNet
from segmodels.backbones.mobilenetv2 import MobileNetV2
from segmodels.backbones.resnet import ResNet
from segmodels.backbones.vgg import VGG16
from segmodels.backbones.xception import Xception65

#: name -> constructor; takes ``output_stride`` and the backbone's own options
BACKBONES: dict[str, Callable[..., Backbone]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 50, 101, 152, 269)},
    "mobilenetv2": MobileNetV2,
    "xception65": Xception65,
    **{f"efficientnet_lite{variant}": partial(EfficientNetLite, variant) for variant in range(5)},
}

#: the same for the networks before ResNet, which run only under the systems that name them
CLASSIC_BACKBONES: dict[str, Callable[..., Backbone]] = {"vgg16": VGG16, "alexnet": AlexNet, "googlenet": GoogLeNet}

__all__ = [
    "BACKBONES", "CLASSIC_BACKBONES", "OUTPUT_STRIDES", "VGG16", "AlexNet", "Backbone", "EfficientNetLite", "GoogLeNet",
    "MobileNetV2", "ResNet", "Xception65",
]  # fmt: skip
