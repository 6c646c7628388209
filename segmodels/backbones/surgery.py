"""Net surgery: published classification weights of the networks before ResNet in the form that the systems need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: mean colour, blue first, 0 to 255, that Caffe's networks subtract; they do not scale
CAFFE_MEAN = (104.00699, 116.66877, 122.67892)
#: names of VGG-16's convolutions in Caffe, in order
VGG16_LAYERS = tuple(f"conv{stage}_{i}" for stage, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1))


def renamed_layers(state: Mapping[str, Tensor], layers: Mapping[str, str], leave_out: Sequence[str] = ()) -> dict[str, Tensor]:
    """Caffe's blobs ``"layer.0"`` and ``"layer.1"`` as ``weight`` and ``bias`` of our modules.

    Args:
        layers: Caffe's name -> ours. A layer that is not among them keeps its name, to be named as unexpected.
        leave_out: layers that have no place here; a name that ends in ``*`` stands for all that begin so.
    """
    ours = {}
    for key, value in state.items():
        layer, _, index = key.rpartition(".")
        if any(layer.startswith(name[:-1]) if name.endswith("*") else layer == name for name in leave_out):
            continue
        if layer in layers and index in ("0", "1"):
            # Old files store a bias as [1, 1, 1, n].
            ours[f"{layers[layer]}.{'weight' if index == '0' else 'bias'}"] = value if index == "0" else value.flatten()
        else:
            ours[key] = value
    return ours


def fold_caffe_input(
    weight: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float], caffe_mean: Sequence[float] = CAFFE_MEAN
) -> tuple[Tensor, Tensor]:
    """The first convolution for images normalised as ``(RGB in [0, 1] - mean) / std`` in place of Caffe's.

    Exact but for the zeros around the image, which stand for ``mean`` afterwards: a colour at most 1.1 of 255 away from Caffe's.
    """
    weight = weight[:, [2, 1, 0]]
    scale = 255 * torch.tensor(std, dtype=weight.dtype)
    shift = 255 * torch.tensor(mean, dtype=weight.dtype) - torch.tensor(caffe_mean[::-1], dtype=weight.dtype)
    return weight * scale[:, None, None], bias + (weight * shift[:, None, None]).sum((1, 2, 3))


def widen_input(weight: Tensor, channels: int) -> Tensor:
    """Further input channels (depth), each with the mean of the filters of the colours (FCN, RGB-D)."""
    extra = channels - weight.shape[1]
    return weight if extra <= 0 else torch.cat([weight, weight.mean(1, keepdim=True).expand(-1, extra, -1, -1)], dim=1)


def as_convolution(weight: Tensor, kernel: int) -> Tensor:
    """A fully connected layer on maps of ``kernel`` x ``kernel`` as a convolution; whatever else it is stays."""
    if (weight.dim() != 2 and weight.shape[:2] != (1, 1)) or weight.shape[-1] % kernel**2:
        return weight
    return weight.reshape(weight.shape[-2], -1, kernel, kernel)


def subsampled(fc6: tuple[Tensor, Tensor], fc7: tuple[Tensor, Tensor], channels: int, kernel: int) -> list[Tensor]:
    """fc6 and fc7 with ``channels`` of their filters, drawn at random, and with every second or third tap of fc6.

    DeepLab v1 (on the field of view): a 7x7 kernel keeps taps 0, 2, 4, 6 as 4x4 and 0, 3, 6 as 3x3. The draw is always the same.

    Returns:
        Weight and bias of fc6, weight and bias of fc7; as they came where they are not two such layers.
    """
    (weight6, bias6), (weight7, bias7) = fc6, fc7
    filters = len(bias6)
    if weight6.dim() != 4 or len(weight6) != filters or weight7.shape != (len(bias7), filters, 1, 1):
        return [weight6, bias6, weight7, bias7]
    if weight6.shape[0] > channels:
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randperm(n, generator=generator)[:channels].sort()[0] for n in (len(bias6), len(bias7)))
        weight6, bias6 = weight6[first], bias6[first]
        weight7, bias7 = weight7[second][:, first], bias7[second]
    if weight6.shape[2] > kernel:
        taps = torch.linspace(0, weight6.shape[2] - 1, kernel).round().long()
        weight6 = weight6[:, :, taps][:, :, :, taps]
    return [weight6, bias6, weight7, bias7]
