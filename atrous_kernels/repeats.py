"""Eager calls like one before: what was checked and chosen then holds again.

Between the kernels of a network the caches have lost the Python code beside them, so that a check costs several times what a
loop over it shows. A call is known by all that checks and choices look at: dtypes, sizes and strides of its tensors, the other
arguments, the number of threads and the process-wide modes. Only calls that nothing observes (see
:mod:`atrous_kernels.observers`) may be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch
from atrous_kernels.ops.conv2d import is_dense

#: Far more than a network has layers; a stream of images of all sizes stays bounded.
LIMIT = 4096


def as_they_are(*tensors: Tensor) -> bool:
    """Whether kernels read such tensors without a copy. Strides do not tell whether complex ones are conjugated."""
    return all(not t.is_complex() and is_dense(t) for t in tensors)


def signature(tensors: tuple[Tensor | None, ...], *arguments: Any) -> tuple[Any, ...]:
    """What such a call is known by; ``arguments`` beside tensors have to be hashable."""
    kinds = [None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors]
    return (*kinds, *arguments, torch.get_num_threads(), dispatch.default_backend(), dispatch.precision_mode())


def known(key: tuple[Any, ...]) -> Any:
    """What was kept for the key, if anything; None for arguments that are no key, such as lists."""
    try:
        return dispatch.repeats.get(key)
    except TypeError:
        return None


def keep(key: tuple[Any, ...], call: Any) -> None:
    """Keeps ``call`` for calls of this key."""
    if len(dispatch.repeats) >= LIMIT:
        dispatch.repeats.clear()
    try:
        dispatch.repeats[key] = call
    except TypeError:
        return
