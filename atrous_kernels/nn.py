"""Modules over :mod:`atrous_kernels.functional`, with the state_dict keys of their :mod:`torch.nn` twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels.arguments import check_pyramid
from atrous_kernels.functional import (
    ConvBN,
    aspp,
    conv2d,
    conv_bn_relu,
    psp_conv,
    pyramid_pool,
    upsample_cross_entropy,
)
from atrous_kernels.ops.aspp import check_image_pooling
from atrous_kernels.ops.pyramid_concat import pyramid_concat
from atrous_kernels.sync_batch_norm import count_batch, group_of


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` on our kernels: same arguments, defaults, initialisation, padding modes and state_dict.

    Args:
        backend: as in :func:`atrous_kernels.conv2d`; every other argument as in :class:`torch.nn.Conv2d`.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, backend=self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")


class UpsampleCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of logits ``[N, C, h, w]``, upsampled bilinearly, against labels ``[N, H, W]``.

    Args: those of :func:`atrous_kernels.upsample_cross_entropy`. Like :class:`torch.nn.CrossEntropyLoss`, which it replaces
    together with the upsampling before it, it keeps ``weight`` as a buffer.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        hard_fraction: float = 1.0,
        align_corners: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.hard_fraction, self.align_corners, self.backend = hard_fraction, align_corners, backend

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            hard_fraction=self.hard_fraction,
            align_corners=self.align_corners,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, "
            f"hard_fraction={self.hard_fraction}, align_corners={self.align_corners}"
        )


class PyramidPooling(torch.nn.Module):
    """Pyramid pooling (Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2 and figure 3).

    Input ``[N, in_channels, H, W]``, output ``[N, in_channels + len(bins) * out_channels, H, W]``: the input and, per level,
    its average over a grid of bins, a 1x1 convolution, BatchNorm and ReLU, upsampled bilinearly; in the order of ``bins``.
    Keys are those of the authors' PyTorch code: ``features.LEVEL.1`` (convolution) and ``features.LEVEL.2`` (BatchNorm). The
    submodules hold parameters and settings; their hooks are not called.

    Args:
        out_channels: of each level; the paper has ``in_channels / len(bins)``.
        bins: rows and columns of each level's grid.
        align_corners: of the upsampling; the paper's code has True, most other libraries False.

    Raises:
        ValueError: training with a single value per channel (one image and a level of one bin), which BatchNorm cannot take.
    """

    def __init__(
        self, in_channels: int, out_channels: int, bins: Sequence[int] = (1, 2, 3, 6), *, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.align_corners = align_corners
        self.features = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.AdaptiveAvgPool2d(level),  # says what the level is; all levels are pooled together
                Conv2d(in_channels, out_channels, 1, bias=False),
                torch.nn.BatchNorm2d(out_channels),
                torch.nn.ReLU(inplace=True),
            )
            for level in self.bins
        )

    def levels(self, x: Tensor) -> list[Tensor]:
        """Per level ``[N, out_channels, bin, bin]``, before the upsampling."""
        return self._project(pyramid_pool(x, self.bins))

    def _project(self, levels: list[Tensor]) -> list[Tensor]:
        out = []
        for feature, pooled in zip(self.features, levels, strict=True):
            layers = cast(torch.nn.Sequential, feature)
            conv, norm = cast(Conv2d, layers[1]), cast(torch.nn.BatchNorm2d, layers[2])
            if norm.training and pooled.shape[0] == 1 and pooled.shape[2] * pooled.shape[3] == 1:
                raise ValueError(
                    "training with a batch of 1: BatchNorm of the 1x1 level has one value per channel, so no statistics. Use a "
                    "batch of at least 2 (drop an incomplete last batch), bins without 1, or keep BatchNorm in eval mode"
                )
            out.append(as_one(pooled, conv, norm, norm.bias))
        return out

    def forward(self, x: Tensor) -> Tensor:
        bins = [size for level in check_pyramid(x, self.bins, "avg") for size in level]
        channels = sum(cast(Conv2d, cast(torch.nn.Sequential, feature)[1]).out_channels for feature in self.features)
        return pyramid_concat(x, bins, self._project, channels, self.align_corners, "auto")


class PSPHead(torch.nn.Module):
    """Pyramid pooling, 3x3 convolution, BatchNorm, ReLU, dropout and the classifier: ``[N, in_channels, H, W]`` to logits.

    The convolution over the concatenation runs as :func:`atrous_kernels.psp_conv`: the concatenation is never stored, and its
    pooled half is applied at bin resolution. Keys are those of the authors' PyTorch code: ``ppm`` and ``cls``.

    Args:
        channels: of the 3x3 convolution (512 in the paper).
        bins, align_corners: as in :class:`PyramidPooling`, whose levels have ``in_channels // len(bins)`` channels each.
        dropout: of whole channels, before the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        bins: Sequence[int] = (1, 2, 3, 6),
        *,
        dropout: float = 0.1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        width = max(1, in_channels // len(bins))
        self.ppm = PyramidPooling(in_channels, width, bins, align_corners=align_corners)
        self.cls = torch.nn.Sequential(
            Conv2d(in_channels + len(bins) * width, channels, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels),
            torch.nn.ReLU(inplace=True),
            torch.nn.Dropout2d(dropout),
            Conv2d(channels, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, self.cls[0].weight)
        return self.cls[1:](psp_conv(x, self.ppm.levels(x), weight, align_corners=self.ppm.align_corners))


_ACTIVATIONS = {"relu": torch.nn.ReLU, "relu6": torch.nn.ReLU6, "none": torch.nn.Identity}


class ConvBNReLU(torch.nn.Sequential):
    """Convolution without bias, :class:`torch.nn.BatchNorm2d` and an activation as one op.

    The state_dict is that of ``Sequential(Conv2d(..., bias=False), BatchNorm2d(...), ReLU())``: keys ``0.weight``, ``1.*``. The
    submodules hold parameters and settings; their hooks are not called.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in :class:`torch.nn.Conv2d`.
        eps, momentum: as in :class:`torch.nn.BatchNorm2d` (momentum None: the plain average of all batches).
        activation: ``"relu"``, ``"relu6"`` or ``"none"``.
        sync: statistics of all processes of ``process_group`` (None: of all there are) where torch.distributed is
            initialised, on the CPU too.
        process_group: implies ``sync``.
        backend: as in :func:`atrous_kernels.conv_bn_relu`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "relu",
        sync: bool = False,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: expected one of {', '.join(_ACTIVATIONS)}")
        super().__init__(
            Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False, backend=backend),
            torch.nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum),
            _ACTIVATIONS[activation](),
        )
        self.activation = activation
        self.sync = sync or process_group is not None
        self.process_group = process_group
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        convolution, norm = cast(Conv2d, self[0]), cast(torch.nn.BatchNorm2d, self[1])
        return as_one(input, convolution, norm, norm.bias, self.activation, _group_of(self))


def as_one(
    input: Tensor,
    convolution: Conv2d,
    norm: torch.nn.BatchNorm2d,
    shift: Tensor | None,
    activation: str = "relu",
    process_group: Any = None,
    residual: Tensor | None = None,
    padding: Any = None,
) -> Tensor:
    """The two modules and ``activation`` as :func:`atrous_kernels.conv_bn_relu`.

    ``shift`` stands for the bias of ``norm``, ``padding``, where given, for that of ``convolution``.
    """
    return conv_bn_relu(
        input,
        convolution.weight,
        norm.weight,
        shift,
        norm.running_mean,
        norm.running_var,
        stride=convolution.stride,
        padding=convolution.padding if padding is None else padding,
        dilation=convolution.dilation,
        groups=convolution.groups,
        training=norm.training,
        momentum=count_batch(norm),
        eps=norm.eps,
        activation=activation,
        residual=residual,
        process_group=process_group or group_of(norm),
        backend=convolution.backend,
    )


def _group_of(module: Any) -> Any:
    if not (module.sync and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return module.process_group or torch.distributed.group.WORLD


def conv_bn(layers: Any, first: int = 0) -> ConvBN:
    """``layers[first]`` and ``layers[first + 1]`` as the op takes them."""
    convolution, norm = layers[first], layers[first + 1]
    statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return ConvBN(convolution.weight, *statistics, convolution.dilation, norm.training, count_batch(norm), norm.eps)


class ImagePooling(torch.nn.Sequential):
    """Image-level features (DeepLabv3, section 3.3): global average, 1x1 convolution, BatchNorm, ReLU, spread over the map.

    Input ``[N, C, H, W]``, output ``[N, out_channels, H, W]``, constant over each image.

    Raises:
        ValueError: one image in training, where BatchNorm would have a single value per channel.
    """

    def __init__(self, in_channels: int, out_channels: int, *, backend: str = "auto") -> None:
        super().__init__(
            torch.nn.AdaptiveAvgPool2d(1),
            Conv2d(in_channels, out_channels, 1, bias=False, backend=backend),
            torch.nn.BatchNorm2d(out_channels),
            torch.nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_image_pooling(x.shape[0], self[2].training and group_of(self[2]) is None)
        # Bilinear interpolation of a single pixel is that pixel everywhere.
        return super().forward(x).expand(-1, -1, x.shape[2], x.shape[3])


class ASPP(torch.nn.Module):
    """Atrous spatial pyramid pooling (DeepLabv3, section 3.3) as :func:`atrous_kernels.aspp`, then dropout.

    Branches: 1x1, 3x3 at each rate, image pooling; projection to ``out_channels``. Order and state_dict keys (``convs.*``,
    ``project.*``) are torchvision's. Input ``[N, in_channels, H, W]``, output ``[N, out_channels, H, W]``. The submodules hold
    parameters and settings; their hooks are not called.

    Args:
        rates: of the 3x3 convolutions.
        image_pooling: with the image-level branch.
        dropout: after the projection (torchvision 0.5, the paper's code 0.1).
        sync, process_group, backend: as in :class:`ConvBNReLU`.

    Raises:
        ValueError: rates that are not positive integers, ``out_channels`` below 1; in training, one image with image pooling.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        image_pooling: bool = True,
        *,
        dropout: float = 0.5,
        sync: bool = False,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.rates = tuple(rates)
        if not all(isinstance(rate, int) and rate >= 1 for rate in self.rates):
            raise ValueError(f"rates={self.rates}: expected positive integers, for example (6, 12, 18), or ()")
        if out_channels < 1:
            raise ValueError(f"width of ASPP is {out_channels}: expected a positive integer")
        self.sync = sync or process_group is not None
        self.process_group = process_group
        self.backend = backend
        branches: list[torch.nn.Module] = [self._layer(in_channels, out_channels, 1, 1)]
        branches += [self._layer(in_channels, out_channels, 3, rate) for rate in self.rates]
        if image_pooling:
            branches.append(ImagePooling(in_channels, out_channels, backend=backend))
        self.convs = torch.nn.ModuleList(branches)
        project = self._layer(len(branches) * out_channels, out_channels, 1, 1)
        self.project = torch.nn.Sequential(*project, torch.nn.Dropout(dropout))

    def _layer(self, in_channels: int, out_channels: int, kernel: int, rate: int) -> torch.nn.Sequential:
        return ConvBNReLU(
            in_channels, out_channels, kernel, padding=rate * (kernel // 2), dilation=rate, backend=self.backend,
            sync=self.sync, process_group=self.process_group,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        pooling = self.convs[-1] if isinstance(self.convs[-1], ImagePooling) else None
        local = self.convs if pooling is None else self.convs[:-1]
        if pooling is not None:
            check_image_pooling(x.shape[0], cast(Any, pooling)[2].training and _group_of(self) is None)
        out = aspp(
            x,
            [conv_bn(branch) for branch in local],
            conv_bn(self.project),
            None if pooling is None else conv_bn(pooling, 1),
            process_group=_group_of(self),
            backend=self.backend,
        )
        return self.project[3](out)
