"""``python -m atrous_kernels``: what this machine can run, what is missing and what that costs.

With an op and a shape it explains the choice of implementation, or models the launches on a GPU that need not be there:
``python -m atrous_kernels explain conv2d --input 1,2048,33,33 --weight 256,2048,3,3 --padding 12 --dilation 12``
``python -m atrous_kernels plan conv2d --input 16,2048,33,33 --weight 256,2048,3,3 --padding 12 --dilation 12 --gpu h200``
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import replace
from importlib import metadata, util

import torch

import atrous_kernels
from atrous_kernels import dispatch, native, simulate
from atrous_kernels.arguments import describe
from atrous_kernels.gpus import GPUS

_OPS = ("conv2d", "conv2d_input", "conv2d_weight")


def report() -> str:
    """One line per thing that decides what runs here."""
    introspect = native.introspect()
    lines = [
        ("atrous_kernels", atrous_kernels.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    if introspect is None:
        lines.append(("build facts", "the introspection module was not built"))
    else:
        facts = introspect.build_facts()
        lines.append(("CPU features", ", ".join(introspect.cpu_features()) or "none beyond the baseline"))
        lines.append(("instruction set", f"{introspect.selected_isa()} (built: {', '.join(facts['isas'])})"))
        lines.append(("built with", f"{facts['compiler']}, {facts['build_type']}"))
        lines.append(("CUDA built for", ", ".join(facts["cuda_archs"]) or "not built"))
    missing = native.cpu_missing()
    lines.append(("CPU library", missing or f"loaded from {native.LIBRARY_DIR}"))
    if missing:
        lines.append(("", "without it every CPU call runs on the framework's own convolution: right, but nothing is faster"))
    lines.append(("CUDA library", native.cuda_missing() or "loaded"))
    lines.append(("Triton", metadata.version("triton") if util.find_spec("triton") else "not installed; pip install triton"))
    lines.append(("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that this torch can use"))
    return "\n".join(f"{name:<16} {value}" for name, value in lines)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of integers") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m atrous_kernels", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command")
    explain = commands.add_parser("explain", help="which implementation runs an op of a given shape, and why not the others")
    plan = commands.add_parser("plan", help="the launches of an op of a given shape, modelled without a GPU")
    for command, dtype in ((explain, "float32"), (plan, "bfloat16")):
        command.add_argument("op", choices=_OPS if command is explain else (*_OPS, "aspp"))
        command.add_argument("--input", type=_numbers, required=True, help="sizes N,C,H,W")
        command.add_argument("--weight", type=_numbers, required=True, help="sizes O,C/groups,kh,kw")
        command.add_argument("--stride", type=_numbers, default=[1])
        command.add_argument("--padding", type=_numbers, default=[0])
        command.add_argument("--dilation", type=_numbers, default=[1])
        command.add_argument("--groups", type=int, default=1)
        command.add_argument("--dtype", default=dtype, choices=["float32", "float64", "bfloat16", "float16"])
    explain.add_argument("--channels-last", action="store_true")
    explain.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    explain.add_argument("--backend", default="auto")
    plan.add_argument("--backend", default="triton", choices=["triton", "tensor_core"])
    plan.add_argument("--contiguous", action="store_true", help="instead of channels-last")
    plan.add_argument("--rates", type=_numbers, default=[6, 12, 18], help="of an ASPP's branches beside its 1x1; default 6,12,18")
    plan.add_argument("--gpu", default="h200", choices=sorted(GPUS))
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.command is None:
        print(report())
        return 0
    channels_last = args.channels_last if args.command == "explain" else not args.contiguous
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype = getattr(torch, args.dtype)
    geometry = (args.stride, args.padding, args.dilation, args.groups)
    try:
        for name, sizes in (("--input", args.input), ("--weight", args.weight)):
            if len(sizes) != 4 or min(sizes) < 0:
                raise ValueError(f"{name} {sizes}: expected four sizes, none negative")
        # The explanation needs sizes and strides, not memory.
        input, weight = (torch.empty(s, dtype=dtype, device="meta", memory_format=layout) for s in (args.input, args.weight))
        problem = describe(input, weight, None, *geometry)
        if args.command == "explain":
            print(dispatch.explain(args.op, replace(problem, device_type=args.device), args.backend))
        else:
            problem = replace(problem, device_type="cuda")
            print(simulate.describe(args.op, problem, GPUS[args.gpu], args.rates, args.backend))
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
