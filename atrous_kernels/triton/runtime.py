"""What the Triton files share with the host: kernels compiled on first use, launches as data, and who can run.

Nothing here imports Triton before a kernel is first launched, so that the package works, and explains itself, without it.
"""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from atrous_kernels.problem import ConvProblem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Pixels are numbered in 32 bits (elements are addressed in 64); the margin lets the last tile run past the end.
MAX_PIXELS = 2**31 - 2**16
MAX_GROUPS = 65535  # the grid's second and third axes end here


class Kernel:
    """A Triton kernel or device function; ``triton.jit`` is applied on first use.

    By then ``TRITON_INTERPRET`` has its final value and Triton is known to be wanted. The globals of the function are
    copied with the real ``tl`` and with the jitted form of every other kernel it names.
    """

    def __init__(self, function: Callable[..., Any], do_not_specialize: Sequence[str] = ()) -> None:
        self.function = function
        self.do_not_specialize = tuple(do_not_specialize)

    def __call__(self, *arguments: Any) -> Any:
        """Within another kernel's body, where the jitted form stands in this one's place."""
        raise TypeError(f"{self.name} is called by kernels only: launch it through a Launch")

    @property
    def name(self) -> str:
        return self.function.__name__

    @cached_property
    def jitted(self) -> Any:
        import triton
        import triton.language

        function = self.function
        names = {name: value.jitted for name, value in function.__globals__.items()
                 if isinstance(value, Kernel) and name in function.__code__.co_names}  # fmt: skip
        copy = types.FunctionType(function.__code__, {**function.__globals__, "tl": triton.language, **names})
        copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
        copy.__annotations__, copy.__kwdefaults__ = function.__annotations__, function.__kwdefaults__
        copy.__defaults__, copy.__doc__ = function.__defaults__, function.__doc__
        return triton.jit(copy, do_not_specialize=self.do_not_specialize)


def kernel(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorator that makes a :class:`Kernel`; the named integer arguments do not cause new compilations."""
    return lambda function: Kernel(function, do_not_specialize)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data: run it, or compile it ahead of time (:mod:`atrous_kernels.triton.report`)."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles it with. Products are fused into sums, which is no longer the default after Triton 3.9."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Blocks:
    """A dense row-major matrix that a kernel loads block by block through a tensor descriptor: one thread starts the copy of a
    whole block, and nobody computes addresses."""

    tensor: Tensor
    shape: tuple[int, int]
    block: tuple[int, int]

    def descriptor(self) -> Any:
        """As Triton takes it."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(self.tensor, list(self.shape), [self.shape[1], 1], list(self.block))


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Runs the launches in order on the current stream of ``device``."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            if min(launch.grid) > 0:
                given = launch.arguments.items()
                arguments = {name: value.descriptor() if isinstance(value, Blocks) else value for name, value in given}
                launch.kernel.jitted[launch.grid](**arguments, **launch.constants, **launch.options)


_target = 80  # what plans for tensors on no GPU are for


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Plans made inside for tensors on no GPU are for ``capability`` (90 for sm_90)."""
    global _target
    before, _target = _target, capability
    try:
        yield
    finally:
        _target = before


def copies_blocks(device: torch.device) -> bool:
    """Whether the device copies blocks through tensor descriptors: compute capability 9.0 or newer."""
    if interpreting():
        return True
    if device.type != "cuda":
        return _target >= 90
    return torch.cuda.get_device_capability(device) >= (9, 0)


def interpreting() -> bool:
    """Whether Triton runs its kernels in the Python interpreter (``TRITON_INTERPRET=1``), on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    """None where Triton kernels run on such a device and with such a dtype, else the reason why not."""
    if device_type != "cuda" and not interpreting():
        return f"compiles for CUDA devices, not for {device_type} (TRITON_INTERPRET=1 interprets it there)"
    if dtype not in DTYPES:
        return f"{dtype} is not one of {', '.join(map(str, DTYPES))}: sums are kept in float32"
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if device_type == "cuda" and not interpreting():
        return _device_too_old()
    return None


def can_run(problem: ConvProblem) -> str | None:
    """None where the Triton kernels can compute ``problem`` and its gradients, else the reason why not."""
    for name, (height, width) in (("input", problem.in_size), ("output", problem.out_size)):
        if problem.batch * height * width > MAX_PIXELS:
            return f"{problem.batch} x {height} x {width} {name} pixels are more than {MAX_PIXELS}"
    if problem.groups > MAX_GROUPS and problem.groups != problem.in_channels:
        return f"{problem.groups} groups are more than {MAX_GROUPS}"
    return unavailable(problem.device_type, problem.dtype)


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] is None: importing it was forbidden
        return False


def _device_too_old() -> str | None:
    if not torch.cuda.is_available():
        return "the framework sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return None


def dot_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: "tf32" for float32 where ``torch.backends.cuda.matmul`` allows it, else "ieee".

    The flag of the matrix products decides, not the one of the cuDNN convolutions: its default is the exact one.
    """
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype is torch.float32 and tf32 else "ieee"


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``value``, within ``[least, most]``."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def new_tensor(size: Sequence[int], like: Tensor, *others: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An unwritten tensor, by default of the dtype of ``like``; channels-last if any of the given tensors is (the framework's
    rule)."""
    last = any(x.stride(1) == 1 and x.stride(3) >= x.shape[1] and x.shape[1:].numel() > 1 for x in (like, *others))
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(size), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """The element strides of a four-dimensional tensor as kernel arguments."""
    return {f"{name}_{axis}": stride for axis, stride in zip("nchw", tensor.stride(), strict=True)}
