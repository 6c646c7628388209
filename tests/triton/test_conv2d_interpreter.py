"""The Triton kernels executed by Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import interpreted
import pytest
import torch
from conftest import Interpret
from torch import Tensor

from atrous_kernels.problem import ConvProblem
from atrous_kernels.reference import conv2d as reference
from atrous_kernels.triton import conv2d, runtime
from atrous_kernels.triton.conv2d import can_run

DENSE = ConvProblem(2, 5, 7, (9, 8), (3, 3), padding=(2, 2), dilation=(2, 2))
PROBLEMS = {
    "dense": DENSE,
    "vectors": ConvProblem(2, 16, 16, (6, 5), (3, 3), padding=(1, 1)),  # channels fill their blocks
    "vectors in blocks": ConvProblem(1, 128, 256, (3, 4), (3, 2), stride=(2, 1), padding=(1, 1)),
    "vectors in groups": ConvProblem(2, 32, 64, (4, 3), (2, 3), padding=(2, 2), dilation=(3, 2), groups=2),
    "blocks": ConvProblem(1, 70, 66, (5, 7), (3, 2), padding=(1, 1), dilation=(1, 3)),  # several blocks of channels
    "pixels": ConvProblem(3, 3, 4, (13, 11), (3, 3), padding=(4, 4), dilation=(4, 4)),  # several tiles per rectangle
    "strides 2 and 3": ConvProblem(2, 4, 6, (11, 10), (3, 3), stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
    "stride 3, rate 2": ConvProblem(1, 3, 4, (10, 11), (4, 2), stride=(3, 2), padding=(3, 0), dilation=(2, 4)),
    "stride beyond kernel": ConvProblem(2, 3, 3, (8, 9), (2, 2), stride=(3, 3)),  # some input positions are never read
    "rate beyond image": ConvProblem(2, 5, 6, (5, 6), (3, 3), padding=(12, 12), dilation=(12, 12)),
    "no valid tap": ConvProblem(1, 3, 4, (3, 3), (2, 2), stride=(4, 4), padding=(6, 6), dilation=(9, 9)),
    "asymmetric": ConvProblem(2, 6, 4, (9, 8), (1, 5), stride=(1, 2), padding=(0, 4), dilation=(3, 2)),
    "groups": ConvProblem(2, 6, 9, (7, 6), (3, 3), padding=(2, 1), dilation=(2, 1), groups=3),
    "depthwise": ConvProblem(2, 6, 6, (9, 8), (3, 3), padding=(3, 3), dilation=(3, 3), groups=6),
    "depthwise, stride 2": ConvProblem(2, 6, 6, (9, 8), (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=6),
    "depthwise, multiplier 3": ConvProblem(2, 4, 12, (7, 8), (2, 3), stride=(1, 2), padding=(2, 2), groups=4),
    "depthwise, many channels": ConvProblem(1, 70, 70, (5, 4), (3, 3), padding=(6, 2), dilation=(6, 2), groups=70),
    "one channel": ConvProblem(2, 1, 5, (6, 7), (3, 3), padding=(1, 1)),
    "split sum": ConvProblem(2, 3, 4, (16, 17), (2, 2)),
    "depthwise, split sum": ConvProblem(2, 3, 3, (33, 33), (2, 2), groups=3),
}  # fmt: skip
# float32 runs everything, some of it in both layouts; the other dtypes differ in loads, stores and rounding only.
CONTIGUOUS = ("dense", "blocks", "strides 2 and 3", "groups", "depthwise", "depthwise, multiplier 3", "split sum")
EXACT = [(name, torch.float32, last) for name in PROBLEMS for last in (False, True) if last or name in CONTIGUOUS]
# Weights come through tensor descriptors. Sums over many channels exceed what bfloat16 holds exactly, and the interpreter cuts.
EXACT += [("vectors in blocks", torch.float16, True), *(("vectors in groups", t, True) for t in (torch.bfloat16, torch.float16))]
EXACT += [(name, dtype, last) for name in ("vectors", "groups", "strides 2 and 3", "depthwise") for dtype, last in (
    (torch.bfloat16, True), (torch.float16, False))]  # fmt: skip


def _integers(*size: int) -> Tensor:
    return torch.randint(-3, 4, size)


def _tensors(problem: ConvProblem, make=_integers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and output gradient."""
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    tensors = (
        make(problem.batch, problem.in_channels, *problem.in_size),
        make(problem.out_channels, problem.in_channels // problem.groups, *problem.kernel),
        make(problem.batch, problem.out_channels, *problem.out_size),
    )
    x, weight, grad = (t.to(problem.dtype).contiguous(memory_format=layout) for t in tensors)
    return x, weight, make(problem.out_channels).to(problem.dtype), grad


def _geometry(problem: ConvProblem) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    return problem.stride, problem.padding, problem.dilation, problem.groups


def _calls(problem: ConvProblem, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> dict[str, tuple]:
    geometry = _geometry(problem)
    return {
        "conv2d": (x, weight, bias, *geometry),
        "conv2d_input": (tuple(x.shape), weight, grad, *geometry),
        "conv2d_weight": (x, tuple(weight.shape), grad, *geometry),
    }


def _in_float64(name: str, arguments: tuple) -> Tensor:
    return getattr(reference, name)(*(a.double() if isinstance(a, Tensor) else a for a in arguments))


@pytest.mark.parametrize(("name", "dtype", "channels_last"), EXACT, ids=str)
def test_exact_on_integers(interpret: Interpret, name: str, dtype: torch.dtype, channels_last: bool) -> None:
    problem = replace(PROBLEMS[name], dtype=dtype, channels_last=channels_last)
    for op, arguments in _calls(problem, *_tensors(problem)).items():
        result = interpret(interpreted.op, op, *arguments)
        # Sums of small integers are exact in float32, so one rounding to the dtype is all that may happen.
        assert torch.equal(result, _in_float64(op, arguments).to(dtype)), op
        # With a single channel both layouts are the same memory, and count as contiguous.
        tensors = [a for a in arguments if isinstance(a, Tensor) and a.dim() == 4]
        last = any(not tensor.is_contiguous() for tensor in tensors)
        assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), op


def _random_problem(seed: int) -> ConvProblem:
    rng = random.Random(seed)
    groups = rng.choice((1, 1, 2, 3))
    kernel, stride, dilation = ((rng.randint(1, 4), rng.randint(1, 4)) for _ in range(3))
    padding = (rng.randint(0, 5), rng.randint(0, 5))
    # At least as large as the kernel, so that there is an output.
    in_size = tuple(max(rng.randint(1, 9), d * (k - 1) + 1 - 2 * p)
                    for k, d, p in zip(kernel, dilation, padding, strict=True))  # fmt: skip
    per_group = (1, rng.randint(1, 3)) if rng.random() < 0.3 else (rng.randint(1, 6), rng.randint(1, 6))
    return ConvProblem(
        rng.randint(1, 3), groups * per_group[0], groups * per_group[1], (in_size[0], in_size[1]), kernel,
        stride, padding, dilation, groups, rng.choice(runtime.DTYPES), "cpu", rng.random() < 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(16))
def test_within_rounding_on_reals(interpret: Interpret, seed: int) -> None:
    torch.manual_seed(seed)
    problem = _random_problem(seed)
    x, weight, bias, grad = _tensors(problem, torch.randn)
    for op, arguments in _calls(problem, x, weight, bias if seed % 2 else None, grad).items():
        result = interpret(interpreted.op, op, *arguments)
        truth = _in_float64(op, arguments)
        magnitudes = _in_float64(op, tuple(a.abs() if isinstance(a, Tensor) else a for a in arguments))
        # The textbook bound of a float32 sum of n products, n eps sum|a||b|, plus one rounding to the dtype (for float16
        # also where it is subnormal). No sum here has more terms than an output's taps and channels or the pixels.
        terms = 1 + max(weight[0].numel(), weight[:, 0].numel(), grad[:, 0].numel())
        rounding = torch.finfo(problem.dtype)
        bound = terms * torch.finfo(torch.float32).eps * magnitudes + rounding.eps * truth.abs() + rounding.tiny
        assert bool(((result.double() - truth).abs() <= bound).all()), f"{op} of {problem}"


def test_padding_is_never_multiplied(interpret: Interpret) -> None:
    problem = PROBLEMS["rate beyond image"]
    x, weight, bias, grad = _tensors(problem)
    outer = torch.ones(3, 3, dtype=torch.bool)
    outer[1, 1] = False  # the only tap that ever meets the image
    weight[..., outer] = torch.nan
    for op, arguments in _calls(problem, x, weight, bias, grad).items():
        assert torch.equal(interpret(interpreted.op, op, *arguments), _in_float64(op, arguments).float()), op
    grad_weight = interpret(interpreted.op, "conv2d_weight", x, tuple(weight.shape), grad, *_geometry(problem))
    assert bool((grad_weight[..., outer] == 0).all())


def test_what_lies_past_a_ragged_edge_does_not_leak(interpret: Interpret) -> None:
    # Channels 3 of 8 and pixels that do not fill their blocks; everything around them is NaN.
    problem = ConvProblem(1, 3, 5, (5, 3), (3, 3), padding=(1, 1))
    for channels_last in (False, True):
        problem = replace(problem, channels_last=channels_last)
        inside = []
        for tensor in _tensors(problem):
            around = torch.full([size + 5 for size in tensor.shape], torch.nan)
            if channels_last and around.dim() == 4:
                around = around.contiguous(memory_format=torch.channels_last)
            view = around[tuple(slice(0, size) for size in tensor.shape)]
            inside.append(view.copy_(tensor))
        for op, arguments in _calls(problem, *inside).items():
            assert torch.equal(interpret(interpreted.op, op, *arguments), _in_float64(op, arguments).float()), op


@pytest.mark.parametrize("name", ["split sum", "depthwise, split sum"])
def test_split_sums_are_split_and_repeat_to_the_bit(interpret: Interpret, name: str) -> None:
    problem = replace(PROBLEMS[name], channels_last=True)
    arguments = _calls(problem, *_tensors(problem, torch.randn))["conv2d_weight"]
    assert interpret(interpreted.launch_count, "conv2d_weight", *arguments) == 2
    first, second = (interpret(interpreted.op, "conv2d_weight", *arguments) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("groups", [1, 4])
def test_empty_batch(interpret: Interpret, groups: int) -> None:
    problem = ConvProblem(0, 4, 4, (5, 5), (3, 3), padding=(1, 1), groups=groups)
    calls = _calls(problem, *_tensors(problem))
    for op in ("conv2d", "conv2d_input"):
        assert interpret(interpreted.op, op, *calls[op]).shape == (0, 4, 5, 5)
    grad_weight = interpret(interpreted.op, "conv2d_weight", *calls["conv2d_weight"])
    assert torch.equal(grad_weight, torch.zeros(4, 4 // groups, 3, 3))


def test_overlapping_input(interpret: Interpret) -> None:
    # Every image and every row is the same memory: strides of zero.
    x = _integers(1, 5, 1, 8).float().expand(3, 5, 6, 8)
    weight = _integers(4, 5, 3, 3).float()
    arguments = (x, weight, None, (1, 1), (2, 2), (2, 2), 1)
    assert torch.equal(interpret(interpreted.op, "conv2d", *arguments), reference.conv2d(*arguments))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(interpret: Interpret, tmp_path, dim: int, groups: int) -> None:
    # Each stride fits 32 bits, the offset of the third image, channel, row or column does not. The tensors live in a
    # sparse file of some 4 GB of which a few pages exist; a hidden copy would show as memory and time.
    stride = 2**30 + 8
    problem = ConvProblem(3, 3, 3, (3, 3), (3, 3), padding=(1, 1), groups=groups, dtype=torch.float16)
    x, weight, bias, grad = _tensors(problem)
    calls = _calls(problem, x, weight, bias, grad)
    where = (str(tmp_path), dim, stride)
    sources = (("conv2d", x, 0), ("conv2d_input", grad, 2), ("conv2d_weight", x, 0), ("conv2d_weight", grad, 2))
    for op, near, position in sources:
        others = [argument for index, argument in enumerate(calls[op]) if index != position]
        truth = _in_float64(op, calls[op]).half()
        assert torch.equal(interpret(interpreted.far_source, *where, op, near, position, *others), truth), op
    for op, arguments in calls.items():
        truth = _in_float64(op, arguments).half()
        if truth.shape[dim] == 3:
            assert torch.equal(interpret(interpreted.far_target, *where, truth, op, *arguments), truth), op
    if groups == 1:
        others = calls["conv2d"][2:]
        result = interpret(interpreted.far_source, *where, "conv2d", weight, 1, x, *others)
        assert torch.equal(result, _in_float64("conv2d", calls["conv2d"]).half())


def test_public_function_and_autograd(interpret: Interpret) -> None:
    x, weight, bias, grad = _tensors(DENSE)
    options = {"padding": DENSE.padding, "dilation": DENSE.dilation}
    results = interpret(interpreted.through_autograd, x, weight, bias, grad, options)
    calls = _calls(DENSE, x, weight, bias, grad)
    truths = [_in_float64(op, arguments).float() for op, arguments in calls.items()] + [grad.sum((0, 2, 3))]
    for result, truth in zip(results, truths, strict=True):
        assert torch.equal(result, truth)


def test_can_run_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "compiles for CUDA devices, not for cpu" in can_run(DENSE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert can_run(DENSE) is None
    assert "torch.float64 is not one of torch.float32" in can_run(replace(DENSE, dtype=torch.float64))
    assert "input pixels are more than" in can_run(replace(DENSE, batch=2**25))
    many = 2 * (runtime.MAX_GROUPS + 1)
    assert "groups are more than" in can_run(replace(DENSE, in_channels=many, out_channels=many, groups=many // 2))
    assert can_run(replace(DENSE, in_channels=many, out_channels=many, groups=many)) is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton is not installed" in can_run(DENSE)


def test_importing_does_not_import_triton() -> None:
    program = "import sys, atrous_kernels.triton.conv2d; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_weights_come_through_descriptors_where_they_are_whole_blocks() -> None:
    def weight_blocks(capability: int, dtype: torch.dtype, channels: int, last: bool) -> list[runtime.Blocks | None]:
        problem = replace(PROBLEMS["vectors in blocks"], in_channels=channels, dtype=dtype, channels_last=last)
        calls = _calls(problem, *(t.to("meta") for t in _tensors(problem)))
        with runtime.compiling_for(capability):
            plans = [getattr(conv2d, f"plan_{name}")(*calls[name])[1][0] for name in ("conv2d", "conv2d_input")]
        return [plan.arguments["weight_blocks"] for plan in plans]

    forward, gradient = weight_blocks(90, torch.bfloat16, 128, True)
    assert (forward.shape, forward.block) == ((256, 6 * 128), (128, 64))
    assert (gradient.shape, gradient.block) == ((256, 6 * 128), (64, 128))
    for other in ((80, torch.bfloat16, 128, True), (90, torch.float32, 128, True), (90, torch.bfloat16, 128, False)):
        assert weight_blocks(*other) == [None, None]
    assert weight_blocks(90, torch.bfloat16, 120, True) == [None, None]  # ragged channels
