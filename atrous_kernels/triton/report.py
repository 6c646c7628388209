"""``python -m atrous_kernels.triton.report [--output FILE]``: what the kernels need on a GPU, without one.

Every launch of the cases below is compiled ahead of time for each target with the assembler of Triton's wheel.
One row per kernel and target: registers, spilled bytes, shared memory, matrix and asynchronous-copy instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atrous_kernels.problem import ConvProblem, UpsampleProblem
from atrous_kernels.triton import conv2d, upsample_argmax, upsample_cross_entropy
from atrous_kernels.triton.runtime import Launch, interpreting

CAPABILITIES = (80, 90, 100)
# Written in PTX for sm_80 and later, sm_90, sm_100; and what the counts are called in a row.
_INSTRUCTIONS = {
    "mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma",
    "async_copies": r"\bcp\.async\.c[ag]\.",
}  # fmt: skip
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Launches to compile for: ``plan`` makes them on tensors without memory. ``name`` says why the case is there, ``tf32``
    whether float32 may be rounded to TF32."""

    name: str
    op: str
    problem: ConvProblem | UpsampleProblem
    channels_last: bool
    plan: Callable[[], list[Launch]]
    tf32: bool = False


def cases() -> list[Case]:
    """Large and ragged problems of every op, in both layouts and all dtypes."""
    return [*_convolutions(), *_upsamplings()]


def _convolutions() -> Iterator[Case]:
    """Dense, strided, grouped and depthwise, with their two gradients."""
    shapes = {
        "ASPP rate 12": ConvProblem(16, 2048, 256, (33, 33), (3, 3), padding=(12, 12), dilation=(12, 12)),
        "strided": ConvProblem(16, 256, 512, (65, 65), (3, 3), stride=(2, 2), padding=(1, 1)),
        "ragged channels": ConvProblem(2, 21, 42, (97, 97), (3, 3), padding=(4, 4), dilation=(4, 4)),
        "groups": ConvProblem(16, 256, 256, (33, 33), (3, 3), padding=(2, 2), dilation=(2, 2), groups=8),
        "depthwise rate 12": ConvProblem(
            16, 2048, 2048, (33, 33), (3, 3), padding=(12, 12), dilation=(12, 12), groups=2048
        ),
    }
    for name, shape in shapes.items():
        for dtype, channels_last in product((torch.bfloat16, torch.float32), (True, False)):
            problem = replace(shape, dtype=dtype, device_type="cuda", channels_last=channels_last)
            variants = [(problem, False)]
            if name == "ASPP rate 12" and channels_last:
                half = replace(problem, dtype=torch.float16)
                variants.append((problem, True) if dtype is torch.float32 else (half, False))
            for (variant, tf32), (op, plan) in product(variants, _CONVOLUTIONS.items()):
                yield Case(name, op, variant, channels_last, partial(plan, variant), tf32)


def _conv2d(problem: ConvProblem) -> list[Launch]:
    x, weight, _ = _operands(problem)
    bias = torch.empty(problem.out_channels, dtype=problem.dtype, device="meta")
    return conv2d.plan_conv2d(x, weight, bias, *_geometry(problem))[1]


def _conv2d_input(problem: ConvProblem) -> list[Launch]:
    x, weight, grad = _operands(problem)
    return conv2d.plan_conv2d_input(x.shape, weight, grad, *_geometry(problem))[1]


def _conv2d_weight(problem: ConvProblem) -> list[Launch]:
    x, weight, grad = _operands(problem)
    return conv2d.plan_conv2d_weight(x, weight.shape, grad, *_geometry(problem))[1]


_CONVOLUTIONS = {"conv2d": _conv2d, "conv2d_input": _conv2d_input, "conv2d_weight": _conv2d_weight}


