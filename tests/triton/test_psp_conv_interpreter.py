"""psp_conv with the Triton kernel that adds its pooled half, in Triton's interpreter, against the concatenation in float64."""

from __future__ import annotations

import interpreted
import pytest
import torch
import torch.nn.functional as F
from conftest import Interpret
from torch import Tensor

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Batch, channels, height and width; channels, rows and columns of each level; channels out and kernel.
PROBLEMS = {
    "PSPNet": ((2, 4, 6, 6), [(2, 1, 1), (2, 2, 2), (2, 3, 3)], (5, 3, 3)),
    "blocks": ((1, 2, 2, 70), [(1, 1, 4)], (70, 1, 3)),  # several stretches of a row, several blocks of channels
    "odd": ((2, 3, 5, 4), [(3, 2, 5), (1, 7, 1)], (6, 3, 5)),
    "one pixel": ((2, 3, 1, 1), [(2, 1, 1), (2, 2, 2)], (4, 3, 3)),
    "empty batch": ((0, 2, 3, 3), [(2, 1, 1)], (3, 3, 3)),
}
# float32: sums of a hundred products in another order. 16 bits: products at bin resolution, factors of interpolation and the
# dense half are rounded before they meet; the interpreter cuts bfloat16 off.
TOLERANCE = {
    torch.float32: dict(rtol=1e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=5e-2, atol=1e-1),
    torch.float16: dict(rtol=1e-2, atol=2e-2),
}
RUNS = [(name, torch.float32) for name in PROBLEMS] + [("PSPNet", dtype) for dtype in (torch.bfloat16, torch.float16)]


def _operands(name: str, dtype: torch.dtype, layout: str) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    size, levels, (out, *kernel) = PROBLEMS[name]
    total = size[1] + sum(level[0] for level in levels)
    x, grad = torch.randn(size), torch.randn(size[0], out, *size[2:])
    weight = torch.randn(out, total, *kernel) * (total * kernel[0] * kernel[1]) ** -0.5
    form = LAYOUTS[layout]
    x, weight, grad = (t.to(dtype).contiguous(memory_format=form) for t in (x, weight, grad))
    return x, [torch.randn(size[0], *level).to(dtype) for level in levels], weight, torch.randn(out).to(dtype), grad


def _truth(x: Tensor, levels: list[Tensor], weight: Tensor, bias: Tensor, corners: bool, grad: Tensor) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, *levels)]
    options = dict(size=x.shape[2:], mode="bilinear", align_corners=corners)
    wide = [F.interpolate(t, **options) if len(t) else t.new_zeros(*t.shape[:2], *x.shape[2:]) for t in leaves[3:]]
    y = F.conv2d(torch.cat([leaves[0], *wide], 1), *leaves[1:3], padding=[k // 2 for k in weight.shape[2:]])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double(), allow_unused=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_against_the_concatenation(interpret: Interpret, name: str, dtype: torch.dtype, layout: str) -> None:
    x, levels, weight, bias, grad = _operands(name, dtype, layout)
    corners = layout == "nhwc"
    ours = interpret(interpreted.psp_conv, x, levels, weight, bias, corners, grad)
    assert ours[0].dtype is dtype
    assert ours[0].is_contiguous(memory_format=LAYOUTS[layout])
    for a, b in zip(ours[: 4 + len(levels)], _truth(x, levels, weight, bias, corners, grad), strict=True):
        if b is not None:
            torch.testing.assert_close(a.double(), b, **TOLERANCE[dtype])
    if name != "PSPNet" or dtype is not torch.float32:
        return
    again = interpret(interpreted.psp_conv, x, levels, weight, bias, corners, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "the same inputs, other bits"
    theirs = interpreted.psp_conv(x, levels, weight, bias, corners, grad, "reference")
    for a, b in zip(ours[-2:], theirs[-2:], strict=True):  # second derivatives: sums of squares of sums
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_one_launch_and_any_strides(interpret: Interpret) -> None:
    wide = torch.full((4, 6, 6, 8), torch.nan)
    wide[::2, ::2, ::2, ::2] = torch.randn(2, 3, 3, 4)
    x, products, rows, columns = wide[::2, ::2, ::2, ::2], torch.randn(2, 17, 3), torch.rand(3, 17), torch.rand(4, 17)
    truth = x + torch.einsum("yk,xk,nko->noyx", rows, columns, products)
    arguments = (x, products, rows, columns)
    torch.testing.assert_close(interpret(interpreted.call, "psp_conv", "add_upsampled", *arguments), truth)
    assert interpret(interpreted.launches_of, "psp_conv", "plan_add_upsampled", *arguments) == ["_add_upsampled"]


def test_opcheck(interpret: Interpret) -> None:
    interpret(interpreted.opcheck_psp)
