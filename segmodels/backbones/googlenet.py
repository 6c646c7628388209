"""GoogLeNet (Szegedy et al., "Going Deeper with Convolutions", 2015, table 1) as FCN uses it.

Two forms: the paper's, as Caffe publishes it, and torchvision's, which has BatchNorm, 3x3 kernels where the paper has 5x5, and a
last pool of 2x2. Keys are torchvision's; the auxiliary classifiers are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d
from segmodels.backbones.base import conv_bn
from segmodels.backbones.classic import ClassicBackbone, grid_of, init_convolutions
from segmodels.backbones.surgery import fold_caffe_input, renamed_layers, widen_input

#: 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | pool projection
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
FORMS = ("caffe", "torchvision")


class BasicConv2d(nn.Module):
    """Convolution and ReLU; with BatchNorm between them in torchvision's form, which then has no bias."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, *, norm: bool
    ) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel, stride, padding, bias=not norm)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x), inplace=True) if self.bn is None else conv_bn(self.conv, self.bn, x)


class Inception(nn.Module):
    """Figure 2(b): 1x1, 3x3 and 5x5 convolutions and a 3x3 max pool side by side."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], *, norm: bool) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        kernel = 3 if norm else 5
        self.branch1 = BasicConv2d(in_channels, one, 1, norm=norm)
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, reduce3, 1, norm=norm), BasicConv2d(reduce3, three, 3, padding=1, norm=norm)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, reduce5, 1, norm=norm),
            BasicConv2d(reduce5, five, kernel, padding=kernel // 2, norm=norm),
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), BasicConv2d(in_channels, pool, 1, norm=norm))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class GoogLeNet(ClassicBackbone):
    """GoogLeNet: ``low`` is conv3 (stride 4), ``aux`` inception4e (stride 16), ``out`` inception5b (stride 32).

    Args:
        output_stride: 32, and no other.
        form: ``"caffe"`` or ``"torchvision"``.
        average_pool: the classifier's 7x7 average, at stride 1 and with zeros around; FCN (section 4.1) leaves it out.
        first_padding: of the first convolution. The published network has 3; 100 lets maps of one pixel through.
        in_channels, width_mult: as :class:`segmodels.backbones.vgg.VGG16`.

    Raises:
        ValueError: an argument outside these.
    """

    output_strides = (32,)
    classifier_prefixes = ("fc.", "aux1.", "aux2.")

    def __init__(
        self,
        output_stride: int = 32,
        form: str = "caffe",
        *,
        average_pool: bool = False,
        first_padding: int = 100,
        in_channels: int = 3,
        width_mult: float = 1.0,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}")
        if not width_mult > 0:
            raise ValueError(f"width_mult={width_mult}: expected a positive number")
        norm = form == "torchvision"
        if norm:  # torchvision's own module brings its input to this
            self.input_mean = self.input_std = (0.5, 0.5, 0.5)
        self.form, self.in_channels = form, in_channels

        def scaled(width: int) -> int:
            return max(1, round(width * width_mult))

        stem, channels = scaled(64), scaled(192)
        self.conv1 = BasicConv2d(in_channels, stem, 7, 2, first_padding, norm=norm)
        self.conv2 = BasicConv2d(stem, stem, 1, norm=norm)
        self.conv3 = BasicConv2d(stem, channels, 3, padding=1, norm=norm)
        self.channels = {"low": channels}
        for name, published in INCEPTIONS.items():
            widths = tuple(scaled(width) for width in published)
            setattr(self, f"inception{name}", Inception(channels, widths, norm=norm))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
            if name == "4e":
                self.channels["aux"] = channels
        self.channels["out"] = channels
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.last_pool = nn.MaxPool2d(2, 2, ceil_mode=True) if norm else self.pool
        self.norm = nn.Identity() if norm else nn.LocalResponseNorm(5, 1e-4, 0.75)
        self.average_pool = nn.AvgPool2d(7, 1, 3) if average_pool else nn.Identity()
        self.set_output_stride(output_stride)
        init_convolutions(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.norm(self.conv3(self.conv2(self.norm(self.pool(self.conv1(x))))))
        x = self.pool(low)
        aux = x
        for name in INCEPTIONS:
            x = getattr(self, f"inception{name}")(x)
            if name == "4e":
                aux = x
                x = self.last_pool(x)
            elif name == "3b":
                x = self.pool(x)
        return {"low": low, "aux": aux, "out": self.average_pool(x)}

    def _apply_output_stride(self, output_stride: int) -> None:
        """There is one geometry only."""

    def from_published(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Caffe's file under our names, which are torchvision's."""
        if self.form == "torchvision":
            ours = dict(state)
        else:
            ours = renamed_layers(state, _caffe_layers(), leave_out=("loss1*", "loss2*", "loss3*"))
        weight, bias = ours.get("conv1.conv.weight"), ours.get("conv1.conv.bias")
        if weight is not None and weight.shape[1] == 3:
            if bias is not None and self.form == "caffe":
                weight, ours["conv1.conv.bias"] = fold_caffe_input(weight, bias, self.input_mean, self.input_std)
            ours["conv1.conv.weight"] = widen_input(weight, self.in_channels)
        return ours

    def centers(self) -> dict[str, float]:
        """As :meth:`segmodels.backbones.classic.ClassicBackbone.centers`, of ``out`` alone; the inceptions are centred."""
        layers = [self.conv1.conv, self.pool, self.conv3.conv, self.pool, self.pool, self.last_pool, self.average_pool]
        return {"out": grid_of(layers).center}


def _caffe_layers() -> dict[str, str]:
    """Caffe's names -> ours."""
    branches = {"1x1": "branch1", "3x3_reduce": "branch2.0", "3x3": "branch2.1", "5x5_reduce": "branch3.0",
                "5x5": "branch3.1", "pool_proj": "branch4.1"}  # fmt: skip
    layers = {"conv1/7x7_s2": "conv1.conv", "conv2/3x3_reduce": "conv2.conv", "conv2/3x3": "conv3.conv"}
    for name in INCEPTIONS:
        layers |= {f"inception_{name}/{theirs}": f"inception{name}.{ours}.conv" for theirs, ours in branches.items()}
    return layers
