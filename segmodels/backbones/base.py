"""What every backbone shares: the output contract, and the change of output stride in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atrous_kernels.functional import conv2d
from atrous_kernels.nn import Conv2d, as_one
from atrous_kernels.sync_batch_norm import SyncBatchNorm2d

#: Of a network that reduces by 32 on its own; further stages allow more.
OUTPUT_STRIDES = (4, 8, 16, 32)


class Geometry(NamedTuple):
    """How one block runs: ``stride`` and ``first_rate`` of its strided convolution, ``rate`` of those after it."""

    stride: int
    first_rate: int
    rate: int


class Backbone(nn.Module):
    """A classification network without its classifier.

    ``forward`` returns ``{"low": [N, c, H/4, W/4], "aux": [N, c, ...], "out": [N, c, H/output_stride, W/output_stride]}``
    (sizes rounded up); the channel counts are in ``channels``. ``"aux"`` are the features before the last stage. Backbones that
    FCN takes skips from have ``"mid"`` as well, the stage between ``"low"`` and ``"aux"``.

    Attributes:
        channels: ``{"low": int, "aux": int, "out": int}``.
        in_channels: of the input; three for a colour image.
        output_stride: 4, 8, 16 or 32; change it with :meth:`set_output_stride`.
        output_strides: those it can have.
        input_mean, input_std: of the normalisation ``(x - mean) / std`` of RGB in [0, 1] under which its published weights
            were trained.
        classifier_prefixes: keys of a published classification file that have no place here.
    """

    channels: dict[str, int]
    in_channels: int = 3
    output_stride: int = 32
    output_strides: tuple[int, ...] = OUTPUT_STRIDES
    input_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    input_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    classifier_prefixes: tuple[str, ...] = ()

    def set_output_stride(self, output_stride: int) -> None:
        """Run the stages beyond ``output_stride`` densely, with rates in place of their strides. Weights are untouched.

        A block whose stride is removed keeps the rate in force before it in its strided convolution, since that convolution
        still reads the map it was trained on; everything after it doubles its rate. So the features at the positions that
        the strided network keeps are the same numbers (DeepLabv3, section 3.1; the convention of torchvision).

        Raises:
            ValueError: ``output_stride`` is not one of ``output_strides``.
        """
        if output_stride not in self.output_strides:
            raise ValueError(f"output_stride={output_stride!r}: expected one of {', '.join(map(str, self.output_strides))}")
        self._apply_output_stride(output_stride)
        self.output_stride = output_stride

    def from_published(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A published classification file under our names; here, they are the file's."""
        return state

    def _apply_output_stride(self, output_stride: int) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not define how it changes its output stride")


def plan_geometry(native_strides: Sequence[int], stem_stride: int, output_stride: int) -> Iterator[Geometry]:
    """Geometry per block when no more than ``output_stride`` of ``stem_stride * prod(native_strides)`` may be strided."""
    stride_so_far, rate = stem_stride, 1
    for native in native_strides:
        first_rate = rate
        if stride_so_far * native <= output_stride:
            stride_so_far *= native
            yield Geometry(native, first_rate, rate)
        else:
            rate *= native
            yield Geometry(1, first_rate, rate)


def set_geometry(conv: nn.Conv2d, stride: int, rate: int) -> None:
    """Set stride and rate of an odd-sized kernel in place, with the zeros that keep it centred."""
    conv.stride = (stride, stride)
    conv.dilation = (rate, rate)
    conv.padding = (rate * (conv.kernel_size[0] - 1) // 2, rate * (conv.kernel_size[1] - 1) // 2)


def scaled_width(width: int, multiplier: float, divisor: int = 8) -> int:
    """``width * multiplier`` rounded to a multiple of ``divisor``, never below 90 % of it (the MobileNets' rule)."""
    scaled = width * multiplier
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


class SamePaddedConv2d(Conv2d):
    """Convolution with TensorFlow's ``SAME`` zeros, for weights that were trained with them.

    At stride 1, and at stride 2 on an odd size, these are the centred zeros of :func:`set_geometry`. At stride 2 on an even
    size there is one zero less, taken from the top and the left, so that windows start one pixel later. The
    geometry must be set with :func:`set_geometry`: its zeros are the starting point.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self.padded(input)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, backend=self.backend)

    def padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input with the zeros that are not symmetric, and the symmetric ones that are left to do."""
        # SAME on an even size at stride 2 starts the windows one pixel later. The op only knows symmetric zeros: it gets
        # the front's, and the missing ones behind are written out.
        shift_h, shift_w = ((n - 1) % s for n, s in zip(input.shape[2:], self.stride, strict=True))
        # A graph for every size cannot branch on whether this one is even; there, a pad by nothing is the price.
        if self.stride == (1, 1) or not (torch.compiler.is_compiling() or shift_h or shift_w):
            return input, cast("tuple[int, int]", self.padding)
        centred_h, centred_w = cast("tuple[int, int]", self.padding)
        return F.pad(input, (0, shift_w, 0, shift_h)), (centred_h - shift_h, centred_w - shift_w)


def conv_bn(
    convolution: nn.Module, norm: nn.Module, x: Tensor, activation: str = "relu", residual: Tensor | None = None
) -> Tensor:
    """Convolution, BatchNorm, sum with ``residual``, ``activation`` (``"relu"``, ``"relu6"`` or ``"none"``), as one op.

    Modules with hooks and convolutions of another class run one by one, so that nothing is skipped.
    """
    hooked = convolution._forward_hooks or convolution._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks
    known = type(convolution) in (Conv2d, SamePaddedConv2d) and type(norm) in (nn.BatchNorm2d, SyncBatchNorm2d)
    ours = known and convolution.bias is None
    frozen = not norm.training and torch.is_grad_enabled()  # there, folding would cost every step
    if hooked or frozen or not ours:
        y = norm(convolution(x))
        y = y if residual is None else y + residual
        return y if activation == "none" else F.relu(y, inplace=True) if activation == "relu" else F.relu6(y, inplace=True)
    convolution, norm = cast(Conv2d, convolution), cast(nn.BatchNorm2d, norm)
    x, padding = convolution.padded(x) if isinstance(convolution, SamePaddedConv2d) else (x, convolution.padding)
    return as_one(x, convolution, norm, norm.bias, activation, residual=residual, padding=padding)


class ConvBN(nn.Sequential):
    """A Sequential that runs every convolution with the BatchNorm, and the ReLU or ReLU6, behind it by :func:`conv_bn`."""

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            if len(layers) == 1 or not isinstance(layers[1], nn.BatchNorm2d):
                input = layers.pop(0)(input)
                continue
            convolution, norm, *layers = layers
            kind = type(layers[0]) if layers and not layers[0]._forward_hooks else None
            activation = "relu" if kind is nn.ReLU else "relu6" if kind is nn.ReLU6 else "none"
            layers = layers[1:] if activation != "none" else layers
            input = conv_bn(convolution, norm, input, activation)
        return input
