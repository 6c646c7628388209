"""Measured launch configurations, per GPU model: the blocks, warps and stages of the convolution kernels.

``tuned/gpu_<model>.json`` is written by ``python -m atrous_kernels.tune`` and shipped. A GPU without a table of its own takes
that of the model with the same compute capability (so that what fits one fits the other) whose number of multiprocessors is
nearest. Where there is none, and for problems that a table lacks, the rule in the kernel's file decides. Nothing is measured at
run time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atrous_kernels.tables import FOLDER, nearest

Config = tuple[int, ...]
RULE: Config = ()  # stands for what the kernel's file says

# What the tuner has put in place of rule and table, and where it listens to what is asked for.
_used: dict[str, Config] = {}
_heard: list[tuple[str, str]] | None = None


def choose(kind: str, tensor: Tensor, how: str, sizes: Sequence[int], rule: Config) -> Config:
    """The configuration of a kernel that reads ``tensor``: the tuner's, the table's, else ``rule``.

    ``how`` names what else the code of the kernel depends on; ``sizes`` are those of the product.
    """
    measured = table(tensor.device) if tensor.is_cuda else {}
    if not measured and not _used and _heard is None:
        return rule
    key = f"{str(tensor.dtype).removeprefix('torch.')} {how} {'x'.join(str(nearest(size, 2)) for size in sizes)}"
    if _heard is not None:
        _heard.append((kind, key))
    return _used.get(kind, measured.get(kind, {}).get(key, RULE)) or rule


@contextmanager
def use(kind: str, config: Config) -> Iterator[None]:
    """Within the block, kernels of this kind take ``config`` and no table. For the tuner: not for several threads."""
    _used[kind] = config
    try:
        yield
    finally:
        del _used[kind]


@contextmanager
def listen() -> Iterator[list[tuple[str, str]]]:
    """Collects the (kind, key) of every configuration that is asked for within the block."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before


@cache
def table(device: torch.device) -> dict[str, dict[str, Config]]:
    """Per kind of kernel and key the configuration measured to be best on such a GPU; empty where none was."""
    properties = torch.cuda.get_device_properties(device)
    path = nearest_table(
        properties.name, (properties.major, properties.minor), properties.multi_processor_count, sorted(FOLDER.glob("gpu_*.json"))
    )
    if path is None:
        return {}
    kernels: dict[str, Any] = json.loads(path.read_text())["kernels"]
    return {kind: {key: tuple(row["config"]) for key, row in rows.items()} for kind, rows in kernels.items()}


def nearest_table(name: str, capability: tuple[int, int], multiprocessors: int, paths: Sequence[Path]) -> Path | None:
    """The table to use on a GPU, of those at ``paths``."""
    found = []
    for path in paths:
        gpu = json.loads(path.read_text())["gpu"]
        if tuple(gpu["capability"]) == capability:
            found.append((gpu["name"] != name, abs(gpu["multiprocessors"] - multiprocessors), path))
    return min(found)[2] if found else None
