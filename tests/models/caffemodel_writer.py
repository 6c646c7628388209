"""Writes ``.caffemodel`` files: protobuf messages by hand, in the present form of layers and in the old one."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from torch import Tensor


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def blob(value: Tensor, *, old: bool = False, form: str = "packed") -> bytes:
    """``form``: floats packed, floats one by one, or doubles packed."""
    values = value.flatten().tolist()
    if old:
        shape = b"".join(number(i, n) for i, n in enumerate([1] * (4 - value.dim()) + list(value.shape), 1))
    else:
        shape = message(7, message(1, b"".join(varint(n) for n in value.shape)))
    if form == "packed":
        data = message(5, struct.pack(f"<{len(values)}f", *values))
    elif form == "single":
        data = b"".join(varint(5 << 3 | 5) + struct.pack("<f", v) for v in values)
    else:
        data = message(8, struct.pack(f"<{len(values)}d", *values))
    return shape + data


def network(layers: Mapping[str, Sequence[Tensor]], *, old: bool = False, form: str = "packed") -> bytes:
    """NetParameter: a name, a layer without weights, ``layers``, each with fields that are of no interest."""
    out = message(1, b"net") + number(5, 1) + message(100, message(1, b"relu") + message(2, b"ReLU"))
    for name, blobs in layers.items():
        name_field, blob_field, layer_field = (4, 6, 2) if old else (1, 7, 100)
        content = message(name_field, name.encode()) + (number(5, 4) if old else message(2, b"Convolution"))
        content += b"".join(message(blob_field, blob(value, old=old, form=form)) for value in blobs)
        content += varint(20 << 3 | 1) + bytes(8) + varint(21 << 3 | 5) + bytes(4)  # fixed64 and fixed32
        out += message(layer_field, content)
    return out
