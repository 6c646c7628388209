"""Weights in Caffe's ``.caffemodel`` files: the part of Google's protobuf wire format that they need.

The message is NetParameter of caffe.proto; fields that are not weights are skipped. Nothing in such a file is code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Field numbers of caffe.proto.
_LAYERS = {100: (1, 7), 2: (4, 6)}  # of a layer and of its old form (V1): its name and its blobs
_SHAPE, _DIM, _LEGACY_SHAPE = 7, 1, (1, 2, 3, 4)
_DATA, _DOUBLE_DATA = 5, 8


def read_caffemodel(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """``"layer.i"`` for blob ``i`` of every layer that has blobs (0 is the weight, 1 the bias), float32.

    Raises:
        ValueError: not such a file; the message says where it stops making sense.
    """
    source = repr(os.fspath(path))
    found: dict[str, Tensor] = {}
    try:
        for number, value in _fields(memoryview(Path(path).read_bytes())):
            if number not in _LAYERS or not isinstance(value, memoryview):
                continue
            name_field, blob_field = _LAYERS[number]
            parts = list(_fields(value))
            names = [bytes(part).decode() for field, part in parts if field == name_field and isinstance(part, memoryview)]
            blobs = [part for field, part in parts if field == blob_field and isinstance(part, memoryview)]
            if not blobs:
                continue
            if len(names) != 1:
                raise ValueError("a layer with weights has no name")
            for index, blob in enumerate(blobs):
                key = f"{names[0]}.{index}"
                if key in found:
                    raise ValueError(f"two layers are called {names[0]!r}")
                found[key] = _blob(blob, key)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not a readable .caffemodel: {error}") from error
    if not found:
        raise ValueError(f"{source} is not a readable .caffemodel: no layer with weights")
    return found


def _blob(blob: memoryview, key: str) -> Tensor:
    legacy = dict.fromkeys(_LEGACY_SHAPE, 1)
    shape: list[int] | None = None
    values: list[np.ndarray] = []
    for number, value in _fields(blob):
        if number == _SHAPE and isinstance(value, memoryview):
            shape = [n for field, part in _fields(value) if field == _DIM for n in _integers(part)]
        elif number in legacy and isinstance(value, int):
            legacy[number] = value
        elif number in (_DATA, _DOUBLE_DATA) and isinstance(value, memoryview):
            dtype = "<f4" if number == _DATA else "<f8"
            values.append(np.frombuffer(value, dtype).astype(np.float32))  # raises ValueError on a part of a number
    size = list(legacy.values()) if shape is None else shape
    data = np.concatenate(values) if values else np.zeros(0, np.float32)
    if prod(size) != data.size or data.size == 0:
        raise ValueError(f"{key} of shape {size} has {data.size} values")
    return torch.from_numpy(data).reshape(size)


def _integers(value: int | memoryview) -> Iterator[int]:
    if isinstance(value, int):
        yield value
        return
    position = 0
    while position < len(value):
        number, position = _varint(value, position)
        yield number


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: an integer, or its bytes."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if number == 0 or position + length > len(message):
            raise ValueError("it is cut off or not a protobuf message")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError("it is cut off or not a protobuf message")
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
