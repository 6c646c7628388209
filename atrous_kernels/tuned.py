"""The measured table that automatic choice follows on the CPU: per bucket of problems, what each implementation took.

``tuned/cpu_<instruction set>.json`` is written by ``python -m benchmarks.tune`` and shipped. Nothing is measured at run time;
where the table has no bucket for a problem, the rules and the cost model of the op decide.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from atrous_kernels import dispatch, native
from atrous_kernels.problem import ConvProblem
from atrous_kernels.tables import FOLDER, nearest


def bucket(problem: ConvProblem) -> str:
    """Problems that are alike: channels to the nearest power of two, pixels to the nearest power of four, ..."""
    kind = "depthwise" if problem.is_depthwise else "grouped" if problem.groups > 1 else "dense"
    height, width = problem.out_size
    return " ".join(
        (
            str(problem.dtype).removeprefix("torch."),
            "nhwc" if problem.channels_last else "nchw",
            f"{kind} {problem.kernel[0]}x{problem.kernel[1]}",
            f"stride {max(problem.stride)}",
            "rate 1" if max(problem.dilation) == 1 else "rate 2+",
            f"{nearest(problem.in_channels, 2)}->{nearest(problem.out_channels, 2)}",
            f"{nearest(problem.batch * height * width, 4)} pixels",
            f"valid {round(problem.valid_share * 5) / 5:.1f}",
            "1 thread" if problem.threads == 1 else "2+ threads",
        )
    )


@cache
def table() -> dict[str, dict[str, dict[str, float]]]:
    """Per op and bucket the milliseconds of each implementation.

    An instruction set that nobody has measured takes the table of the strongest one that somebody has.
    """
    introspect = native.introspect()
    paths = sorted(FOLDER.glob("cpu_*.json"))
    if introspect is None or not paths:
        return {}
    own = FOLDER / f"cpu_{introspect.selected_isa()}.json"
    found: dict[str, Any] = json.loads((own if own in paths else paths[-1]).read_text())
    return found["milliseconds"]


def verdict(op: str, problem: ConvProblem, name: str) -> tuple[bool, str | None]:
    """Whether the table knows the problem; and why ``name`` loses, or None where it was the fastest."""
    measured = table().get(op, {}).get(bucket(problem), {})
    if dispatch.precision_mode() == "ieee":
        measured = {other: time for other, time in measured.items() if other != "winograd"}
    if name not in measured:
        return False, None
    best = min(measured, key=measured.__getitem__)
    if best == name:
        return True, None
    return True, f"took {measured[name] / measured[best]:.2f} times as long as {best} on a problem like this"