def _operands(problem: ConvProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and output gradient."""
    sizes = (
        (problem.batch, problem.in_channels, *problem.in_size),
        (problem.out_channels, problem.in_channels // problem.groups, *problem.kernel),
        (problem.batch, problem.out_channels, *problem.out_size),
    )
    x, weight, grad = (_tensor(size, problem.dtype, problem.channels_last) for size in sizes)
    return x, weight, grad


def _geometry(problem: ConvProblem) -> tuple[Any, ...]:
    return problem.stride, problem.padding, problem.dilation, problem.groups


def _tensor(size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def _upsamplings() -> Iterator[Case]:
    """Loss with gradient, the same with all options, and classes."""
    x16 = UpsampleProblem(16, 21, (33, 33), (513, 513), device_type="cuda")
    x8 = UpsampleProblem(16, 150, (60, 60), (473, 473), device_type="cuda")
    most = replace(x16, batch=2, classes=1024)
    half, brain = torch.float16, torch.bfloat16
    for name, problem, channels_last in (
        ("x16", x16, False), ("x16", replace(x16, dtype=brain), True), ("x16", replace(x16, dtype=half), True),
        ("150 classes", x8, False), ("150 classes", replace(x8, dtype=brain), True), ("1024 classes", most, False),
    ):  # fmt: skip
        for options in (False, True) if problem.dtype is torch.float32 else (False,):
            plan = partial(_upsample_cross_entropy, problem, channels_last, options)
            yield Case(f"{name}, all options" if options else name, "upsample_cross_entropy", problem, channels_last, plan)
        yield Case(name, "upsample_argmax", problem, channels_last, partial(_upsample_argmax, problem, channels_last))


def _upsample_cross_entropy(problem: UpsampleProblem, channels_last: bool, options: bool) -> list[Launch]:
    """``options``: weights, smoothing and hard pixels, which take a pass of their own, with labels of one byte."""
    logits = _tensor((problem.batch, problem.classes, *problem.in_size), problem.dtype, channels_last)
    target = torch.empty((problem.batch, *problem.out_size), dtype=torch.uint8 if options else torch.int64, device="meta")
    whole = dict(mean=True, per_pixel=False, with_gradient=True)
    if not options:
        return upsample_cross_entropy.plan(logits, target, None, None, 255, 0.0, False, **whole)[1]
    weight, scale = logits.new_empty(problem.classes, dtype=torch.float32), target.to(torch.float32)
    losses = dict(mean=False, per_pixel=True, with_gradient=False)
    return (
        upsample_cross_entropy.plan(logits, target, weight, None, 255, 0.1, False, **losses)[1]
        + upsample_cross_entropy.plan(logits, target, weight, scale, 255, 0.1, False, **whole)[1]
    )


def _upsample_argmax(problem: UpsampleProblem, channels_last: bool) -> list[Launch]:
    logits = _tensor((problem.batch, problem.classes, *problem.in_size), problem.dtype, channels_last)
    return upsample_argmax.plan(logits, problem.out_size, False)[1]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compiles a launch for ``capability`` (80 for sm_80), specialised as a call with these arguments would be.

    Raises RuntimeError while Triton interprets: there is nothing to compile then.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(launch.constants), {}
    for position, name in enumerate(launch.kernel.jitted.arg_names):
        value = launch.arguments.get(name)
        specialized = name not in launch.kernel.do_not_specialize
        if name in launch.constants:
            signature[name] = "constexpr"
        elif value is None or (isinstance(value, int) and value == 1 and specialized):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialized:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel.jitted, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread; anything on the stack is a spill, for the kernels keep no arrays.

    Raises RuntimeError with the words of cuobjdump where it reports no kernel.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout))
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"no resource usage reported by {' '.join(command)}: {done.stdout}{done.stderr}")
    return {"registers": int(usage["REG"]), "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"])}


def rows(capabilities: Sequence[int] = CAPABILITIES) -> Iterator[dict[str, Any]]:
    """One row per case, op, kernel and target."""
    for case in cases():
        with _tf32(case.tf32):
            launches = case.plan()
        for launch in launches:
            for capability in capabilities:
                compiled = compile_launch(launch, capability)
                ptx = compiled.asm["ptx"]
                yield {
                    "case": case.name, "problem": str(case.problem), "op": case.op, "kernel": _name(launch),
                    "dtype": str(case.problem.dtype).removeprefix("torch."), "tf32": case.tf32,
                    "channels_last": case.channels_last,
                    "target": f"sm_{capability}", "grid": launch.grid,
                    "warps": launch.num_warps, "stages": launch.num_stages,
                    "blocks": [v for k, v in launch.constants.items() if k.startswith("BLOCK")],
                    "shared_bytes": compiled.metadata.shared, **resources(compiled.asm["cubin"]),
                    **{name: len(re.findall(pattern, ptx)) for name, pattern in _INSTRUCTIONS.items()},
                }  # fmt: skip


def _name(launch: Launch) -> str:
    return f"{launch.kernel.function.__module__.rpartition('.')[2]}.{launch.kernel.name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m atrous_kernels.triton.report", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write JSON here instead of a table to the terminal")
    options = parser.parse_args(arguments)
    import triton

    table = list(rows())
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join("  " + json.dumps(row) for row in table)
        options.output.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
        return 0
    columns = (
        "case", "dtype", "tf32", "channels_last", "kernel", "op", "target",
        "registers", "spill_bytes", "shared_bytes", *_INSTRUCTIONS,
    )  # fmt: skip
    cells = [columns, *(tuple(str(row[column]) for column in columns) for row in table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
