"""The tuner's measured path, with the kernels interpreted and the clock replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import interpreted
import torch

from atrous_kernels.problem import ConvProblem

SMALL = ConvProblem(1, 16, 32, (9, 7), (3, 3), padding=(4, 4), dilation=(4, 4), dtype=torch.float16, channels_last=True)


def test_only_right_configurations_are_timed(interpret: Callable[..., Any]) -> None:
    good, uneven = (32, 16, 16, 4, 3), (24, 16, 16, 4, 3)  # blocks are powers of two: Triton refuses the other
    totals, reasons, verdict = interpret(interpreted.tuned, SMALL, [(), good, uneven])
    assert totals == {(): 3.0, good: 3.0}  # a second for each of three ops
    assert list(reasons) == [str(list(uneven))]
    assert "1x16->32 9x7" in reasons[str(list(uneven))]
    assert verdict == f"1 of {32 * 9 * 7} values differ from the reference"
