"""The checkers of the emulation: races in shared memory, asynchronous copies, matrix fragments; and the library under them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
import resources
import torch
from test_emulator import pointer

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")

SELFTEST = Path(__file__).with_name("checker_selftest.cu")


def _load(name: str, sources: list[Path], flags: list[str]) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(emulated.compile_library(name, sources, flags)))
    for function in (loaded.selftest_exchange, loaded.selftest_copy, loaded.selftest_product):
        function.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=emulated.SCHEDULES)
def checked(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The kernels with every access reported, under each order of threads: what is found must not depend on it."""
    library = _load("checker_selftest_checked", [SELFTEST, emulated.ACCESS_HOOKS], emulated.CHECKED)
    library.selftest_schedule(emulated.SCHEDULES[request.param], 3)
    yield library
    library.selftest_schedule(emulated.SCHEDULES["ascending"], 0)


@pytest.fixture
def unchecked() -> ctypes.CDLL:
    return _load("checker_selftest", [SELFTEST], [])


THREADS = np.arange(64, dtype=np.float32)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        pytest.param(0, 63 - THREADS, id="barrier"),
        pytest.param(1, None, id="no barrier"),
        pytest.param(2, None, id="written while others read"),
        pytest.param(3, 63 - THREADS, id="barrier between reading and writing"),
        pytest.param(4, None, id="two writers"),
        pytest.param(5, np.arange(64) ^ 1, id="syncwarp"),
        pytest.param(6, None, id="nothing within a warp"),
        pytest.param(7, None, id="a shuffle orders no memory"),
        pytest.param(8, None, id="syncwarp orders no other warp"),
        pytest.param(9, None, id="syncwarp orders no lane outside its mask"),
        pytest.param(10, np.arange(64) ^ 8, id="syncwarp of half a warp"),
        pytest.param(11, THREADS * 0 + 5, id="all read one value"),
        pytest.param(12, THREADS * 0 + 7, id="two writers of one word, but not of one byte"),
    ],
)
def test_races(checked: ctypes.CDLL, which: int, expected: np.ndarray | None) -> None:
    out = np.zeros(64, np.float32)
    error = checked.selftest_exchange(which, pointer(out))
    if expected is None:
        assert error is not None
        assert b"staged + " in error
        assert b"without a barrier since an access by thread (" in error
    else:
        assert error is None, error
        assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        pytest.param(0, None, id="waits and meets"),
        pytest.param(1, b"reads staged + ", id="reads before arrival"),
        pytest.param(2, b"without a barrier since an access", id="reads another thread's without a barrier"),
        pytest.param(3, b"where an asynchronous copy has not arrived", id="waits for what was not committed"),
        pytest.param(4, None, id="waits for the first of two groups"),
        pytest.param(5, b"where an asynchronous copy has not arrived", id="reads the second of two groups"),
        pytest.param(6, None, id="zeros for what does not exist"),
        pytest.param(7, b"misaligned addresses", id="misaligned"),
        pytest.param(8, b"returns while its asynchronous copies are under way", id="returns before arrival"),
        pytest.param(9, b"without a barrier since an access", id="overwrites what others read"),
        pytest.param(10, b"to what is not shared memory", id="to global memory"),
    ],
)
def test_asynchronous_copies(checked: ctypes.CDLL, which: int, message: bytes | None) -> None:
    values, out = np.random.rand(4 * 64 + 4).astype(np.float32), np.zeros(4 * 64, np.float32)
    offset = -values.ctypes.data % 16 // 4  # a 16-byte boundary
    values = values[offset:]
    error = checked.selftest_copy(which, pointer(values), pointer(out))
    if message is not None:
        assert error is not None
        assert message in error
        return
    assert error is None, error
    reversed_threads = values[: 4 * 64 : 4][::-1]
    if which == 6:
        reversed_threads = np.where(np.arange(64) % 2, reversed_threads, 0)
    assert np.array_equal(out[:64], reversed_threads * (2 if which == 4 else 1))


def test_a_copy_read_too_early_is_poison_without_the_checker_too(unchecked: ctypes.CDLL) -> None:
    values, out = np.random.rand(4 * 64 + 4).astype(np.float32), np.zeros(4 * 64, np.float32)
    values = values[-values.ctypes.data % 16 // 4 :]
    assert unchecked.selftest_copy(1, pointer(values), pointer(out)) is None
    assert np.isnan(out[:64]).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matrix_product(checked: ctypes.CDLL, dtype: torch.dtype, transposed: bool) -> None:
    a, b, c = (torch.randint(-8, 9, size).float() for size in ((16, 16), (16, 8), (16, 8)))
    stored = (b if transposed else b.T).contiguous()
    out = c.clone()
    operands = [a.to(dtype), stored.to(dtype), out]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in operands]
    assert checked.selftest_product(dtype is torch.bfloat16, transposed, 1, *pointers) is None
    assert torch.equal(out, c + a @ b)  # integers: exact
    error = checked.selftest_product(dtype is torch.bfloat16, transposed, 0, *pointers)
    assert error is not None
    assert b"without a barrier since an access" in error


