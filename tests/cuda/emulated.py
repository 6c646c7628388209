"""Builds the CUDA sources for the host (see ``csrc/include/emulation/cuda.h``) and calls them on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atrous_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc" / "cuda").glob("*_ops.cpp"))
TORCH = Path(torch.__file__).parent
STABLE_ABI = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Few blocks per launch: each then takes several pieces of work, as on a GPU only beyond 2^31 pieces. And few tiles are enough
# for the large ones.
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    *WARNINGS,
    "-DATROUS_MAX_BLOCKS=5",
    "-DATROUS_ENOUGH_TILES=2",
    f"-I{ROOT / 'csrc'}",
    f"-I{ROOT / 'csrc/include'}",
]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SCHEDULES = {"ascending": 0, "descending": 1, "shuffled": 2}


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def compile_library(name: str, sources: Sequence[Path], flags: Sequence[str] = (), link: Sequence[str] = ()) -> Path:
    """Compiles ``sources`` into a shared library, once per content, and returns its path."""
    cxx = compiler()
    assert cxx is not None
    headers = [path for folder in ("csrc/cuda", "csrc/include", "csrc/ops") for path in (ROOT / folder).rglob("*.h")]
    digest = hashlib.sha256(" ".join([cxx, *FLAGS, *flags, *link]).encode())
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"atrous_emulation_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:

            def compile_one(source: Path) -> str:
                target = f"{scratch}/{source.name}.o"
                subprocess.run([cxx, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", target], check=True)
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, sources))
            linked = f"{scratch}/linked.so"
            subprocess.run([cxx, "-shared", *objects, *link, "-o", linked], check=True)
            os.replace(linked, library)  # complete or absent, also with several test processes
    return library


# Makes a library report every memory access to the emulation's checkers (csrc/include/emulation/access_hooks.h).
CHECKED = ["-fsanitize=thread"]
ACCESS_HOOKS = Path(__file__).with_name("access_hooks.cpp")


@cache
def kernel_library(checked: bool = False) -> Path:
    """The emulated kernels and their C entry points."""
    sources = [*KERNELS, Path(__file__).with_name("emulated.cpp")]
    if checked:
        return compile_library("kernels_checked", [*sources, ACCESS_HOOKS], CHECKED)
    return compile_library("kernels", sources)


@cache
def binding_library(checked: bool = False) -> Path:
    """The stable-ABI binding of the emulated kernels, which registers their ops for CPU tensors."""
    name = "atrous_checked" if checked else "atrous_emulated"
    return compile_library(
        name,
        [*BINDINGS, Path(__file__).with_name("binding_on_host.cpp")],
        [*STABLE_ABI, f"-DATROUS_NAMESPACE={name}", "-DATROUS_DISPATCH_KEY=CPU"],
        ["-Wl,-Bsymbolic", str(kernel_library(checked)), f"-L{TORCH / 'lib'}", "-ltorch_cpu"],
    )


@cache
def ops(checked: bool = False) -> Any:
    """``torch.ops.atrous_emulated``, or ``torch.ops.atrous_checked``, whose kernels report every access to the checkers."""
    torch.ops.load_library(str(binding_library(checked)))
    return torch.ops.atrous_checked if checked else torch.ops.atrous_emulated


@contextmanager
def as_cuda_backend(*names: str) -> Iterator[None]:
    """Within the block, ``backend="cuda"`` and ``"tensor_core"`` of these ops run the emulated kernels on CPU tensors."""
    native, implementations = torch.ops.atrous_native, dispatch._implementations
    before = {name: implementations[name] for name in names}
    dispatch.forget()
    torch.ops.atrous_native = ops()
    for name in names:
        implementations[name] = [
            replace(one, can_run=lambda problem: None) if one.name in ("cuda", "tensor_core") else one for one in before[name]
        ]
    try:
        yield
    finally:
        torch.ops.atrous_native = native
        implementations.update(before)
        dispatch.forget()


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(kernel_library()))
    for function in (library.emulated_conv2d, library.emulated_conv2d_input, library.emulated_conv2d_weight):
        function.restype = ctypes.c_char_p
    library.emulated_conv2d_weight_workspace.restype = ctypes.c_int64
    return library


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.data_ptr(), (ctypes.c_int64 * 4)(*tensor.stride()))


def out_size(size: Sequence[int], weight: Sequence[int], stride: Any, padding: Any, dilation: Any) -> list[int]:
    """The shape of conv2d's result."""
    extents = [(size[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return [size[0], weight[0], *extents]


def _shape(size: Sequence[int], weight: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    numbers = [*size, *out_size(size, weight, stride, padding, dilation)[1:], *weight[2:]]
    return (ctypes.c_int64 * 16)(*numbers, *stride, *padding, *dilation, groups)


def poisoned(size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """What an output is before a kernel writes it: NaN, which no right result contains."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(list(size), dtype=dtype, memory_format=layout).fill_(float("nan"))


def schedule(kind: str, seed: int = 0) -> None:
    """The order in which the emulated threads of a block run between barriers."""
    _library().emulated_schedule(SCHEDULES[kind], seed)


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any, depthwise: bool = False, out: Tensor
) -> Tensor:
    """``geometry``: stride, padding, dilation (pairs) and groups. Writes and returns ``out``."""
    shape = _shape(input.shape, weight.shape, *geometry)
    data = None if bias is None else ctypes.c_void_p(bias.data_ptr())
    tensors = [ctypes.byref(_Tensor(tensor)) for tensor in (input, weight, out)]
    arguments = (shape, ctypes.c_int64(DTYPES[input.dtype]), int(depthwise), *tensors[:2], data, tensors[2])
    _check(_library().emulated_conv2d(*arguments))
    return out


def conv2d_input(weight: Tensor, grad_output: Tensor, *geometry: Any, depthwise: bool = False, out: Tensor) -> Tensor:
    shape = _shape(out.shape, weight.shape, *geometry)
    tensors = [ctypes.byref(_Tensor(tensor)) for tensor in (weight, grad_output, out)]
    _check(_library().emulated_conv2d_input(shape, ctypes.c_int64(DTYPES[weight.dtype]), int(depthwise), *tensors))
    return out


def conv2d_weight(input: Tensor, grad_output: Tensor, *geometry: Any, depthwise: bool = False, out: Tensor) -> Tensor:
    shape = _shape(input.shape, out.shape, *geometry)
    dtype = ctypes.c_int64(DTYPES[input.dtype])
    size = _library().emulated_conv2d_weight_workspace(shape, dtype, int(depthwise))
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN in every floating-point type
    tensors = [ctypes.byref(_Tensor(tensor)) for tensor in (input, grad_output, out)]
    data = ctypes.c_void_p(workspace.data_ptr())
    _check(_library().emulated_conv2d_weight(shape, dtype, int(depthwise), *tensors, data))
    return out
