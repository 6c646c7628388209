"""The convolutions on tensor cores, executed on the host: matrix fragments, asynchronous copies and all, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import emulated
import pytest
import resources
import torch
from emulated import out_size
from test_cuda_conv2d import ROUNDOFF, numbers, virtual
from torch import Tensor
from torch.nn.functional import conv2d as framework_conv2d
from torch.nn.grad import conv2d_input as framework_conv2d_input
from torch.nn.grad import conv2d_weight as framework_conv2d_weight

import atrous_kernels as ak
from atrous_kernels import simulate, tensor_core_plan
from atrous_kernels.gpus import GPUS
from atrous_kernels.problem import ConvProblem

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What is multiplied: TF32 keeps 10 bits of the mantissa, the 16-bit types all they have.
FACTOR_ROUNDOFF = {torch.float32: 2.0**-11, torch.float16: 0.0, torch.bfloat16: 0.0}

# (input size, weight size, stride, padding, dilation). Tiles are 64 x 64, or 128 x 128 where the columns (channels written)
# are more than 64 and there are two such tiles (one in the weight gradient, if both channel counts are); a slice is 32 of the
# channels read or pixels (16 in float32), a vector 8 (4) channels.
CASES = {
    "1x1": ((2, 40, 9, 8), (72, 40, 1, 1), (1, 1), (0, 0), (1, 1)),  # wide tiles, ragged everywhere
    "3x3": ((1, 72, 7, 9), (24, 72, 3, 3), (1, 1), (1, 1), (1, 1)),
    "atrous": ((1, 16, 17, 15), (136, 16, 3, 3), (1, 1), (6, 6), (6, 6)),
    "only_centre_tap_valid": ((2, 8, 5, 6), (8, 8, 3, 3), (1, 1), (18, 18), (18, 18)),
    "stride_2": ((2, 8, 13, 12), (16, 8, 7, 7), (2, 2), (3, 3), (1, 1)),
    "stride_3_2_dilation_differs": ((1, 8, 14, 11), (8, 8, 3, 2), (3, 2), (1, 0), (2, 3)),
    "padding_above_kernel": ((1, 8, 4, 4), (8, 8, 2, 2), (1, 1), (5, 4), (1, 1)),
    "more_taps_than_a_plan_holds": ((1, 8, 21, 3), (8, 8, 19, 1), (1, 1), (9, 0), (1, 1)),
    "wide_weight": ((1, 72, 5, 7), (88, 72, 3, 1), (1, 1), (2, 0), (2, 1)),
    "several_splits": ((3, 8, 20, 18), (8, 8, 1, 1), (1, 1), (0, 0), (1, 1)),  # 1080 pixels: three
    "one_pixel": ((1, 8, 1, 1), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1)),
}
PARAMETERS = [(name, dtype) for name in ("1x1", "atrous") for dtype in DTYPES]
PARAMETERS += [(name, DTYPES[i % 3]) for i, name in enumerate(CASES) if name not in ("1x1", "atrous")]


def operands(case: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size, weight_size, *geometry = case
    x, w = numbers(size, dtype, True), numbers(weight_size, dtype, True)
    return x, w, numbers((1, weight_size[0], 1, 1), dtype, False).flatten(), numbers(
        out_size(size, weight_size, *geometry), dtype, True
    )


def check(result: Tensor, exact: Tensor, absolute: Tensor, terms: int, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    assert not result.isnan().any(), "an element was not written"
    # n products of factors that are rounded first, summed in float32 in any order; then one rounding to dtype, absolute below
    # the normal range.
    products = 2 * FACTOR_ROUNDOFF[dtype] + (terms + 2) * (2.0**-24 + 2.0**-53)
    smallest = torch.finfo(dtype).tiny * ROUNDOFF[dtype]
    bound = 1.01 * products * absolute + 1.01 * ROUNDOFF[dtype] * exact.abs() + smallest
    assert ((result.double() - exact).abs() <= bound).all()


def geometry_of(case: Any) -> tuple[Any, ...]:
    return (*map(list, case[2:]), 1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "dtype"), PARAMETERS, ids=str)
def test_forward(name: str, dtype: torch.dtype) -> None:
    geometry = geometry_of(CASES[name])
    x, w, b, _ = operands(CASES[name], dtype)
    out = emulated.ops().conv2d_tensor_core(x, w, b, *geometry)
    X, W, B = (tensor.double() for tensor in (x, w, b))
    exact, absolute = framework_conv2d(X, W, B, *geometry), framework_conv2d(X.abs(), W.abs(), B.abs(), *geometry)
    check(out, exact, absolute, w[0].numel() + 1, dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "dtype"), PARAMETERS, ids=str)
def test_input_gradient(name: str, dtype: torch.dtype) -> None:
    size, geometry = list(CASES[name][0]), geometry_of(CASES[name])
    _, w, _, g = operands(CASES[name], dtype)
    grad_x = emulated.ops().conv2d_input_tensor_core(size, w, g, *geometry)
    W, G = w.double(), g.double()
    exact = framework_conv2d_input(size, W, G, *geometry)
    check(grad_x, exact, framework_conv2d_input(size, W.abs(), G.abs(), *geometry), w[:, 0].numel(), dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "dtype"), PARAMETERS, ids=str)
def test_weight_gradient(name: str, dtype: torch.dtype) -> None:
    size, geometry = list(CASES[name][1]), geometry_of(CASES[name])
    x, _, _, g = operands(CASES[name], dtype)
    grad_w = emulated.ops().conv2d_weight_tensor_core(x, size, g, *geometry)
    X, G = x.double(), g.double()
    exact = framework_conv2d_weight(X, size, G, *geometry)
    check(grad_w, exact, framework_conv2d_weight(X.abs(), size, G.abs(), *geometry), g[:, 0].numel(), dtype)


def run_all(ops: Any, case: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, w, b, g = operands(case, dtype)
    geometry = geometry_of(case)
    return (
        ops.conv2d_tensor_core(x, w, b, *geometry),
        ops.conv2d_input_tensor_core(list(x.shape), w, g, *geometry),
        ops.conv2d_weight_tensor_core(x, list(w.shape), g, *geometry),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [((1, 72, 5, 6), (72, 72, 1, 2), (1, 1), (0, 1), (1, 2)), CASES["stride_3_2_dilation_differs"]])
def test_no_races_and_no_reads_before_arrival(case: Any, dtype: torch.dtype) -> None:
    """Wide and small tiles, with more slices than stages, so that all are used again."""
    torch.manual_seed(5)
    checked = run_all(emulated.ops(checked=True), case, dtype)
    torch.manual_seed(5)
    assert all(map(torch.equal, checked, run_all(emulated.ops(), case, dtype)))


def test_order_of_threads_changes_no_bit() -> None:
    results = []
    try:
        for kind, seed in (("ascending", 0), ("descending", 0), ("shuffled", 1)):
            emulated.schedule(kind, seed)
            torch.manual_seed(3)
            results.append(run_all(emulated.ops(), CASES["stride_3_2_dilation_differs"], torch.bfloat16))
    finally:
        emulated.schedule("ascending")
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def test_few_channels_written_and_a_view_of_more_channels() -> None:
    """Rows of the result that are no whole vectors are written one value at a time; rows read may be a slice of longer ones."""
    x = numbers((2, 24, 5, 4), torch.bfloat16, True)[:, 8:16]
    w, b = numbers((5, 8, 3, 3), torch.bfloat16, True), numbers((1, 5, 1, 1), torch.bfloat16, False).flatten()
    out = emulated.ops().conv2d_tensor_core(x, w, b, [1, 1], [1, 1], [1, 1], 1)
    X, W, B = (tensor.double() for tensor in (x, w, b))
    exact = framework_conv2d(X, W, B, padding=1)
    check(out, exact, framework_conv2d(X.abs(), W.abs(), B.abs(), padding=1), 73, torch.bfloat16)


def test_infinite_values_outside_the_valid_taps_do_not_leak() -> None:
    w = torch.full((8, 8, 3, 3), float("inf"))
    w[:, :, 1, 1] = 1
    w, x = (tensor.bfloat16().contiguous(memory_format=torch.channels_last) for tensor in (w, torch.ones(1, 8, 5, 5)))
    geometry = ([1, 1], [9, 9], [9, 9], 1)
    assert (emulated.ops().conv2d_tensor_core(x, w, None, *geometry) == 8).all()
    assert (emulated.ops().conv2d_input_tensor_core(list(x.shape), w, x, *geometry) == 8).all()


def test_empty_batch() -> None:
    x, w, b, g = (tensor[:0] if tensor.dim() == 4 and i != 1 else tensor for i, tensor in
                  enumerate(operands(CASES["only_centre_tap_valid"], torch.float16)))  # fmt: skip
    geometry = geometry_of(CASES["only_centre_tap_valid"])
    assert emulated.ops().conv2d_tensor_core(x, w, b, *geometry).shape == g.shape
    assert emulated.ops().conv2d_input_tensor_core(list(x.shape), w, g, *geometry).shape == x.shape
    assert (emulated.ops().conv2d_weight_tensor_core(x, list(w.shape), g, *geometry) == 0).all()


@pytest.mark.parametrize("far", [0, 2, 3], ids="nhw")
def test_more_than_2_to_the_31_elements(far: int) -> None:
    """Neighbours along one dimension lie more than 2^31 elements apart in what is read."""
    step, size = 2**31 + 24, (2, 8, 2, 2)
    strides = [32, 1, 16, 8]
    strides[far] = step

    def distant() -> Tensor:
        return virtual(step + 64).as_strided(size, strides).copy_(torch.randint(-3, 4, size))  # integers: all is exact

    x, g = distant(), distant()
    w = torch.randint(-3, 4, (8, 8, 3, 3)).bfloat16().contiguous(memory_format=torch.channels_last)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    ops = emulated.ops()
    X, W, G = x.contiguous().float(), w.float(), g.contiguous().float()
    out = framework_conv2d(X, W, padding=1)
    assert torch.equal(ops.conv2d_tensor_core(x, w, None, *geometry).float(), out.bfloat16().float())
    grad_x = framework_conv2d_input(list(size), W, G, padding=1)
    assert torch.equal(ops.conv2d_input_tensor_core(list(size), w, g, *geometry).float(), grad_x.bfloat16().float())
    grad_w = framework_conv2d_weight(X, list(w.shape), G, padding=1)
    assert torch.equal(ops.conv2d_weight_tensor_core(x, list(w.shape), g, *geometry).float(), grad_w.bfloat16().float())


def test_errors_name_the_value() -> None:
    x, w = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    good = x.contiguous(memory_format=torch.channels_last)
    geometry = ([1, 1], [1, 1], [1, 1])
    run = emulated.ops().conv2d_tensor_core
    with pytest.raises(RuntimeError, match=r"input: expected channels-last .* strides \[128, 16, 4, 1\]"):
        run(x, w, None, *geometry, 1)
    with pytest.raises(RuntimeError, match=r"input: expected .* got sizes \[1, 8, 4, 4\]"):
        run(torch.zeros(1 + 128)[1:].view(1, 4, 4, 8).permute(0, 3, 1, 2), w, None, *geometry, 1)
    with pytest.raises(RuntimeError, match="groups: expected 1 on the tensor cores, but got 2"):
        run(good, w[:, :4], None, *geometry, 2)
    with pytest.raises(RuntimeError, match="dtype: expected float32, float16 or bfloat16 on the tensor cores"):
        run(good.double(), w.double(), None, *geometry, 1)


def test_through_the_library() -> None:
    """Called by name, with autograd; a contiguous weight and a misaligned input are copied first."""
    w = torch.randn(16, 8, 3, 3).half().requires_grad_()
    x = torch.randn(1 + 2 * 8 * 6 * 5).half()[1:].view(2, 6, 5, 8).permute(0, 3, 1, 2).requires_grad_()
    with emulated.as_cuda_backend("conv2d", "conv2d_input", "conv2d_weight"):
        out = ak.conv2d(x, w, padding=2, dilation=2, backend="tensor_core")
        ours = torch.autograd.grad(out.float().square().sum(), (x, w))
    X, W = (tensor.detach().double().requires_grad_() for tensor in (x, w))
    exact = framework_conv2d(X, W, padding=2, dilation=2)
    expected = torch.autograd.grad(exact.square().sum(), (X, W))
    # Roundoff of float16 in the output, and of the gradients' sums of up to 144 terms of size 20: 2^-11 sqrt(144) 20.
    assert torch.allclose(out.double(), exact, rtol=2e-3, atol=5e-3)
    assert all(torch.allclose(a.double(), b, rtol=5e-3, atol=0.15) for a, b in zip(ours, expected, strict=True))


def test_channels_that_do_not_fill_vectors() -> None:
    """13 channels in, 21 out: through the library they are filled up with zeros, forwards and back. Integers: exact."""
    x, w = (torch.randint(-2, 3, size).half().requires_grad_() for size in ((2, 13, 6, 5), (21, 13, 3, 3)))
    g = torch.randint(-2, 3, (2, 21, 6, 5)).half()
    with emulated.as_cuda_backend("conv2d", "conv2d_input", "conv2d_weight"):
        out = ak.conv2d(x.contiguous(memory_format=torch.channels_last), w, padding=2, dilation=2, backend="tensor_core")
        ours = [out, *torch.autograd.grad(out, (x, w), g)]
    X, W = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    exact = framework_conv2d(X, W, padding=2, dilation=2)
    expected = [exact, *torch.autograd.grad(exact, (X, W), g.float())]
    assert all(torch.equal(a, b.half()) for a, b in zip(ours, expected, strict=True))


# The plan --------------------------------------------------------------------------------------------------------------


@cache
def plan_library() -> ctypes.CDLL:
    source = Path(__file__).with_name("tensor_core_plan.cpp")
    flags = ["-UATROUS_ENOUGH_TILES"]
    return ctypes.CDLL(str(emulated.compile_library("tensor_core_plan", [source], flags)))


@pytest.mark.parametrize(
    ("size", "weight", "rate", "expected"),
    [
        pytest.param((16, 2048, 33, 33), (256, 3), 12, (True, 128, 3), id="ASPP"),
        pytest.param((1, 2048, 33, 33), (256, 3), 12, (False, 128, 3), id="ASPP, one image: few tiles"),
        pytest.param((16, 512, 33, 33), (512, 3), 2, (True, 128, 5), id="block 4"),
        pytest.param((16, 256, 129, 129), (21, 1), 1, (False, 64, 165), id="classifier"),
        pytest.param((16, 64, 129, 129), (64, 3), 1, (False, 64, 74), id="64 channels"),
    ],
)
def test_tiles_and_splits(size: Any, weight: Any, rate: int, expected: tuple[bool, int, int]) -> None:
    out_channels, taps = weight
    padding = rate * (taps - 1) // 2
    numbers = [*size, out_channels, *size[2:], taps, taps, 1, 1, padding, padding, rate, rate, 1]
    found = (ctypes.c_int64 * 3)()
    plan_library().tensor_core_plan((ctypes.c_int64 * 16)(*numbers), found)
    assert (bool(found[0]), found[1], found[2]) == expected


PLANS = {
    "ASPP": ConvProblem(16, 2048, 256, (33, 33), (3, 3), padding=(12, 12), dilation=(12, 12), dtype=torch.bfloat16),
    "block 4": ConvProblem(16, 512, 512, (33, 33), (3, 3), padding=(2, 2), dilation=(2, 2), dtype=torch.bfloat16),
    "strided, ragged": ConvProblem(3, 40, 72, (37, 29), (3, 5), (2, 3), (1, 4), (1, 2)),
    "more taps than a plan holds": ConvProblem(1, 8, 24, (21, 40), (19, 2), padding=(9, 0), dtype=torch.float16),
    "a tap that is never valid": ConvProblem(2, 16, 16, (9, 9), (3, 3), padding=(20, 1), dilation=(20, 1)),
    "empty batch": ConvProblem(0, 16, 16, (9, 9), (3, 3)),
}


@pytest.mark.parametrize("problem", PLANS.values(), ids=PLANS)
def test_the_model_knows_every_block(problem: ConvProblem) -> None:
    """``tensor_core_plan.py`` against the C++, block by block in launch order; and no work is lost."""
    problem = replace(problem, channels_last=True)
    numbers = [*problem.sizes[0], *problem.sizes[2][1:], *problem.kernel, *problem.stride, *problem.padding, *problem.dilation, 1]
    for op, name in enumerate(simulate.OPS):
        planned = list(tensor_core_plan.planned(name, problem))
        blocks = [
            [launch, side, one.rows, one.columns, one.taps, one.depth]
            for launch, (side, of_launch) in enumerate(planned) for one in of_launch
        ]  # fmt: skip
        found = (ctypes.c_int64 * (6 * len(blocks) + 6))()
        shape, depth = (ctypes.c_int64 * 16)(*numbers), ctypes.c_int64(64 // problem.dtype.itemsize)
        count = plan_library().tensor_core_blocks(shape, op, depth, found, ctypes.c_int64(len(blocks) + 1))
        assert count == len(blocks)
        assert [list(found[6 * i : 6 * i + 6]) for i in range(count)] == blocks
        each = [simulate.simulate(work, GPUS["h200"]) for work in tensor_core_plan.works(name, problem)]
        assert sum(one.valid_flops for one in each) == problem.valid_flops
        assert all(one.executed_flops >= one.valid_flops for one in each)


@pytest.mark.parametrize("single", [False, True], ids=["16-bit", "32-bit"])
def test_shared_memory_fits_every_architecture(single: bool) -> None:
    for side in (64, 128):
        assert plan_library().tensor_core_shared_bytes(side == 128, single) == resources.dynamic_shared_bytes(side, side)


@pytest.mark.parametrize("single", [False, True], ids=["16-bit", "32-bit"])
@pytest.mark.parametrize("depth_inner", [False, True])
@pytest.mark.parametrize("extent", [64, 128])
def test_no_bank_conflicts(extent: int, depth_inner: bool, single: bool) -> None:
    """Threads that access shared memory together meet every group of four banks once, and no two vectors share a place."""
    vectors, rows = (4, extent) if depth_inner else (extent // (4 if single else 8), 16 if single else 32)

    def offset(row: int, vector: int) -> int:
        return plan_library().tensor_core_offset(extent, depth_inner, single, row, vector)

    places = [offset(row, vector) for row in range(rows) for vector in range(vectors)]
    assert sorted(places) == list(range(0, 16 * rows * vectors, 16))
    for first in range(0, len(places), 8):  # as copied: 8 threads, 8 neighbours
        assert len({place // 16 % 8 for place in places[first : first + 8]}) == 8
    for first in range(0, rows, 8):
        for vector in range(vectors):
            if depth_inner or not single:  # ldmatrix: 8 rows
                banks = {offset(first + i, vector) // 16 % 8 for i in range(8)}
            else:  # 4 rows, 2 vectors
                banks = {offset(first + i % 4, vector // 2 * 2 + i // 4) // 16 % 8 for i in range(8)}
            assert len(banks) == 8
