"""The stable-ABI binding of the CUDA kernels: run on CPU tensors with the emulated kernels, and free of unstable symbols."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from torch.nn.functional import conv2d as framework_conv2d
from torch.nn.grad import conv2d_input as framework_conv2d_input
from torch.nn.grad import conv2d_weight as framework_conv2d_weight

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels with")


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated.ops()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_ops(ops: Any, dtype: torch.dtype, groups: int, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    geometry = ([2, 1], [3, 2], [3, 2], groups)
    # Small integers: every sum is exact in float32; that bfloat16 holds the results is asserted below.
    x, w, b = (torch.randint(-1, 2, size) for size in ((1, 4, 9, 7), (8, 4 // groups, 3, 3), (8,)))
    X, W, B = x.double(), w.double(), b.double()
    exact = framework_conv2d(X, W, B, *geometry)
    G = torch.randint(-1, 2, exact.shape).double()
    expected = (exact, framework_conv2d_input(x.shape, W, G, *geometry), framework_conv2d_weight(X, w.shape, G, *geometry))
    assert max(tensor.abs().max() for tensor in expected) <= 256, "bfloat16 holds integers exactly up to 256"
    x, w, g = (tensor.to(dtype).contiguous(memory_format=layout) for tensor in (X, W, G))
    strided_bias = torch.stack([b, b], 1).to(dtype)[:, 0]
    results = (
        ops.conv2d(x, w, strided_bias, *geometry),
        ops.conv2d_input(x.shape, w, g, *geometry),
        ops.conv2d_weight(x, w.shape, g, *geometry),
    )
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=layout)
        assert torch.equal(result.double(), reference)


def test_layout_of_results_follows_the_framework(ops: Any) -> None:
    """One channels-last factor is enough."""
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    for a, b in ((x, w), (x.to(memory_format=torch.channels_last), w), (x, w.to(memory_format=torch.channels_last))):
        assert ops.conv2d(a, b, None, *geometry).stride() == framework_conv2d(a, b, None, *geometry).stride()


def _calls(ops: Any) -> dict[str, Any]:
    x, w, depthwise = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4, 1, 3, 3)
    calls = {}
    for name, weight, groups in (("", w, 1), ("depthwise ", depthwise, 4)):
        geometry = ([1, 1], [2, 2], [2, 2], groups)
        calls[f"{name}conv2d"] = lambda weight=weight, geometry=geometry: ops.conv2d(x, weight, None, *geometry)
        calls[f"{name}conv2d_input"] = lambda weight=weight, geometry=geometry: ops.conv2d_input(x.shape, weight, x, *geometry)
        calls[f"{name}conv2d_weight"] = lambda weight=weight, geometry=geometry: ops.conv2d_weight(x, weight.shape, x, *geometry)
    target, ones, bins = torch.zeros(1, 12, 12, dtype=torch.int64), torch.ones(4), [1, 1, 2, 2]
    calls["upsample_argmax"] = lambda: ops.upsample_argmax(x, [12, 12], False)
    calls["upsample_cross_entropy"] = lambda: ops.upsample_cross_entropy(x, target, ones, None, 255, 0.0, False, False, True)
    for maximum in (False, True):
        calls[f"pyramid_pool {maximum}"] = lambda maximum=maximum: ops.pyramid_pool(x, bins, maximum)
        pooled, index = ops.pyramid_pool(x, bins, maximum)
        calls[f"pyramid_pool_input {maximum}"] = lambda maximum=maximum, pooled=pooled, index=index: ops.pyramid_pool_input(
            pooled, index, x.shape, bins, maximum, False
        )
    near, filters = x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)
    geometry = ([1, 1], [2, 2], [2, 2], 1)
    calls["conv2d_tensor_core"] = lambda: ops.conv2d_tensor_core(near, filters, None, *geometry)
    calls["conv2d_input_tensor_core"] = lambda: ops.conv2d_input_tensor_core(x.shape, filters, near, *geometry)
    calls["conv2d_weight_tensor_core"] = lambda: ops.conv2d_weight_tensor_core(near, w.shape, near, *geometry)
    calls["permutohedral_lattice"] = lambda: ops.permutohedral_lattice(torch.randn(1, 36, 2))
    return calls


def test_every_launch_is_on_the_current_stream_of_a_guarded_device(ops: Any) -> None:
    binding, kernels = ctypes.CDLL(str(emulated.binding_library())), ctypes.CDLL(str(emulated.kernel_library()))
    kernels.emulated_launches.restype = kernels.emulated_launches_elsewhere.restype = ctypes.c_int64
    stream = ctypes.c_void_p.in_dll(binding, "binding_stream")

    def counted(name: str) -> int:
        return ctypes.c_int64.in_dll(binding, f"binding_{name}").value

    for name, call in _calls(ops).items():
        before = counted("guards_opened")
        stream.value = 0x5EED
        kernels.emulated_expect_stream(ctypes.c_void_p(0x5EED))
        try:
            call()
        finally:
            stream.value = None
        assert kernels.emulated_launches() > 0, name
        assert kernels.emulated_launches_elsewhere() == 0, name
        assert counted("guards_opened") == counted("guards_closed") == before + 1, name
        assert counted("unguarded_streams") == 0, name


def test_the_device_guard_is_released_by_an_error(ops: Any) -> None:
    library = ctypes.CDLL(str(emulated.binding_library()))
    counters = [ctypes.c_int64.in_dll(library, f"binding_guards_{name}") for name in ("opened", "closed")]
    with pytest.raises(RuntimeError):
        ops.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 5, 5), None, [1, 1], [0, 0], [1, 1], 1)
    assert counters[0].value == counters[1].value


@pytest.mark.parametrize("binding", emulated.BINDINGS, ids=lambda path: path.stem)
def test_every_op_has_a_guard_and_the_framework_s_memory(binding: Path) -> None:
    text = binding.read_text()
    assert text.count("DeviceGuard guard(") >= text.count("m.impl(") > 0
    assert "cudaMalloc" not in text
    assert "STABLE_TORCH_ERROR_CODE_CHECK" not in text + (binding.parent / "binding.h").read_text()  # not in PyTorch 2.11


GOOD = dict(
    input=torch.zeros(1, 4, 5, 5), weight=torch.zeros(6, 2, 3, 3), bias=torch.zeros(6), stride=[1, 1], padding=[1, 1],
    dilation=[1, 1], groups=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input=torch.zeros(4, 5, 5)), r"input: expected 4 dimensions, but got sizes \[4, 5, 5\]"),
        (dict(weight=torch.zeros(6, 3, 3, 3)), r"6 channels for a weight of sizes \[6, 3, 3, 3\] and 2 groups"),
        (dict(weight=torch.zeros(5, 2, 3, 3)), r"weight: expected .* divisible by 2 groups, but got sizes \[5, 2, 3, 3\]"),
        (dict(weight=torch.zeros(6, 2, 3, 3, dtype=torch.float16)), "weight: expected the dtype of input"),
        (dict(bias=torch.zeros(5)), r"bias: expected sizes \[6\], but got \[5\]"),
        (dict(bias=torch.zeros(6, dtype=torch.float64)), "bias: expected the dtype of input"),
        (dict(stride=[0, 1]), r"stride: expected values of at least 1, but got \[0, 1\]"),
        (dict(stride=[1]), r"stride: expected 2 values \(height, width\), but got \[1\]"),
        (dict(padding=[-1, 0]), r"padding: expected .* but got \[-1, 0\]"),
        (dict(dilation=[1, 0]), r"dilation: expected .* but got \[1, 0\]"),
        (dict(dilation=[4, 1]), r"padded extent of at least 9 \(kernel 3, dilation 4\), but got 7"),
        (dict(groups=0), "groups: expected at least 1, but got 0"),
        (
            {name: GOOD[name].int() for name in ("input", "weight", "bias")},
            "dtype: expected float32, float64, float16 or bfloat16",
        ),
    ],
)
def test_errors_name_the_value(ops: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.conv2d(*(GOOD | change).values())


def test_errors_of_the_gradients(ops: Any) -> None:
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x, w, g = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), torch.zeros(1, 3, 4, 5)
    with pytest.raises(RuntimeError, match=r"grad_output: expected .*\[1, 3, 5, 5\], but got \[1, 3, 4, 5\]"):
        ops.conv2d_input(x.shape, w, g, *geometry)
    with pytest.raises(RuntimeError, match=r"grad_output: expected .*\[1, 3, 5, 5\], but got \[1, 3, 4, 5\]"):
        ops.conv2d_weight(x, w.shape, g, *geometry)


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to list symbols with")
@pytest.mark.parametrize("binding", emulated.BINDINGS, ids=lambda path: path.stem)
def test_only_stable_symbols_are_used(binding: Path, tmp_path: Path) -> None:
    """What the binding takes from LibTorch is its C interface, which keeps its meaning from version to version."""
    cxx = emulated.compiler()
    assert cxx is not None
    target = tmp_path / "binding.o"
    subprocess.run([cxx, *emulated.FLAGS, *emulated.STABLE_ABI, "-c", str(binding), "-o", str(target)], check=True)
    listing = subprocess.run(["nm", "-C", "-u", str(target)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=1)[1] for line in listing.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert not [symbol for symbol in symbols if symbol.startswith(("at::", "c10::", "torch::"))]
