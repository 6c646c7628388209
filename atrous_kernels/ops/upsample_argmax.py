"""``torch.ops.atrous.upsample_argmax``: the most likely class at full resolution, without full-resolution logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atrous_kernels import dispatch
from atrous_kernels.dispatch import Implementation
from atrous_kernels.ops.conv2d import cuda_can_run, gpu_unmeasured
from atrous_kernels.ops.upsample_cross_entropy import always, cpu_can_run, last_resort, pick
from atrous_kernels.reference import upsample_argmax as reference
from atrous_kernels.reference.upsample_cross_entropy import accumulator
from atrous_kernels.triton import upsample_argmax as triton

_library = torch.library.Library("atrous", "FRAGMENT")
_library.define("upsample_argmax(Tensor logits, SymInt[2] size, bool align_corners, str backend) -> Tensor")


def _argmax(logits: Tensor, size: Sequence[int], align_corners: bool, backend: str) -> Tensor:
    return pick("upsample_argmax", backend, logits, size).run(logits, list(size), align_corners)


for _key in ("CPU", "CUDA"):
    _library.impl("upsample_argmax", _argmax, _key)


@torch.library.register_fake("atrous::upsample_argmax", lib=_library)
def _fake(logits, size, align_corners, backend):
    return logits.new_empty([logits.shape[0], *size], dtype=torch.int64)


upsample_argmax = torch.ops.atrous.upsample_argmax.default


def _native(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return torch.ops.atrous_native.upsample_argmax(logits.to(accumulator(logits.dtype)), size, align_corners)


def _framework(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    logits = logits.to(accumulator(logits.dtype))
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners).argmax(1)


dispatch.register(
    "upsample_argmax",
    [
        Implementation("cpu", _native, cpu_can_run, always),
        Implementation("triton", triton.upsample_argmax, triton.can_run, gpu_unmeasured),
        Implementation("cuda", _native, cuda_can_run, gpu_unmeasured),
        Implementation("torch", _framework, always, always),
        Implementation("reference", reference.upsample_argmax, always, last_resort),
    ],
)
