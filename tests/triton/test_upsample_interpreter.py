"""The Triton kernels of upsample_cross_entropy and upsample_argmax in Triton's interpreter, against the framework in float64."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import interpreted
import pytest
import torch
import torch.nn.functional as F
from conftest import Interpret

from atrous_kernels import dispatch
from atrous_kernels.problem import UpsampleProblem
from atrous_kernels.triton.upsample import can_run
from tests.upsampling import CASES, LAYOUTS, TOLERANCE, case_of, in_float64, operands

# The interpreter takes a few milliseconds for a row of a program, so large results are made smaller.
SMALLER = {
    "21 classes, x16": dict(n=1, size=(2, 2), out=(17, 34)),
    "one pixel": dict(out=(40, 35)),
    "tall, then narrow": dict(size=(2, 20), out=(40, 6)),
}
PROBLEMS = {
    name: case | SMALLER.get(name, dict(out=(11, 14)) if case["out"] == (19, 22) else {}) for name, case in CASES.items()
}
# float32 runs everything, the layouts by turns; the other dtypes differ in loads and in the rounding of the gradient only.
RUNS = [(name, torch.float32, list(LAYOUTS)[i % 2]) for i, name in enumerate(PROBLEMS)]
RUNS += [("weights and smoothing", dtype, last) for dtype in (torch.bfloat16, torch.float16) for last in LAYOUTS]


def _check(interpret: Interpret, case: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format) -> None:
    logits, target, options = operands(case, dtype, layout)
    true_loss, true_gradient = in_float64(logits, target, options)
    upstream = torch.linspace(0.5, 2, true_loss.numel(), dtype=torch.float64).float().view_as(true_loss)
    loss, gradient = interpret(interpreted.loss_and_gradient, logits, target, options, upstream)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert not gradient.numel() or gradient.is_contiguous(memory_format=layout)
    for ours, truth, tolerance in ((loss, true_loss, TOLERANCE[torch.float32]), (gradient, true_gradient, TOLERANCE[dtype])):
        scale = max(truth.abs().max().item(), 1e-3) if truth.numel() else 1.0
        torch.testing.assert_close(ours.double() / scale, truth / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "dtype", "layout"), RUNS, ids=str)
def test_loss_and_gradient(interpret: Interpret, name: str, dtype: torch.dtype, layout: str) -> None:
    _check(interpret, PROBLEMS[name], dtype, LAYOUTS[layout])


def _random_case(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    sides = [(rng.randint(1, 6), rng.randint(1, 20)) for _ in range(2)]
    options = dict(reduction=rng.choice(["mean", "sum", "none"]), label_smoothing=rng.choice([0.0, 0.1, 1.0]))
    return case_of(
        n=rng.randint(1, 2), c=rng.randint(1, 70), size=tuple(s[0] for s in sides), out=tuple(s[1] for s in sides),
        align_corners=rng.random() < 0.5, weighted=rng.random() < 0.5, options=options,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_random_problems(interpret: Interpret, seed: int) -> None:
    case = _random_case(seed)
    if case["n"] * case["out"][0] * case["out"][1] < 8:
        case["options"]["reduction"] = "sum"  # so few pixels may all be ignored, and the mean of none is no number
    _check(interpret, case, torch.float32, list(LAYOUTS.values())[seed % 2])


def test_types_of_labels_any_strides_and_the_same_bits(interpret: Interpret) -> None:
    logits, target, options = operands(case_of(weighted=True, out=(11, 9)), torch.float32, torch.contiguous_format)
    one = torch.ones(())
    loss, gradient = interpret(interpreted.loss_and_gradient, logits, target, options, one)
    wide = torch.full((4, 10, 8, 10), torch.nan)
    wide[::2, ::2, ::2, ::2] = logits
    spread = torch.zeros(2, 11, 18, dtype=torch.int64)
    spread[:, :, ::2] = target
    weights = torch.full((10,), torch.nan)
    weights[::2] = options["weight"]
    for x, t, w in (
        (logits, target, options["weight"]),
        (logits, target.to(torch.uint8), options["weight"]),
        (logits, target.to(torch.int32), options["weight"].double()),
        (wide[::2, ::2, ::2, ::2], target, options["weight"]),
        (logits, spread[:, :, ::2], weights[::2]),
        (logits.to(memory_format=torch.channels_last), target, options["weight"]),
    ):
        again, gradient_again = interpret(interpreted.loss_and_gradient, x.detach(), t, options | dict(weight=w), one)
        assert torch.equal(again, loss)
        assert torch.equal(gradient_again, gradient)


def test_hard_pixels_at_ties_are_the_first(interpret: Interpret) -> None:
    logits, target = torch.zeros(1, 2, 2, 2), torch.randint(0, 2, (1, 7, 9))
    options = dict(hard_fraction=0.25, reduction="none")
    loss, _ = interpret(interpreted.loss_and_gradient, logits, target, options, torch.ones(1, 7, 9))
    assert loss.flatten().nonzero().flatten().tolist() == list(range(16))  # ceil(63 / 4)


def test_no_pixel_counts(interpret: Interpret) -> None:
    logits, target = torch.randn(1, 3, 4, 4), torch.full((1, 9, 9), 255)
    for options in ({}, dict(hard_fraction=0.5), dict(reduction="sum")):
        loss, gradient = interpret(interpreted.loss_and_gradient, logits, target, options, torch.ones(()))
        assert loss.item() == 0 if options.get("reduction") else math.isnan(loss.item())
        assert not gradient.any()


@pytest.mark.parametrize("label", [3, -1, 2**32, 2**31 + 1])
def test_a_label_that_is_no_class_gives_nan(interpret: Interpret, label: int) -> None:
    """As from the CUDA kernels: what the label concerns is not a number, and nothing else is."""
    logits, target = torch.randn(1, 3, 4, 4), torch.zeros(1, 16, 16).long()
    target[0, 0, 0] = label
    loss, gradient = interpret(interpreted.loss_and_gradient, logits, target, dict(reduction="none"), torch.ones(1, 16, 16))
    assert loss[0, 0, 0].isnan()
    assert loss.isnan().sum() == 1
    for options in (dict(reduction="sum"), dict(reduction="sum", label_smoothing=0.1, weight=torch.ones(3)), {}):
        total, gradient = interpret(interpreted.loss_and_gradient, logits, target, options, torch.ones(()))
        assert total.isnan()
        assert gradient[0, :, 0, 0].isnan().all()
        assert gradient[0, :, 2:].isnan().any() == (not options)  # the mean divides every gradient by a sum of weights
    total, _ = interpret(interpreted.loss_and_gradient, logits, target, dict(hard_fraction=0.1), torch.ones(()))
    assert total.isnan()


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 21, 3, 2), (13, 9)), ((1, 70, 2, 3), (5, 12)), ((1, 5, 20, 11), (7, 6)), ((2, 4, 1, 1), (20, 9)),
        ((0, 3, 2, 2), (4, 4)),
    ],
)  # fmt: skip
def test_classes(interpret: Interpret, shape: tuple[int, ...], size: tuple[int, int], corners: bool) -> None:
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        logits = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        found = interpret(interpreted.classes, logits, size, corners)
        assert found.dtype is torch.int64
        z = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=corners) if shape[0] else found[:, None]
        short = z.amax(1) - z.gather(1, found[:, None])[:, 0] if shape[0] else z
        assert not (short > 1e-5).any()  # float32: a few roundings of logits and shares, both of order 1


def test_of_equal_classes_the_first_and_nan_above_all(interpret: Interpret) -> None:
    # Small integers at powers of two apart: every product and sum is exact, and ties are many.
    logits = torch.randint(-2, 3, (2, 6, 3, 4)).float()
    theirs = F.interpolate(logits, size=(12, 16), mode="bilinear").argmax(1)
    assert torch.equal(interpret(interpreted.classes, logits, (12, 16), False), theirs)
    logits = torch.zeros(1, 9, 1, 1)
    logits[0, 3], logits[0, 5], logits[0, 7] = torch.nan, torch.nan, 1
    assert bool((interpret(interpreted.classes, logits, (3, 3), False) == 3).all())


def test_nan_reaches_the_loss(interpret: Interpret) -> None:
    logits, target = torch.zeros(1, 3, 2, 2), torch.zeros(1, 8, 8, dtype=torch.int64)
    logits[0, 1, 0, 0] = torch.nan
    for options in ({}, dict(hard_fraction=0.1)):
        assert interpret(interpreted.loss_and_gradient, logits, target, options, torch.ones(()))[0].isnan()


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(interpret: Interpret, tmp_path: Any, dim: int) -> None:
    # As for conv2d: every stride fits 32 bits, the offset of the third image, class, row or column does not.
    logits, target = torch.randn(3, 3, 3, 3).half(), torch.randint(0, 3, (3, 6, 5))
    loss, gradient, classes = interpret(interpreted.far_upsampled, str(tmp_path), dim, 2**30 + 8, logits, target)
    true_loss, true_gradient = in_float64(logits, target, {})
    torch.testing.assert_close(loss.double(), true_loss, rtol=0, atol=TOLERANCE[torch.float32])
    upstream = 0.5  # what in_float64 multiplies a scalar loss by
    torch.testing.assert_close(gradient.double() * upstream, true_gradient, rtol=0, atol=TOLERANCE[torch.float32])
    assert torch.equal(classes, interpret(interpreted.classes, logits, (6, 5), False))


def test_can_run_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = UpsampleProblem(2, 21, (33, 33), (513, 513))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "compiles for CUDA devices, not for cpu" in str(can_run(problem))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert can_run(problem) is None
    assert can_run(replace(problem, classes=1024)) is None
    assert "1025 classes are more than 1024" in str(can_run(replace(problem, classes=1025)))
    assert "torch.float64 is not one of torch.float32" in str(can_run(replace(problem, dtype=torch.float64)))
    assert "products in 32 bits" in str(can_run(replace(problem, in_size=(2**15, 4), out_size=(2**15, 4))))
    assert "low-resolution pixels are more than" in str(can_run(replace(problem, batch=2**22)))
    assert f"programs are more than {2**29}" in str(can_run(replace(problem, batch=2**20, classes=1024)))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton is not installed" in str(can_run(problem))


def test_a_gpu_keeps_the_measured_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # stands in for a GPU
    for op in ("upsample_cross_entropy", "upsample_argmax"):
        explanation = dispatch.explain(op, UpsampleProblem(2, 21, (33, 33), (513, 513), device_type="cuda"))
        assert explanation.chosen == "torch"
        (reason,) = (choice.reason for choice in explanation.choices if choice.name == "triton")
        assert "no committed measurement" in reason


def test_importing_does_not_import_triton() -> None:
    modules = "atrous_kernels.triton.upsample_argmax, atrous_kernels.triton.upsample_cross_entropy"
    program = f"import sys, {modules}; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
