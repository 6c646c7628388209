"""The Triton kernels of pyramid pooling, executed by Triton's interpreter, against the framework in float64."""

from __future__ import annotations

from collections.abc import Sequence

import interpreted
import pytest
import torch
import torch.nn.functional as F
from conftest import Interpret
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels.reference import pyramid_pool as reference
from atrous_kernels.triton.pyramid_pool import LARGEST_CELL, plan_of

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# The interpreter takes a few milliseconds for a program, of which every cell and bin has one: few of them.
PROBLEMS = {
    "PSPNet": ((1, 5, 6, 6), (1, 2, 3, 6)),
    "bins that do not divide": ((2, 3, 5, 7), (1, 2, 3)),
    "long stretches": ((1, 3, 40, 21), (1,)),
    "blocks of channels": ((1, 130, 2, 3), (2,)),
    "finer than the map": ((1, 5, 2, 3), (5, 2)),
    "pairs": ((1, 9, 5, 4), ((2, 3), (1, 4))),
    "one pixel": ((2, 4, 1, 1), (1, 3)),
    "one channel": ((2, 1, 5, 20), (1, 2)),
    "empty batch": ((0, 4, 6, 6), (1, 2)),
}
# Averages of a few hundred unit normals err by less than 1e-6 in float32; 16-bit results are rounded once, and the interpreter
# cuts bfloat16 off: 2**-7, and 2**-11 for float16, relative.
TOLERANCE = {
    torch.float32: dict(rtol=1e-5, atol=1e-6),
    torch.bfloat16: dict(rtol=8e-3, atol=1e-5),
    torch.float16: dict(rtol=1e-3, atol=1e-5),
}
# float32 runs everything; the other dtypes differ in loads and in the rounding of results only.
RUNS = [(name, torch.float32) for name in PROBLEMS]
RUNS += [("bins that do not divide", dtype) for dtype in (torch.bfloat16, torch.float16)]


def _truth(x: Tensor, bins: Sequence, mode: str, grads: list[Tensor]) -> list[Tensor]:
    x = x.double().requires_grad_()
    pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
    levels = [pool(x, level) for level in bins]
    return [*levels, *torch.autograd.grad(levels, x, [g.double() for g in grads])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_against_float64(interpret: Interpret, name: str, mode: str, dtype: torch.dtype, layout: str) -> None:
    size, bins = PROBLEMS[name]
    # The maximum of small integers has ties, and its gradients are exact.
    x = torch.randn(size) if mode == "avg" else torch.randint(-3, 4, size).float()
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    levels = [level if isinstance(level, tuple) else (level, level) for level in bins]
    grads = [torch.randint(-2, 3, (*size[:2], *level)).to(dtype) for level in levels]
    results = interpret(interpreted.public, "pyramid_pool", [x], dict(bins=bins, mode=mode), 1, grads)
    for ours, theirs in zip(results[:-1], _truth(x, bins, mode, grads), strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.double(), theirs.detach(), **TOLERANCE[dtype])
    assert results[-2].stride() == x.stride() or x.numel() == 0
    if name != "pairs":
        return
    again = interpret(interpreted.public, "pyramid_pool", [x], dict(bins=bins, mode=mode), 1, grads)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True)), "the same inputs, other bits"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinities_and_nan(interpret: Interpret, layout: str) -> None:
    # The first maximum wins, and a NaN wins over everything: the last one, in the order of reading.
    x = torch.randint(-1, 2, (2, 6, 4, 20)).float()
    x[0, 0] = -torch.inf
    x[0, 1, 2:4, 3:7] = torch.inf
    x[1, 2:5, 3, ::3] = torch.nan
    x = x.contiguous(memory_format=LAYOUTS[layout])
    values, index = interpret(interpreted.call, "pyramid_pool", "pyramid_pool", x, [1, 1, 2, 2], True)
    begin = 0
    for level in (1, 2):
        expected, at = F.adaptive_max_pool2d(x, level, return_indices=True)
        here = slice(begin, begin + level * level)
        begin = here.stop
        torch.testing.assert_close(values[:, here].transpose(1, 2), expected.flatten(2), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(index[:, here].transpose(1, 2), at.flatten(2))


@pytest.mark.parametrize("maximum", [False, True])
def test_any_strides(interpret: Interpret, maximum: bool) -> None:
    wide = torch.full((4, 10, 8, 10), torch.nan)
    wide[::2, ::2, ::2, ::2] = torch.randint(-3, 4, (2, 5, 4, 5)).float()
    for x in (wide[::2, ::2, ::2, ::2], torch.ones(1, 1, 4, 5).expand(2, 3, 4, 5)):
        ours = interpret(interpreted.call, "pyramid_pool", "pyramid_pool", x, [1, 1, 2, 2], maximum)
        dense = interpret(interpreted.call, "pyramid_pool", "pyramid_pool", x.contiguous(), [1, 1, 2, 2], maximum)
        for a, b in zip(ours, dense, strict=True):
            torch.testing.assert_close(a, b)
    grad = torch.randint(-2, 3, (1, 1, 3)).float().expand(2, 5, 3)
    arguments = (grad, dense[1], [2, 3, 4, 5], [1, 1, 2, 2], False, True)
    ours = interpret(interpreted.call, "pyramid_pool", "pyramid_pool_input", *arguments)
    torch.testing.assert_close(ours, reference.pyramid_pool_input(*arguments))


@pytest.mark.parametrize("size", [(60, 60), (713, 21), (5, 3)])
def test_every_pixel_is_in_one_cell_and_bins_are_whole_cells(size: tuple[int, int]) -> None:
    bins = (1, 1, 2, 3, 6, 6, 7, 4)
    plan = plan_of(size, bins, torch.device("cpu"))
    seen = torch.zeros(size, dtype=torch.int32)
    for row, col, rows, cols, _, _ in plan.cells.t().tolist():
        assert 1 <= rows <= LARGEST_CELL
        assert 1 <= cols <= LARGEST_CELL
        seen[row : row + rows, col : col + cols] += 1
    assert torch.equal(seen, torch.ones_like(seen))
    areas = plan.cells[2] * plan.cells[3]
    for begin, count, pixels in plan.bins.t().tolist():
        assert int(areas[plan.cells_of[0, begin : begin + count].long()].sum()) == pixels


def test_opcheck_and_second_derivatives(interpret: Interpret) -> None:
    interpret(interpreted.opcheck_pyramid)


def test_explain_names_the_reason() -> None:
    reasons = {choice.name: choice.reason for choice in ak.explain("pyramid_pool", torch.empty(2, 8, 6, 6)).choices}
    assert "compiles for CUDA devices, not for cpu" in reasons["triton"]
