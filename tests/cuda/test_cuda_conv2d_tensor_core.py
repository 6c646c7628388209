"""The convolutions on tensor cores, executed on the host: matrix fragments, asynchronous copies and all, against float64."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from emulated import out_size
from test_cuda_conv2d import ROUNDOFF, numbers
from torch import Tensor
from torch.nn.functional import conv2d as framework_conv2d
from torch.nn.grad import conv2d_input as framework_conv2d_input

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What is multiplied: TF32 keeps 10 bits of the mantissa, the 16-bit types all they have.
FACTOR_ROUNDOFF = {torch.float32: 2.0**-11, torch.float16: 0.0, torch.bfloat16: 0.0}

# (input size, weight size, stride, padding, dilation). Tiles are 64 x 64, or 128 x 128 where the columns (channels written)
# are more than 64 and there are two such tiles; a slice is 32 channels read (16 in float32), a vector 8 (4).
CASES = {
    "1x1": ((2, 40, 9, 8), (72, 40, 1, 1), (1, 1), (0, 0), (1, 1)),  # wide tiles, ragged everywhere
    "3x3": ((1, 72, 7, 9), (24, 72, 3, 3), (1, 1), (1, 1), (1, 1)),
    "atrous": ((1, 16, 17, 15), (136, 16, 3, 3), (1, 1), (6, 6), (6, 6)),
    "only_centre_tap_valid": ((2, 8, 5, 6), (8, 8, 3, 3), (1, 1), (18, 18), (18, 18)),
    "stride_2": ((2, 8, 13, 12), (16, 8, 7, 7), (2, 2), (3, 3), (1, 1)),
    "stride_3_2_dilation_differs": ((1, 8, 14, 11), (8, 8, 3, 2), (3, 2), (1, 0), (2, 3)),
    "padding_above_kernel": ((1, 8, 4, 4), (8, 8, 2, 2), (1, 1), (5, 4), (1, 1)),
    "more_taps_than_a_plan_holds": ((1, 8, 21, 3), (8, 8, 19, 1), (1, 1), (9, 0), (1, 1)),
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
