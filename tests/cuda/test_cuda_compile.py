"""The CUDA kernels compiled by nvcc for sm_80 and sm_90a: no warning, no spill, and the committed figures are theirs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import emulated
import pytest
import resources
from test_cuda_binding import BINDING, STABLE_ABI

pytestmark = [
    pytest.mark.skipif(resources.nvcc() is None, reason="no nvcc to compile CUDA kernels with"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt to read kernel names with"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def measured(objects: Path) -> dict[str, Any]:
    return resources.measure(objects)


def test_no_spills(measured: dict[str, Any]) -> None:
    count = 0
    for file, kernels in measured["files"].items():
        for kernel, architectures in kernels.items():
            assert set(architectures) == {f"sm_{arch}" for arch in resources.ARCHITECTURES}
            for architecture, needs in architectures.items():
                where = f"{file}: {kernel} on {architecture}: {needs}"
                assert needs["spill_store_bytes"] == needs["spill_load_bytes"] == needs["stack_bytes"] == 0, where
                assert 0 < needs["registers"] <= 255, where
                assert needs["shared_bytes"] <= 48 * 1024, where
                count += 1
    # 4 dtypes on 2 architectures: 2 dense kernels in 2 widths, 2 depthwise kernels in 2 widths, the sum of the splits.
    assert count == 4 * 2 * (2 * 2 + 2 * 2 + 1)


def test_committed_figures_are_current(measured: dict[str, Any]) -> None:
    committed = json.loads(resources.RESULT.read_text())
    if committed["nvcc"] != measured["nvcc"]:
        pytest.skip(f"the committed figures are of nvcc {committed['nvcc']}, this is {measured['nvcc']}")
    assert measured == committed, "run python tests/cuda/resources.py and commit the result"


@pytest.mark.usefixtures("measured")
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler for the binding")
def test_library_links(objects: Path) -> None:
    """Kernels and binding become one library whose only open ends are LibTorch's C interface and system libraries."""
    compiler, nvcc = emulated.compiler(), resources.nvcc()
    assert compiler is not None
    assert nvcc is not None
    binding = objects / "conv2d_ops.o"
    subprocess.run([compiler, *emulated.FLAGS, *STABLE_ABI, "-c", str(BINDING), "-o", str(binding)], check=True)
    library = objects / "libatrous_cuda.so"
    compiled = [str(objects / f"{path.stem}.o") for path in resources.KERNELS]
    subprocess.run([nvcc, "-shared", *compiled, str(binding), "-o", str(library)], check=True)
    listing = subprocess.run(["nm", "-D", "-u", "-C", str(library)], check=True, capture_output=True, text=True).stdout
    open_ends = [line.split(maxsplit=1)[1] for line in listing.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in open_ends
    assert not [symbol for symbol in open_ends if symbol.startswith(("atrous", "at::", "c10::", "torch::"))]
