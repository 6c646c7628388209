"""AlexNet (Krizhevsky, Sutskever and Hinton, 2012) as FCN uses it: Caffe's CaffeNet, or torchvision's one-column form.

fc6 and fc7 run as convolutions (FCN, section 3.1); the first convolution is padded by 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.classic import ClassicBackbone, grid_of, init_convolutions
from segmodels.backbones.surgery import as_convolution, fold_caffe_input, renamed_layers, widen_input


class Form(NamedTuple):
    """Widths and groups of conv1 to conv5; ``norm``: local response normalisation after the first two pools."""

    widths: tuple[int, int, int, int, int]
    groups: tuple[int, int, int, int, int]
    norm: bool


FORMS = {
    "caffenet": Form((96, 256, 384, 384, 256), (1, 2, 1, 2, 2), True),
    "torchvision": Form((64, 192, 384, 256, 256), (1, 1, 1, 1, 1), False),
}
KERNELS = (11, 5, 3, 3, 3)
FC_WIDTH = 4096


class AlexNet(ClassicBackbone):
    """AlexNet: ``low`` is pool1 (stride 8), ``aux`` pool2 (stride 16), ``out`` fc7 (stride 32).

    Args:
        output_stride: 32, and no other.
        form: ``"caffenet"``, or ``"torchvision"`` for its weights.
        in_channels, dropout, width_mult: as :class:`segmodels.backbones.vgg.VGG16`.

    Raises:
        ValueError: an argument outside these.
    """

    classifier_prefixes = ("classifier.6.",)
    output_strides = (32,)
    conv1: Conv2d
    conv2: Conv2d
    conv3: Conv2d
    conv4: Conv2d
    conv5: Conv2d

    def __init__(
        self,
        output_stride: int = 32,
        form: str = "caffenet",
        *,
        in_channels: int = 3,
        dropout: float = 0.5,
        width_mult: float = 1.0,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}")
        self.form, self.in_channels, self.dropout = form, in_channels, dropout
        widths, groups, norm = FORMS[form]
        widths_scaled = [round(width * width_mult) for width in widths]
        if any(width < 1 or width % 2 for width in widths_scaled):
            raise ValueError(f"width_mult={width_mult} makes widths {widths_scaled}: expected even ones, for the two groups")
        channels = in_channels
        for index, (width, kernel, group) in enumerate(zip(widths_scaled, KERNELS, groups, strict=True), 1):
            stride, border = (4, 100) if index == 1 else (1, kernel // 2)
            setattr(self, f"conv{index}", Conv2d(channels, width, kernel, stride, border, groups=group))
            channels = width
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.norm = nn.LocalResponseNorm(5, 1e-4, 0.75) if norm else nn.Identity()
        width = round(FC_WIDTH * width_mult)
        self.fc6 = Conv2d(channels, width, 6)
        self.fc7 = Conv2d(width, width, 1)
        self.channels = {"low": widths_scaled[0], "aux": widths_scaled[1], "out": width}
        self.set_output_stride(output_stride)
        init_convolutions(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.pool(F.relu(self.conv1(x), inplace=True))
        aux = self.pool(F.relu(self.conv2(self.norm(low)), inplace=True))
        x = F.relu(self.conv3(self.norm(aux)), inplace=True)
        x = F.relu(self.conv4(x), inplace=True)
        x = self.pool(F.relu(self.conv5(x), inplace=True))
        x = F.dropout(F.relu(self.fc6(x), inplace=True), self.dropout, self.training)
        x = F.dropout(F.relu(self.fc7(x), inplace=True), self.dropout, self.training)
        return {"low": low, "aux": aux, "out": x}

    def _apply_output_stride(self, output_stride: int) -> None:
        """There is one geometry only."""

    def from_published(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """torchvision's file or Caffe's under our names: fc6 and fc7 as convolutions."""
        layers = [*(f"conv{index}" for index in range(1, 6)), "fc6", "fc7"]
        if self.form == "caffenet":
            ours = renamed_layers(state, dict(zip(layers, layers, strict=True)), leave_out=("fc8",))
            weight, bias = ours.get("conv1.weight"), ours.get("conv1.bias")
            if weight is not None and bias is not None and weight.shape[1] == 3:
                ours["conv1.weight"], ours["conv1.bias"] = fold_caffe_input(weight, bias, self.input_mean, self.input_std)
        else:
            published = [*(f"features.{index}" for index in (0, 3, 6, 8, 10)), "classifier.1", "classifier.4"]
            names = dict(zip(published, layers, strict=True))
            parts = ((key, key.rpartition(".")) for key in state)
            ours = {f"{names.get(layer, layer)}.{kind}": state[key] for key, (layer, _, kind) in parts}
        if "conv1.weight" in ours:
            ours["conv1.weight"] = widen_input(ours["conv1.weight"], self.in_channels)
        return ours | {
            f"{name}.weight": as_convolution(ours[f"{name}.weight"], kernel)
            for name, kernel in (("fc6", 6), ("fc7", 1)) if f"{name}.weight" in ours
        }  # fmt: skip

    def centers(self) -> dict[str, float]:
        """As :meth:`segmodels.backbones.classic.ClassicBackbone.centers`, of ``out`` alone."""
        layers = [self.conv1, self.pool, self.conv2, self.pool, self.conv3, self.conv4, self.conv5, self.pool, self.fc6]
        return {"out": grid_of(layers).center}
