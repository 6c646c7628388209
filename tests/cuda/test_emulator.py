"""The emulation of CUDA threads itself: that right kernels run right, and that wrong ones are caught, not hung."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")


@pytest.fixture(params=["assembly", "ucontext"])
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The self-test kernels, with either way of switching between fibres (the same one where there is only one)."""
    flags = ["-DATROUS_EMULATION_UCONTEXT"] if request.param == "ucontext" else []
    source = Path(__file__).with_name("emulator_selftest.cpp")
    loaded = ctypes.CDLL(str(emulated.compile_library(f"selftest_{request.param}", [source], flags)))
    for name in ("reverse", "unwritten", "wrong", "shared_misuse", "shuffles", "sum_half_warps", "indices"):
        getattr(loaded, f"selftest_{name}").restype = ctypes.c_char_p
    yield loaded
    loaded.selftest_schedule(emulated.SCHEDULES["ascending"], 0)


def pointer(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.parametrize("kind", emulated.SCHEDULES)
@pytest.mark.parametrize("threads", [1, 31, 32, 100, 256])
def test_shared_memory_and_barrier(library: ctypes.CDLL, threads: int, kind: str) -> None:
    library.selftest_schedule(emulated.SCHEDULES[kind], 5)
    values, out = np.random.rand(3, threads).astype(np.float32), np.zeros((3, threads), np.float32)
    assert library.selftest_reverse(pointer(values), pointer(out), 3, threads, 1) is None
    assert np.array_equal(out, values[:, ::-1])


def test_missing_barrier_shows(library: ctypes.CDLL) -> None:
    """A race gives poison where the reader runs before the writer, so the result depends on the schedule."""
    values, results = np.random.rand(1, 64).astype(np.float32), []
    for kind in ("ascending", "descending"):
        library.selftest_schedule(emulated.SCHEDULES[kind], 0)
        out = np.zeros((1, 64), np.float32)
        assert library.selftest_reverse(pointer(values), pointer(out), 1, 64, 0) is None
        assert np.isnan(out).sum() == 32
        results.append(out)
    assert not np.array_equal(np.isnan(results[0]), np.isnan(results[1]))


def test_shared_memory_starts_poisoned_in_every_block(library: ctypes.CDLL) -> None:
    out = np.zeros(2 * 64, np.float32)
    assert library.selftest_unwritten(pointer(out), 64) is None
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "barrier_skipped_by_some",
            r"deadlock: thread \(0,0,0\) of block \(0,0,0\) waits for the block at .*selftest.cpp:\d+; "
            r"thread \(40,0,0\) of block \(0,0,0\) has returned",
        ),
        ("barriers_in_two_branches", r"deadlock: .*waits for the block at .*:(\d+); .*waits for the block at .*:(?!\1)\d+$"),
        (
            "warp_barrier_not_reached",
            r"deadlock: .*waits for its warp at .*; thread \(7,0,0\) of block \(0,0,0\) has returned",
        ),
        ("shuffle_outside_mask", r"shuffle reads lane 20 outside its mask"),
    ],
)
@pytest.mark.parametrize("kind", emulated.SCHEDULES)
def test_divergence_is_an_error(library: ctypes.CDLL, kernel: str, message: str, kind: str) -> None:
    library.selftest_schedule(emulated.SCHEDULES[kind], 0)
    out = np.zeros(64, np.int32)
    error = library.selftest_wrong(kernel.encode(), pointer(out), 64)
    assert error is not None
    if kind == "ascending":  # the threads named are the first found
        with pytest.raises(RuntimeError, match=message):
            raise RuntimeError(error.decode())


@pytest.mark.parametrize("kernel", ["barrier_skipped_by_some", "shuffle_outside_mask"])
def test_usable_after_a_failure(library: ctypes.CDLL, kernel: str) -> None:
    assert library.selftest_wrong(kernel.encode(), pointer(np.zeros(64, np.int32)), 64) is not None
    test_shared_memory_and_barrier(library, 100, "ascending")


