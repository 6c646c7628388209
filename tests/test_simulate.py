"""The model of launch plans: it loses no work, does what the hand computes, and errs in the directions that a model may."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isclose

import pytest
import torch

from atrous_kernels import tensor_core_plan
from atrous_kernels.__main__ import main
from atrous_kernels.gpu_model import schedule
from atrous_kernels.gpus import GPUS, nearest_gpu
from atrous_kernels.problem import ConvProblem
from atrous_kernels.simulate import OPS, branch_launches, floor, launches, programs, pyramid, simulate

H200 = GPUS["h200"]
ASPP = ConvProblem(
    16, 2048, 256, (33, 33), (3, 3), padding=(12, 12), dilation=(12, 12), dtype=torch.bfloat16, device_type="cuda",
    channels_last=True,
)  # fmt: skip
PROBLEMS = {
    "ASPP": ASPP,
    "contiguous float32": replace(ASPP, batch=1, in_channels=64, dtype=torch.float32, channels_last=False),
    "strided": replace(ASPP, in_channels=70, out_channels=45, in_size=(37, 29), stride=(2, 3), padding=(1, 4), dilation=(1, 2)),
    "groups": replace(ASPP, in_channels=96, out_channels=48, groups=3),
    "depthwise": replace(ASPP, in_channels=100, out_channels=100, groups=100),
    "depthwise with multiplier": replace(ASPP, in_channels=20, out_channels=60, groups=20, kernel=(5, 2)),
    "a tap that is never valid": replace(ASPP, in_channels=16, in_size=(9, 9), dilation=(20, 1), padding=(20, 1)),
    "empty batch": replace(ASPP, batch=0),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_no_work_is_lost_and_nothing_is_faster_than_the_floor(problem: ConvProblem) -> None:
    for op in OPS:
        found = [simulate(launch, H200) for launch in launches(op, problem)]
        assert sum(one.valid_flops for one in found) == problem.valid_flops
        for one in found:
            assert one.executed_flops >= one.valid_flops
            assert one.makespan >= one.mean * (1 - 1e-9)
            assert one.longest_first >= one.mean * (1 - 1e-9)
            assert isclose(sum(one.per_multiprocessor), one.mean * H200.multiprocessors, abs_tol=1e-15)
            assert one.seconds >= one.memory_seconds
            assert 0 < one.balance <= 1 + 1e-9
        if problem.batch:
            assert sum(one.seconds for one in found) >= floor(H200, problem) * (1 - 1e-9)


def test_every_program_of_the_grid_is_modelled() -> None:
    for problem, op in ((ASPP, "conv2d_weight"), (PROBLEMS["groups"], "conv2d_input"), (PROBLEMS["depthwise"], "conv2d")):
        launch = launches(op, problem)[0]
        assert len(programs(launch)) == torch.Size(launch.grid).numel()


@pytest.mark.parametrize("rate", [2, 16])
def test_a_weight_gradient_fills_the_gpu(rate: int) -> None:
    """Without splits the 144 programs of block 4 would leave 120 of 132 multiprocessors idle in the second wave."""
    problem = replace(ASPP, in_channels=512, out_channels=512, dilation=(rate, rate), padding=(rate, rate))
    for planned in (launches("conv2d_weight", problem), tensor_core_plan.works("conv2d_weight", problem)):
        product, adding = (simulate(launch, H200) for launch in planned)
        assert product.balance > 0.85
        assert product.makespan <= 1.01 * product.longest_first
        assert adding.seconds < 0.2 * product.seconds


def test_by_hand() -> None:
    """16 channels of a 4x4 image fit one block: rectangles of 9, four times 6 and four times 4 taps, one program each."""
    assert sorted(schedule([5, 4, 3, 3, 3], 2)) == [8, 10]
    problem = ConvProblem(1, 16, 16, (4, 4), (3, 3), padding=(1, 1), dtype=torch.bfloat16, channels_last=True)
    # Two multiprocessors that each execute a tap of a block a second, and traffic that takes no time.
    gpu = replace(H200, multiprocessors=2, matrix_flops=2 * 2 * 16**3, bytes_per_second=inf, clock=inf)
    (launch,) = launches("conv2d", problem)
    pixels, taps = (4, *8 * [0]), (9, 6, 6, 6, 6, 4, 4, 4, 4)
    assert [(p.executed // 16**3, p.loaded) for p in programs(launch)] == [(t, (16 + 16) * 16 * t * 2) for t in taps]
    assert programs(launch)[0].valid == pixels[0] * 9 * 16 * 16
    one = simulate(launch, gpu)
    # 9 4 4 6 | 6 6 6 4 4, as each becomes free.
    assert (one.makespan, one.mean, one.waves) == (26, 24.5, 4.5)
    assert sorted(one.per_multiprocessor) == [23, 26]
    assert (one.executed_flops, one.valid_flops) == (49 * 2 * 16**3, 2 * 16 * 16 * (4 * 9 + 8 * 6 + 4 * 4))


def test_the_whole_pyramid_in_one_launch() -> None:
    """A study of the three rates' tiles, made before these kernels, had 394 us at 95.5 % balance at the matrix units' peak."""
    branches = pyramid(ASPP, (6, 12, 18))
    (launch,) = branch_launches(branches)
    one = simulate(launch, H200)
    assert one.programs == torch.Size(launch.grid).numel()
    assert one.valid_flops == sum(branch.valid_flops for branch in branches)
    assert floor(H200, *branches) <= one.seconds < sum(simulate(launches("conv2d", b)[0], H200).seconds for b in branches)
    gpu = replace(H200, clock=inf)
    alone = branch_launches(branches[1:])[0]
    assert simulate(alone, gpu).longest_first == pytest.approx(394e-6, rel=0.01)
    assert simulate(alone, gpu).balance == pytest.approx(0.955, abs=0.01)
    uneven = [replace(branches[0], out_channels=100), *branches[1:]]
    assert simulate(branch_launches(uneven)[0], H200).valid_flops == sum(branch.valid_flops for branch in uneven)


def test_more_of_anything_never_costs_time() -> None:
    for op in OPS:
        launch = launches(op, replace(ASPP, batch=4))[0]
        before = simulate(launch, H200).seconds
        more = nearest_gpu("wider", (9, 0), 2 * H200.multiprocessors)
        assert simulate(launch, replace(more, l2_bytes_per_clock=2 * H200.l2_bytes_per_clock)).seconds <= before
        for gpu in (
            replace(H200, matrix_flops=2 * H200.matrix_flops),
            replace(H200, bytes_per_second=2 * H200.bytes_per_second),
            replace(H200, clock=2 * H200.clock),
        ):
            assert simulate(launch, gpu).seconds <= before
        assert simulate(launches(op, replace(ASPP, batch=8))[0], H200).seconds >= before
        wide = simulate(launches(op, replace(ASPP, batch=4, dilation=(18, 18), padding=(18, 18)))[0], H200)
        assert wide.mean < simulate(launch, H200).mean


def test_unknown_chips_are_scaled_from_known_ones() -> None:
    assert nearest_gpu("NVIDIA H200", (9, 0), 132) == H200
    other = nearest_gpu("NVIDIA A30", (8, 0), 56)
    assert other.matrix_flops == pytest.approx(GPUS["a100"].matrix_flops * 56 / 108)
    assert other.multiprocessors == 56


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--input", "16,2048,33,33", "--weight", "256,2048,3,3", "--padding", "12", "--dilation", "12"]
    assert main(["plan", "conv2d", *shape]) == 0
    out = capsys.readouterr().out
    assert "modelled for NVIDIA H200" in out
    assert "nothing was measured" in out
    assert "floor 119.8 us" in out  # valid taps at 788 TFLOP/s
    assert main(["plan", "aspp", *shape[:4], "--gpu", "a100"]) == 0
    assert "aspp._branches" in capsys.readouterr().out
    assert main(["plan", "conv2d_weight", *shape, "--backend", "tensor_core"]) == 0
    assert "tensor_core.correlate_weight_tiles, blocks 128x128x32" in capsys.readouterr().out
    assert main(["plan", "conv2d", *shape, "--backend", "tensor_core", "--contiguous"]) == 2
    assert "expected one of conv2d" in capsys.readouterr().err
    assert main(["plan", "conv2d", "--input", "1,2,3", "--weight", "1,2,3,3"]) == 2
    assert "expected four sizes" in capsys.readouterr().err
