"""``python -m benchmarks.plan``: the launch plans of the GPU benchmarks' problems, modelled. Writes plan_model.json.

A model (:mod:`atrous_kernels.simulate`), never a measurement; a test holds the file against the launchers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from atrous_kernels import tensor_core_plan
from atrous_kernels.gpu_model import Work
from atrous_kernels.gpus import GPUS
from atrous_kernels.problem import ConvProblem
from atrous_kernels.simulate import OPS, branch_launches, floor, launches, pyramid, simulate
from atrous_kernels.triton.runtime import Launch
from benchmarks.bench_conv2d import gpu_cases
from benchmarks.report import RESULTS

PATH = RESULTS / "plan_model.json"


def problems() -> dict[str, ConvProblem]:
    """The dense and depthwise convolutions of the GPU benchmarks, channels-last."""
    found = {}
    for case in gpu_cases():
        padding, groups = case.rate * (case.kernel - 1) // 2, case.in_channels if case.depthwise else 1
        found[str(case).rpartition(" ")[0]] = ConvProblem(
            case.batch, case.in_channels, case.out_channels, (case.size,) * 2, (case.kernel,) * 2, (case.stride,) * 2,
            (padding,) * 2, (case.rate,) * 2, groups, case.dtype, "cuda", True,
        )  # fmt: skip
    return found


def plans() -> Iterator[tuple[str, str, list[ConvProblem], list[Launch] | list[Work]]]:
    """(name, op, what is computed, launches): those of Triton, then those of the CUDA kernels for tensor cores."""
    found = problems()
    for name, problem in found.items():
        for op in OPS:
            yield name, op, [problem], launches(op, problem)
    name, base = next((name, problem) for name, problem in found.items() if name.startswith("ASPP"))
    branches = pyramid(base, (6, 12, 18))
    yield f"{name.partition(' rate ')[0]} rates 6/12/18 and 1x1 bfloat16", "aspp", branches, branch_launches(branches)
    for name, problem in found.items():
        if problem.groups == 1:
            for op in OPS:
                yield name, op, [problem], tensor_core_plan.works(op, problem)


def rows() -> Iterator[dict[str, Any]]:
    """One row per launch; numbers rounded to what a model can mean."""
    for name, op, computed, planned in plans():
        for launch in planned:
            models = {key: simulate(launch, gpu) for key, gpu in GPUS.items()}
            one = models["h200"]
            yield {
                "case": name, "op": op, "kernel": one.kernel, "blocks": one.blocks, "programs": one.programs,
                "valid_gflop": round(one.valid_flops / 1e9, 3), "executed_gflop": round(one.executed_flops / 1e9, 3),
                "gpus": {
                    key: {
                        "waves": round(model.waves, 2), "balance": round(model.balance, 3),
                        "makespan_us": round(model.makespan * 1e6, 1), "mean_us": round(model.mean * 1e6, 1),
                        "longest_first_us": round(model.longest_first * 1e6, 1),
                        "memory_us": round(model.memory_seconds * 1e6, 1), "modelled_us": round(model.seconds * 1e6, 1),
                        "floor_us": round(floor(GPUS[key], *computed) * 1e6, 1),
                    }
                    for key, model in models.items()
                },
            }  # fmt: skip


def text() -> str:
    """The file."""
    names = {key: gpu.name for key, gpu in GPUS.items()}
    lines = ",\n".join(" " + json.dumps(row) for row in rows())
    return f'{{"times": "modelled, not measured", "gpus": {json.dumps(names)}, "rows": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    PATH.write_text(text())
    print(f"wrote {PATH}")
