"""Problems of upsample_cross_entropy and their answers by the framework's two operators in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# Losses are of order 1 to 10, gradients are compared relative to the largest. float32: positions between pixels, counted up
# to a few hundred, are rounded to 2**-24 of themselves, which moves logits by up to 1e-5; a gradient sums up to a thousand
# pixels. 16-bit: the same arithmetic on the same rounded logits, and the gradient is rounded once (2**-8, 2**-11).
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def case_of(**changes: Any) -> dict[str, Any]:
    base = dict(n=2, c=5, size=(4, 5), out=(19, 22), align_corners=False, weighted=False, options={})
    return base | changes


CASES = {
    "plain": case_of(),
    "corners": case_of(align_corners=True),
    "weights": case_of(weighted=True),
    "smoothing": case_of(options=dict(label_smoothing=0.1)),
    "weights and smoothing": case_of(weighted=True, options=dict(label_smoothing=0.3), align_corners=True),
    "hard pixels": case_of(options=dict(hard_fraction=0.3)),
    "hard pixels of all kinds": case_of(weighted=True, options=dict(hard_fraction=0.37, label_smoothing=0.1)),
    "sum": case_of(weighted=True, options=dict(reduction="sum")),
    "none": case_of(weighted=True, options=dict(reduction="none", label_smoothing=0.1)),
    "none, hard pixels": case_of(options=dict(reduction="none", hard_fraction=0.5)),
    "sum, hard pixels": case_of(options=dict(reduction="sum", hard_fraction=0.01)),
    "21 classes, x16": case_of(c=21, size=(5, 5), out=(80, 81)),
    "150 classes": case_of(n=1, c=150, size=(3, 4), out=(12, 33)),
    "one class": case_of(c=1),
    "one pixel": case_of(size=(1, 1), out=(70, 67)),
    "to one pixel": case_of(out=(1, 1), align_corners=True),
    "same size": case_of(out=(4, 5)),
    "smaller": case_of(size=(20, 31), out=(7, 9)),
    "tall, then narrow": case_of(size=(2, 40), out=(90, 11)),
    "another ignored label": case_of(options=dict(ignore_index=3)),
    "empty batch": case_of(n=0, options=dict(reduction="sum")),
}


def operands(case: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor, dict[str, Any]]:
    logits = (torch.randn(case["n"], case["c"], *case["size"], dtype=torch.float64) * 3).to(DEVICE, dtype)
    target = torch.randint(0, case["c"], (case["n"], *case["out"]), device=DEVICE)
    ignored = case["options"].get("ignore_index", 255)
    target[torch.rand(target.shape, device=DEVICE) < 0.2] = ignored
    if case["n"] > 1:
        target[1, : case["out"][0] // 2] = ignored  # whole rows, too
    options = dict(case["options"], align_corners=case["align_corners"])
    if case["weighted"]:
        options["weight"] = torch.rand(case["c"], device=DEVICE) + 0.1
    return logits.contiguous(memory_format=layout), target, options


def in_float64(logits: Tensor, target: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The framework's operators in float64; hard pixels by a full sort."""
    options = dict(options)
    corners, fraction, reduction = (options.pop(k, d) for k, d in (("align_corners", False), ("hard_fraction", 1.0), ("reduction", "mean")))  # fmt: skip  # noqa: E501
    weight = options.pop("weight", None)
    weight = None if weight is None else weight.double()
    options.setdefault("ignore_index", 255)
    x = logits.detach().double().requires_grad_()
    z = F.interpolate(x, size=list(target.shape[1:]), mode="bilinear", align_corners=corners) if x.numel() else x.sum() + x.new_zeros(0, x.shape[1], *target.shape[1:])  # fmt: skip  # noqa: E501
    if fraction == 1:
        loss = F.cross_entropy(z, target, weight, reduction=reduction, **options)
    else:
        pixel = F.cross_entropy(z, target, weight, reduction="none", **options)
        counted = (target != options["ignore_index"]).flatten()
        order = pixel.detach().flatten().masked_fill(~counted, -1).sort(descending=True, stable=True).indices
        kept = torch.zeros_like(counted)
        kept[order[: math.ceil(fraction * int(counted.sum()))]] = True
        pixel = pixel * kept.view_as(pixel)
        total = pixel.sum()
        labels = target.flatten()[kept]
        divisor = labels.numel() if weight is None else weight[labels].sum()
        loss = {"none": pixel, "sum": total, "mean": total / divisor}[reduction]
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64, device=DEVICE).view_as(loss)
    return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]
