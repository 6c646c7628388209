"""Weights in the form that a CPU kernel reads, kept for the next call.

A weight that is used twice without having changed is prepared once and kept as long as the tensor lives, in inference as in
training with frozen layers. It is known by its object, its version counter, and, because writes through ``.data`` pass that
counter by, by a fingerprint of its memory that is taken on every use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

CACHE_BYTES = 1 << 30


class _Known(NamedTuple):
    version: int
    fingerprint: int
    prepared: Tensor | None


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def prepared(weight: Tensor, form: tuple[Any, ...], prepare: Callable[[], Tensor]) -> Tensor | None:
    """``weight`` in this form from the second use on; None on the first, when the kernel had better do it for itself.

    Args:
        form: names the form; a weight may be kept in several.
        prepare: makes the tensor of that form from ``weight`` as it is now.
    """
    version = -1 if weight.is_inference() else weight._version
    uses = _known.setdefault(weight, {})
    key = (weight.data_ptr(), *form)
    known = uses.get(key)
    if known is None or known.version != version:
        for other in [k for k, use in uses.items() if k[0] != key[0] or use.version != version]:
            del uses[other]  # of another version, or of memory that the tensor has left
        uses[key] = _Known(version, 0, None)
        return None
    fingerprint = torch.ops.atrous_native.fingerprint(weight)
    if known.prepared is None or known.fingerprint != fingerprint:
        made = prepare()
        if cached_bytes() + made.nbytes > CACHE_BYTES:
            return made
        known = uses[key] = _Known(version, fingerprint, made)
    return known.prepared


def cached_bytes() -> int:
    """Bytes of prepared weights that are kept."""
    return sum(known.prepared.nbytes for uses in _known.values() for known in uses.values() if known.prepared is not None)


def forget() -> None:
    """Drops every prepared weight."""
    _known.clear()
