"""conv2d_statistics: the statistics that a convolution takes while it writes, against float64 and the framework's batch_norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from atrous_kernels import native
from atrous_kernels.ops.conv2d_statistics import conv2d_statistics
from tests.repeats import assert_same_bits_for_threads, built_isas, repeat_capped

BACKENDS = ("auto", "winograd", "cpu", "torch", "reference")

# x, out_channels, kernel, stride, padding, dilation, groups
PROBLEMS = {
    "rectangles": ((2, 33, 13, 11), 70, 3, 1, 4, 4, 1),
    "rate beyond the image": ((3, 32, 5, 7), 40, 3, 1, 8, 8, 1),
    "pointwise": ((1, 40, 19, 21), 150, 1, 1, 0, 1, 1),
    "strided groups": ((2, 12, 15, 14), 8, 3, 2, 1, 1, 2),
    "groups of three": ((2, 96, 9, 8), 96, 3, 1, 2, 2, 3),
    "depthwise": ((2, 37, 9, 10), 37, 5, 1, 4, 2, 37),
    "many chunks": ((1, 300, 12, 12), 20, 3, 1, 1, 1, 1),
    "one pixel": ((1, 16, 1, 1), 5, 1, 1, 0, 1, 1),
    "empty": ((0, 16, 4, 4), 5, 3, 1, 1, 1, 1),
}
# Of the largest value. fp32: sums of up to 2,700 products (Winograd's rounding is some ten times as large) and of a few hundred
# outputs. bf16: inputs are exact, and backends that see the stored output see it rounded once (2**-9).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _runnable() -> None:
    if native.cpu_missing():
        pytest.skip(str(native.cpu_missing()))


def _tensors(name: str, dtype: torch.dtype, layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    size, out, kernel, stride, padding, dilation, groups = PROBLEMS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator, dtype=torch.float64) + 2  # a mean that a sum of squares would drown in
    w = torch.randn(out, size[1] // groups, kernel, kernel, generator=generator, dtype=torch.float64) / 8
    geometry = ((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
    return x.to(dtype).contiguous(memory_format=layout), w.to(dtype), geometry


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_statistics_are_those_of_the_output(name: str, backend: str, layout, dtype: torch.dtype, poison) -> None:
    x, w, geometry = _tensors(name, dtype, layout)
    if backend == "winograd" and (PROBLEMS[name][2:4] != (3, 1) or geometry[3] > 3 or dtype is not torch.float32):
        with pytest.raises(RuntimeError, match="cannot run"):
            conv2d_statistics(x, w, *geometry, backend)
        return
    truth = F.conv2d(x.double(), w.double(), None, *geometry)
    mean = truth.mean((0, 2, 3)) if truth.numel() else truth.new_zeros(truth.shape[1])
    moment = (truth - mean[:, None, None]).square().sum((0, 2, 3))
    for _ in range(3):  # the third call has prepared weights
        results = conv2d_statistics(x, w, *geometry, backend)
        assert results[0].dtype is dtype
        assert {results[1].dtype, results[2].dtype} == {torch.promote_types(dtype, torch.float32)}
        for got, expected in zip(results, (truth, mean, moment), strict=True):
            largest = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype] * largest + 1e-30)


@pytest.mark.parametrize("backend", ["winograd", "cpu"])
def test_same_bits_for_all_thread_counts(backend: str) -> None:
    # 33x33: tall blocks of pixels for few threads, small ones for many.
    x, w = torch.randn(4, 64, 33, 33).contiguous(memory_format=torch.channels_last), torch.randn(96, 64, 3, 3)
    assert_same_bits_for_threads(lambda: conv2d_statistics(x, w, (1, 1), (2, 2), (2, 2), 1, backend))


def test_op_and_gradients() -> None:
    x, w, geometry = _tensors("strided groups", torch.float64, torch.contiguous_format)
    leaves = [t.clone().requires_grad_() for t in (x[:, :, :6, :5].contiguous(), w)]
    torch.library.opcheck(conv2d_statistics, (*leaves, *geometry, "auto"))
    assert torch.autograd.gradcheck(lambda x, w: conv2d_statistics(x, w, *geometry, "auto")[0], leaves)
    _, mean, moment = conv2d_statistics(*leaves, *geometry, "auto")
    assert not mean.requires_grad
    assert not moment.requires_grad


@pytest.mark.parametrize("isa", built_isas())
def test_every_instruction_set(isa: str) -> None:
    done = repeat_capped(isa, "statistics_are_those and (cpu or winograd) or thread_counts", __file__)
    assert done.returncode == 0, done.stdout
