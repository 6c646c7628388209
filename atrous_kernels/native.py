"""Finds and loads the compiled libraries; says what is missing and how to get it.

``libatrous_cpu.so`` registers the op schemas of ``torch.ops.atrous_native`` and the CPU kernels; ``libatrous_cuda.so`` adds
the CUDA kernels and is loaded only where the framework itself has CUDA. ``ATROUS_LIBRARY_DIR`` names another folder to take
them from, for a sanitized build for instance.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

LIBRARY_DIR = Path(os.environ.get("ATROUS_LIBRARY_DIR") or Path(__file__).parent / "_lib")
_HOW = "run `pip install --no-build-isolation .` in the source tree with a C++20 compiler, CMake and Ninja installed"


@cache
def cpu_missing() -> str | None:
    """None where the CPU library is loaded, else the reason and the remedy.

    Raises RuntimeError where ATROUS_LIBRARY_DIR names a folder without it: who asks for a library by name means that one.
    """
    missing = _load(LIBRARY_DIR / "libatrous_cpu.so", _HOW)
    if missing and os.environ.get("ATROUS_LIBRARY_DIR"):
        raise RuntimeError(f"ATROUS_LIBRARY_DIR={LIBRARY_DIR}: expected a folder with libatrous_cpu.so, but {missing}")
    return missing


@cache
def cuda_missing() -> str | None:
    """None where the CUDA library is loaded, else the reason and the remedy."""
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA device"
    return cpu_missing() or _load(LIBRARY_DIR / "libatrous_cuda.so", f"{_HOW}, nvcc on the PATH and ATROUS_CUDA=ON set")


def _load(path: Path, remedy: str) -> str | None:
    if not path.exists():
        return f"{path.name} was not built; {remedy}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}); {remedy}"
    return None


@cache
def introspect() -> ModuleType | None:
    """The small pybind11 module with build facts, CPU features and the planner, or None where it was not built."""
    try:
        return importlib.import_module("atrous_kernels._introspect")
    except ImportError:
        return None
