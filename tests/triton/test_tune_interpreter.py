"""The tuner's measured path, with the kernels interpreted and the clock replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import interpreted
import torch

from atrous_kernels.problem import ConvProblem, UpsampleProblem

SMALL = ConvProblem(1, 16, 32, (9, 7), (3, 3), padding=(4, 4), dilation=(4, 4), dtype=torch.float16, channels_last=True)


def test_only_right_configurations_are_timed(interpret: Callable[..., Any]) -> None:
    good, uneven = (32, 16, 16, 4, 3), (24, 16, 16, 4, 3)  # blocks are powers of two: Triton refuses the other
    totals, reasons, verdict = interpret(interpreted.tuned, SMALL, [(), good, uneven])
    assert totals == {(): 3.0, good: 3.0}  # a second for each of three ops
    assert list(reasons) == [str(list(uneven))]
    assert "1x16->32 9x7" in reasons[str(list(uneven))]
    assert verdict == f"1 of {32 * 9 * 7} values differ from the reference"


def test_every_kind_of_kernel_gets_an_entry(interpret: Callable[..., Any]) -> None:
    """Beside the convolutions: each runs rightly under another configuration, which is written where it is faster."""
    dtype = torch.float16
    configs = {
        "aspp": (32, 16, 16, 4, 3), "passes": (16, 8, 8), "pooling": (4, 4, 8), "psp_conv": (16, 16, 16, 8), "upsample": (64, 8),
    }  # fmt: skip
    logits = UpsampleProblem(1, 5, (3, 2), (9, 10), dtype, "cuda")
    pyramid = replace(SMALL, in_size=(4, 3), dilation=(1, 1), padding=(1, 1))
    found = interpret(interpreted.tuned_kinds, dtype, pyramid, logits, configs)
    assert {name.split()[0] for name in found} == set(configs)
    assert {" ".join(name.split()[2:4]) for name in found if name.startswith(("passes", "pooling"))} == {
        "sums vectors", "maps vectors", "pool average", "spread average",
    }  # fmt: skip
    for name, (row, rejected) in found.items():
        assert rejected == {}, name
        assert row is not None
        assert tuple(row["config"]) == configs[name.split()[0]]
