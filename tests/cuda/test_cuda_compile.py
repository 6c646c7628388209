"""The CUDA kernels compiled by nvcc for every supported architecture: no warning, no spill, and current figures."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import emulated
import pytest
import resources

pytestmark = [
    pytest.mark.skipif(resources.nvcc() is None, reason="no nvcc to compile CUDA kernels with"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt to read kernel names with"),
]


# Kernels of each file: 4 dtypes in 2 widths, if not said otherwise.
KERNELS = {
    "conv2d.cu": 4 * 2 * 2,
    "conv2d_tensor_core.cu": 3 * 2 * 2,  # dtypes, tiles; either channel innermost in the weight
    "conv2d_weight_tensor_core.cu": 3 * 2,
    "depthwise_conv2d.cu": 4 * 2 * 2,
    "sum_partials.cu": 4,
    "upsample_argmax.cu": 2,  # float and double: logits of other types are converted before
    "upsample_cross_entropy.cu": 2 * 2 + 1,  # tiles, their gradients gathered; the sum of their losses
    # Points placed in 2 dtypes and 1 to 6 dimensions; in each dimension corners inserted, vertices connected; the rest.
    "permutohedral_lattice.cu": 2 * 6 + 2 * 6 + 9 + 2,
    "permutohedral_filter.cu": 2 * 4,
    "pyramid_pool.cu": 4 * 2 * (2 + 1) + 4 * (2 + 1),  # cells of averages and maxima, their spread; bins, sent maxima
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def measured(objects: Path) -> dict[str, Any]:
    return resources.measure(objects)


def test_no_spills(measured: dict[str, Any]) -> None:
    assert {file: len(kernels) for file, kernels in measured["files"].items()} == KERNELS
    for file, kernels in measured["files"].items():
        for kernel, architectures in kernels.items():
            assert set(architectures) == {f"sm_{arch}" for arch in resources.ARCHITECTURES}
            for architecture, needs in architectures.items():
                where = f"{file}: {kernel} on {architecture}: {needs}"
                assert needs["spill_store_bytes"] == needs["spill_load_bytes"] == needs["stack_bytes"] == 0, where
                assert 0 < needs["registers"] <= 255, where
                assert needs["shared_bytes"] <= 48 * 1024, where
                # What a block can ask for where it is least: on sm_86, sm_89 and sm_120.
                assert needs["shared_bytes"] + needs.get("dynamic_shared_bytes", 0) <= 99 * 1024, where


def test_committed_figures_are_current(measured: dict[str, Any]) -> None:
    committed = json.loads(resources.RESULT.read_text())
    if committed["nvcc"] != measured["nvcc"]:
        pytest.skip(f"the committed figures are of nvcc {committed['nvcc']}, this is {measured['nvcc']}")
    assert measured == committed, "run python tests/cuda/resources.py and commit the result"


@pytest.mark.usefixtures("measured")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to list symbols with")
def test_launchers_neither_allocate_nor_wait(objects: Path) -> None:
    """A CUDA graph can capture them, and all memory is the framework's: of the CUDA runtime they use launches alone."""
    found = set()
    for path in resources.KERNELS:
        listing = subprocess.run(["nm", "-u", str(objects / f"{path.stem}.o")], check=True, capture_output=True, text=True).stdout
        found |= {line.split()[-1] for line in listing.splitlines()}
    assert {"cudaLaunchKernel", "__cudaLaunchKernel"} & found  # nvcc before 13, and since
    harmful = ("Malloc", "Free", "Memcpy", "Memset", "Synchronize", "Create", "Destroy", "SetDevice", "HostRegister")
    assert not [name for name in found if name.startswith("cuda") and any(word in name for word in harmful)]


@pytest.mark.usefixtures("measured")
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler for the binding")
def test_library_links(objects: Path) -> None:
    """Kernels and bindings become one library whose only open ends are LibTorch's C interface and system libraries."""
    compiler, nvcc = emulated.compiler(), resources.nvcc()
    assert compiler is not None
    assert nvcc is not None
    compiled = [str(objects / f"{path.stem}.o") for path in [*resources.KERNELS, *emulated.BINDINGS]]
    for binding in emulated.BINDINGS:
        target = str(objects / f"{binding.stem}.o")
        subprocess.run([compiler, *emulated.FLAGS, *emulated.STABLE_ABI, "-c", str(binding), "-o", target], check=True)
    library = objects / "libatrous_cuda.so"
    subprocess.run([nvcc, "-shared", *compiled, "-o", str(library)], check=True)
    listing = subprocess.run(["nm", "-D", "-u", "-C", str(library)], check=True, capture_output=True, text=True).stdout
    open_ends = [line.split(maxsplit=1)[1] for line in listing.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in open_ends
    assert not [symbol for symbol in open_ends if symbol.startswith(("atrous", "at::", "c10::", "torch::"))]