@pytest.mark.parametrize(
    ("kernel", "threads", "message"),
    [
        ("write_outside", 256, "a write outside its shared array"),
        ("too_much_shared", 32, "52000 bytes of static"),
        ("write_outside", 2048, "a block of 2048 threads"),
    ],
)
def test_misuse_of_shared_memory_is_an_error(library: ctypes.CDLL, kernel: str, threads: int, message: str) -> None:
    error = library.selftest_shared_misuse(kernel.encode(), pointer(np.zeros(256, np.float32)), threads)
    assert error is not None
    assert message in error.decode()


@pytest.mark.parametrize("threads", [32, 96])
@pytest.mark.parametrize("width", [4, 8, 32])
@pytest.mark.parametrize("delta", [0, 1, 3, 5, 16, 31])
def test_shuffles(library: ctypes.CDLL, threads: int, width: int, delta: int) -> None:
    out = np.zeros((4, threads), np.int32)
    assert library.selftest_shuffles(delta, width, pointer(out), threads) is None
    for i in range(threads):
        warp, lane = i // 32 * 32, i % 32
        segment = lane // width * width
        indexed = segment + delta % width
        crossed = lane ^ delta
        if crossed >= segment + width:  # a later segment is not read, an earlier one is
            crossed = lane
        below = lane + delta if lane + delta < segment + width else lane
        above = lane - delta if lane - delta >= segment else lane
        assert list(out[:, i] - warp) == [indexed, crossed, below, above], i


@pytest.mark.parametrize("kind", emulated.SCHEDULES)
def test_masked_shuffles_of_two_groups_do_not_meet(library: ctypes.CDLL, kind: str) -> None:
    library.selftest_schedule(emulated.SCHEDULES[kind], 9)
    values, out = np.arange(64, dtype=np.float64) ** 2, np.zeros(64)
    assert library.selftest_sum_half_warps(pointer(values), pointer(out), 64) is None
    assert np.array_equal(out, np.repeat(values.reshape(4, 16).sum(1), 16))


def test_indices(library: ctypes.CDLL) -> None:
    grid, block = np.array([3, 2, 2], np.uint32), np.array([5, 3, 2], np.uint32)
    out = np.zeros((2, 2, 3, 2, 3, 5, 6), np.uint32)
    assert library.selftest_indices(pointer(out), pointer(grid), pointer(block)) is None
    expected = np.stack(np.indices(out.shape[:-1])[[2, 1, 0, 5, 4, 3]], axis=-1)
    assert np.array_equal(out, expected)


def test_16_bit_conversions(library: ctypes.CDLL) -> None:
    """All 2^16 values widen as in PyTorch; all float32 exponents and rounding cases narrow as in PyTorch."""
    bits = np.arange(2**16, dtype=np.uint16)
    half, bfloat = np.zeros(2**16, np.float32), np.zeros(2**16, np.float32)
    library.selftest_widen(pointer(bits), pointer(half), pointer(bfloat), ctypes.c_int64(bits.size))
    as_int16 = torch.from_numpy(bits.view(np.int16))
    assert np.array_equal(half, as_int16.view(torch.float16).float().numpy(), equal_nan=True)
    assert np.array_equal(bfloat, as_int16.view(torch.bfloat16).float().numpy(), equal_nan=True)

    exponents = np.arange(512, dtype=np.uint32) << 23
    # Low parts around every tie of both formats, for even and odd results.
    tails = np.array([t + d for t in (0, 0x1000, 0x2000, 0x3000, 0x8000, 0x18000, 0x400000, 0x7FFFFF) for d in (-1, 0, 1)])
    values = (exponents[:, None] + (tails & 0x7FFFFF).astype(np.uint32)[None]).ravel().view(np.float32)
    values = np.concatenate([values, np.random.randn(10000).astype(np.float32) * 2e-5])  # half's subnormal range
    half16, bfloat16 = np.zeros(values.size, np.uint16), np.zeros(values.size, np.uint16)
    library.selftest_halves(pointer(values), pointer(half16), pointer(bfloat16), ctypes.c_int64(values.size))
    for mine, dtype in ((half16, torch.float16), (bfloat16, torch.bfloat16)):
        expected = torch.from_numpy(values).to(dtype)
        got = torch.from_numpy(mine.view(np.int16)).view(dtype)
        nan = expected.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16)), dtype