@pytest.mark.skipif(resources.nvcc() is None, reason="no nvcc to compile CUDA kernels with")
def test_nvcc_takes_the_same_kernels(tmp_path: Path) -> None:
    compiler = resources.nvcc()
    assert compiler is not None
    kernels = resources.compile_kernel_file(compiler, SELFTEST, tmp_path / "selftest.o")
    assert len(kernels) == 6
    assert all(set(found) == {f"sm_{arch}" for arch in resources.ARCHITECTURES} for found in kernels.values())


LOSS = emulated.ROOT / "csrc" / "cuda" / "upsample_cross_entropy.cu"
RUN_LOSS = """
extern "C" const char* run_loss(const float* logits, const int64_t* labels, const float* weight, float* gradient, double* sums,
                                void* workspace, int64_t workspace_bytes) {
  using namespace atrous::cuda;
  static std::string failure;
  const UpsampleShape shape{1, 5, 3, 4, 64, 100, false};
  const Strides strides{60, 12, 4, 1};
  try {
    if (upsample_cross_entropy_workspace(shape, DType::float32, true) > workspace_bytes) return "a larger workspace";
    upsample_cross_entropy({shape, DType::float32, {logits, strides}, labels, LabelType::int64, weight, nullptr, 255, 0.0,
                            nullptr, {gradient, strides}, sums, workspace}, nullptr);
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}
"""


@pytest.mark.parametrize("removed", [None, 0, 1, 2])
def test_a_barrier_removed_from_a_kernel_of_the_library_is_found(removed: int | None, tmp_path: Path) -> None:
    parts = re.split(r"(__sync(?:warp|threads)\(\);)", LOSS.read_text())
    assert len(parts) == 2 * 3 + 1, "the kernels have three barriers"
    if removed is not None:
        parts[2 * removed + 1] = ";"
    mutant = tmp_path / "mutant.cpp"
    mutant.write_text("".join(parts) + RUN_LOSS)
    flags = [*emulated.CHECKED, f"-I{LOSS.parent}"]
    library = ctypes.CDLL(str(emulated.compile_library("mutant", [mutant, emulated.ACCESS_HOOKS], flags)))
    library.run_loss.restype = ctypes.c_char_p
    tensors = torch.randn(60), torch.randint(0, 5, (6400,)), torch.ones(5), torch.empty(60), torch.empty(2).double()
    workspace = torch.empty(1 << 16)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, workspace)]
    error = library.run_loss(*pointers, ctypes.c_int64(workspace.nbytes))
    if removed is None:
        assert error is None, error
    else:
        assert error is not None
        assert b"without a barrier since an access by thread (" in error


def _layouts(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor, tensor.contiguous(memory_format=torch.channels_last)]


def _convolutions(ops: Any, channels: int, groups: int) -> None:
    geometry = ([1, 1], [2, 2], [2, 2], groups)
    w = torch.randn(channels, channels // groups, 3, 3)
    for x in _layouts(torch.randn(1, channels, 7, 6)):
        y = ops.conv2d(x, w, torch.randn(channels), *geometry)
        ops.conv2d_input(x.shape, w, y, *geometry)
        ops.conv2d_weight(x, w.shape, y, *geometry)


def _pyramid(ops: Any, maximum: bool) -> None:
    for x in _layouts(torch.randn(2, 12, 7, 9)):
        values, index = ops.pyramid_pool(x, [1, 1, 3, 2], maximum)
        ops.pyramid_pool_input(values, index, x.shape, [1, 1, 3, 2], maximum, not x.is_contiguous())


def _losses(ops: Any, classes: int) -> None:
    target = torch.randint(0, classes, (2, 17, 37))
    for x in _layouts(torch.randn(2, classes, 3, 4)):
        ops.upsample_cross_entropy(x, target, torch.ones(classes), None, 0, 0.1, False, True, True)
        ops.upsample_argmax(x, [17, 37], True)


def _lattices(ops: Any, dimensions: int) -> None:
    *arrays, _ = ops.permutohedral_lattice(torch.rand(2, 300, dimensions) * 0.4)  # vertices of few points, and of many
    rows = torch.randn(600, 3)
    ops.permutohedral_filter(rows, *arrays, False)
    ops.permutohedral_filter_weights(rows, rows, *arrays, True)


@pytest.mark.parametrize(
    ("kernels", "argument"),
    [
        (lambda ops, channels: _convolutions(ops, channels, 1), 18),
        (lambda ops, channels: _convolutions(ops, channels, channels), 16),
        (lambda ops, channels: _convolutions(ops, channels, channels), 7),
        (_pyramid, False),
        (_pyramid, True),
        (_losses, 5),
        (_losses, 35),
        (_lattices, 2),
    ],
    ids=["dense", "depthwise", "depthwise, ragged", "averages", "maxima", "losses", "losses of many classes", "lattices"],
)
def test_the_library_has_no_races(kernels: Any, argument: Any) -> None:
    """Blocks take several pieces of work here, so arrays are used again as on a GPU with more work than blocks."""
    kernels(emulated.ops(checked=True), argument)
