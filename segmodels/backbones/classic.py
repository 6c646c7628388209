"""What the networks before ResNet share: where in the image the values of their maps lie, and how they start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from segmodels.backbones.base import Backbone


class Grid(NamedTuple):
    """Value ``i`` of a map is centred on row ``center + stride * i`` of the image; both axes alike."""

    center: float
    stride: int


class ClassicBackbone(Backbone):
    """A network whose maps do not begin where the image begins: FCN pads the image instead of aligning them."""

    def centers(self) -> dict[str, float]:
        """Row (and column) of the image on which the first value of each map is centred, ``"out"`` among them."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its maps lie")


def grid_of(layers: Iterable[nn.Module]) -> Grid:
    """Of the output of ``layers``, run one after the other on an image. Modules that are not convolutions or pools keep it."""
    center, stride = 0.0, 1
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            kernel, step, padding = (_first(getattr(layer, name)) for name in ("kernel_size", "stride", "padding"))
            rate = _first(getattr(layer, "dilation", 1))
            center += stride * ((kernel - 1) * rate / 2 - padding)
            stride *= step
    return Grid(center, stride)


def init_convolutions(module: nn.Module) -> None:
    """He et al.'s normal initialisation, and biases of zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(cast(Tensor, layer.bias))


def _first(value: Any) -> int:
    return value[0] if isinstance(value, tuple) else value
