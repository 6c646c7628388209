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
from atrous_kernels.triton import (
    aspp,
    conv2d,
    conv_bn_act,
    conv_bn_relu,
    psp_conv,
    pyramid_pool,
    upsample_argmax,
    upsample_cross_entropy,
)
from atrous_kernels.triton.epilogue import Epilogue
from atrous_kernels.triton.runtime import Blocks, Launch, compiling_for, interpreting

CAPABILITIES = (80, 90, 100)
# Written in PTX for sm_80 and later, sm_90, sm_100; and what the counts are called in a row.
_INSTRUCTIONS = {
    "mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma",
    "async_copies": r"\bcp\.async\.c[ag]\.", "block_copies": r"\bcp\.async\.bulk\.tensor",
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
    problem: str
    dtype: torch.dtype
    channels_last: bool
    plan: Callable[[], list[Launch]]
    tf32: bool = False


_ALL = ((torch.bfloat16, torch.float32), (True, False))  # dtypes, channels-last
# Of these the two that differ most: matrix instructions on whole vectors, and exact products of scattered elements.
_FARTHEST = ((torch.bfloat16, True), (torch.float32, False))


def cases() -> list[Case]:
    """Large and ragged problems of every op, in both layouts and all dtypes."""
    return [*_convolutions(), *_training_and_inference(), *_pyramids(), *_upsamplings()]


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
        for dtype, channels_last in product(*_ALL) if name == "ASPP rate 12" else _FARTHEST:
            problem = replace(shape, dtype=dtype, device_type="cuda", channels_last=channels_last)
            variants = [(problem, False)]
            if name == "ASPP rate 12" and channels_last:
                half = replace(problem, dtype=torch.float16)
                variants.append((problem, True) if dtype is torch.float32 else (half, False))
            for (variant, tf32), (op, plan) in product(variants, _CONVOLUTIONS.items()):
                yield Case(name, op, str(variant), variant.dtype, channels_last, partial(plan, variant), tf32)


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


def _training_and_inference() -> Iterator[Case]:
    """Convolutions with epilogues and statistics, alone and all branches of ASPP, and the passes beside them."""
    dense = ConvProblem(16, 2048, 256, (33, 33), (3, 3), padding=(12, 12), dilation=(12, 12))
    depthwise = replace(dense, out_channels=2048, groups=2048)
    for dtype, channels_last in _FARTHEST:
        for name, shape in (("ASPP rate 12", dense), ("depthwise rate 12", depthwise)):
            problem = replace(shape, dtype=dtype, device_type="cuda", channels_last=channels_last)
            of = (str(problem), dtype, channels_last)
            yield Case(f"{name}, residual", "conv_bn_act", *of, partial(_conv_bn_act, problem))
            yield Case(name, "conv2d_statistics", *of, partial(_conv2d_statistics, problem))
            if problem.groups == 1:
                yield Case("ASPP", "aspp_branches_act", *of, partial(_aspp, problem, training=False))
                yield Case("ASPP", "aspp_branches", *of, partial(_aspp, problem, training=True))
                yield Case("passes", "conv_bn_relu", *of, partial(_passes, problem))


def _vectors(count: int, channels: int) -> list[Tensor]:
    return [torch.empty(channels, dtype=torch.float32, device="meta") for _ in range(count)]


def _conv_bn_act(problem: ConvProblem) -> list[Launch]:
    x, weight, residual = _operands(problem)
    arguments = (x, weight, _vectors(4, problem.out_channels), residual, 1e-5, 0.0, 6.0)
    return conv_bn_act.plan_conv_bn_act(*arguments, *_geometry(problem))[1]


def _conv2d_statistics(problem: ConvProblem) -> list[Launch]:
    return conv_bn_relu.plan_conv2d_statistics(*_operands(problem)[:2], *_geometry(problem))[1]


def _aspp(problem: ConvProblem, training: bool) -> list[Launch]:
    """A 1x1 branch and 3x3 branches of rates 6, 12 and 18."""
    x, weight, _ = _operands(problem)
    weights = [_tensor((*weight.shape[:2], 1, 1), problem.dtype, problem.channels_last), weight, weight, weight]
    mean, moment, gain, bias = _vectors(4, 4 * problem.out_channels)
    finished = Epilogue(bias, mean, moment, gain, 1e-5, low=0.0)
    epilogue = Epilogue(statistics=(mean, moment)) if training else finished
    return aspp.plan_aspp_branches(x, weights, [(1, 1), (6, 6), (12, 12), (18, 18)], epilogue)[1]


def _passes(problem: ConvProblem) -> list[Launch]:
    """What a training step does beside its convolutions."""
    grad = _operands(problem)[2]
    x, out = torch.empty_like(grad), torch.empty_like(grad)
    mean, scale, shift, slope, offset = _vectors(5, problem.out_channels)
    low, high = 0.0, float("inf")
    return [
        *conv_bn_relu.plan_batch_norm_statistics(x)[1],
        *conv_bn_relu.plan_batch_norm_act(x, mean, scale, shift, low, high, out),
        *conv_bn_relu.plan_batch_norm_act_sums(grad, x, mean, scale, shift, low, high)[1],
        *conv_bn_relu.plan_batch_norm_act_input(grad, x, mean, scale, shift, slope, offset, low, high)[1],
    ]


def _pyramids() -> Iterator[Case]:
    """Pooling and its gradient, averages and maxima, and the pooled half of the convolution behind it."""
    bins, size = [1, 1, 2, 2, 3, 3, 6, 6], (16, 2048, 60, 60)
    for (dtype, channels_last), maximum in product(_FARTHEST, (False, True)):
        problem = f"16x2048x60x60 to 1x1, 2x2, 3x3, 6x6, {'maximum' if maximum else 'average'}, {str(dtype).split('.')[1]}"
        of = ("PSPNet", "pyramid_pool", problem, dtype, channels_last)
        yield Case(*of, partial(_pyramid_pool, _tensor(size, dtype, channels_last), bins, maximum, channels_last))
    for dtype, channels_last in _FARTHEST:
        problem = f"1x1, 2x2, 3x3, 6x6 by 3x3 taps to 16x512x60x60, {str(dtype).split('.')[1]}"
        of, x = ("PSPNet", "psp_conv", problem, dtype, channels_last), _tensor((16, 512, 60, 60), dtype, channels_last)
        yield Case(*of, partial(_add_upsampled, x, 9 * sum(b * b for b in bins[::2])))


def _add_upsampled(x: Tensor, terms: int) -> list[Launch]:
    rows, columns = (torch.empty(size, terms, device="meta") for size in x.shape[2:])
    return psp_conv.plan_add_upsampled(x, x.new_empty(x.shape[0], terms, x.shape[1]), rows, columns)[1]


def _pyramid_pool(x: Tensor, bins: Sequence[int], maximum: bool, channels_last: bool) -> list[Launch]:
    (out, index), launches = pyramid_pool.plan_pyramid_pool(x, bins, maximum)
    return [*launches, *pyramid_pool.plan_pyramid_pool_input(out, index, x.shape, bins, maximum, channels_last)[1]]


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
        of = (str(problem), problem.dtype, channels_last)
        for options in (False, True) if problem.dtype is torch.float32 else (False,):
            plan = partial(_upsample_cross_entropy, problem, channels_last, options)
            yield Case(f"{name}, all options" if options else name, "upsample_cross_entropy", *of, plan)
        yield Case(name, "upsample_argmax", *of, partial(_upsample_argmax, problem, channels_last))


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
        elif isinstance(value, Blocks):
            signature[name] = f"tensordesc<{_POINTERS[value.tensor.dtype][1:]}[{', '.join(map(str, value.block))}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialized:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel.jitted, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


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
    """One row per case, op, kernel and target.

    Exact float32 has no matrix instructions, so for sm_100 one case of every kernel and op is enough.
    """
    seen = set()
    for case in cases():
        exact = case.dtype is torch.float32 and not case.tf32
        for capability in capabilities:
            with _tf32(case.tf32), compiling_for(capability):
                launches = case.plan()
            for launch in launches:
                if exact and capability == 100:
                    if (launch.kernel, case.op) in seen:
                        continue
                    seen.add((launch.kernel, case.op))
                compiled = compile_launch(launch, capability)
                ptx = compiled.asm["ptx"]
                yield {
                    "case": case.name, "problem": case.problem, "op": case.op, "kernel": _name(launch),
                    "dtype": str(case.dtype).removeprefix("torch."), "tf32": case.tf32,
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
