"""The tap arithmetic against brute force, and its C++ twin against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atrous_kernels import native
from atrous_kernels.problem import Axis, ConvProblem, forward_axis, input_grad_axis, out_extent

AXES = st.builds(
    dict,
    n_in=st.integers(1, 40),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 40),
    dilation=st.integers(1, 45),
)


def _valid(axis: Axis, position: int) -> list[int]:
    sources = [position * axis.src_step + axis.src_offset + tap * axis.tap_step for tap in range(axis.taps)]
    return [tap for tap, source in enumerate(sources) if 0 <= source < axis.n_src]


def _check_segments(axis: Axis) -> None:
    segments = axis.segments()
    assert [s.stop for s in segments[:-1]] == [s.start for s in segments[1:]]
    assert (segments[0].start, segments[-1].stop) == (0, axis.n_out) if axis.n_out else not segments
    for segment in segments:
        for position in range(segment.start, segment.stop):
            assert _valid(axis, position) == list(range(segment.tap_start, segment.tap_stop))


@settings(max_examples=300, deadline=None)
@given(AXES)
def test_segments_hold_exactly_the_valid_taps(args: dict[str, int]) -> None:
    n_out = out_extent(**args)
    if n_out > 0:
        _check_segments(forward_axis(n_out=n_out, **args))


@settings(max_examples=300, deadline=None)
@given(AXES)
def test_input_gradient_meets_each_valid_pair_once(args: dict[str, int]) -> None:
    n_out = out_extent(**args)
    if n_out <= 0:
        return
    forward = forward_axis(n_out=n_out, **args)
    pairs = {
        (o * args["stride"] - args["padding"] + t * args["dilation"], t, o) for o in range(n_out) for t in _valid(forward, o)
    }
    found = []
    for residue in range(args["stride"]):
        grad = input_grad_axis(n_out=n_out, residue=residue, **args)
        _check_segments(grad.axis)
        for q in range(grad.axis.n_out):
            for j in _valid(grad.axis, q):
                source = q + grad.axis.src_offset + j * grad.axis.tap_step
                found.append((q * args["stride"] + residue, grad.first_tap + j * grad.tap_stride, source))
    assert len(found) == len(set(found))
    assert set(found) == pairs


@pytest.mark.skipif(native.introspect() is None, reason="the introspection module was not built")
@settings(max_examples=300, deadline=None)
@given(AXES)
def test_the_cpp_planner_agrees(args: dict[str, int]) -> None:
    n_out = out_extent(**args)
    if n_out <= 0:
        return
    planner = native.introspect()
    assert planner is not None
    axis = forward_axis(n_out=n_out, **args)
    ours = [(s.start, s.stop, s.tap_start, s.tap_stop) for s in axis.segments()]
    fields = (axis.n_out, axis.n_src, axis.taps, axis.src_step, axis.src_offset, axis.tap_step)
    assert [tuple(s) for s in planner.axis_segments(*fields)] == ours
    for residue in range(args["stride"]):
        grad = input_grad_axis(n_out=n_out, residue=residue, **args)
        a = grad.axis
        fields = (a.n_out, a.n_src, a.taps, a.src_step, a.src_offset, a.tap_step)
        theirs = planner.input_grad_axis(
            args["n_in"], n_out, args["kernel"], args["stride"], args["padding"], args["dilation"], residue
        )
        assert tuple(theirs) == (*fields, grad.first_tap, grad.tap_stride)


def test_valid_share_of_the_aspp_rates() -> None:
    # 33x33 at output stride 16, 2048 -> 256: for rate r, an axis keeps 3*33 - 2r of its 3*33 (position, tap) pairs.
    for rate in (6, 12, 18):
        problem = ConvProblem(16, 2048, 256, (33, 33), (3, 3), padding=(rate, rate), dilation=(rate, rate))
        assert problem.dense_flops == 2 * 16 * 2048 * 256 * 33 * 33 * 9
        assert problem.valid_flops * 99**2 == problem.dense_flops * (99 - 2 * rate) ** 2
        assert len(problem.rectangles()) == 9


def test_a_rate_beyond_the_image_leaves_one_tap() -> None:
    problem = ConvProblem(1, 8, 8, (10, 10), (3, 3), padding=(20, 20), dilation=(20, 20))
    assert problem.rectangles()[0][0].taps == 1
    assert problem.valid_flops * 9 == problem.dense_flops


def test_bytes_and_roofline() -> None:
    problem = ConvProblem(1, 2, 4, (5, 5), (1, 1), dtype=torch.bfloat16)
    assert problem.bytes == 2 * (2 * 25 + 4 * 25 + 8)
    assert problem.roofline_seconds(1.0, 1e12) == problem.valid_flops
    assert problem.roofline_seconds(1e12, 1.0) == problem.bytes
