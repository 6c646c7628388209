"""The Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atrous_kernels.triton import report

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "triton_resources.json"
# Bytes of shared memory one block may have: CUDA programming guide, compute capabilities.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    path = tmp_path_factory.mktemp("report") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "atrous_kernels.triton.report", "--output", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_every_kernel_is_compiled_for_every_target(table: dict[str, Any]) -> None:
    compiled = {(row["kernel"], row["op"], row["dtype"], row["target"]) for row in table["rows"]}
    for target in SHARED_LIMIT:
        for dtype in ("bfloat16", "float32"):
            for module in ("conv2d", "depthwise_conv2d"):
                assert (f"{module}._correlate", "conv2d", dtype, target) in compiled
                assert (f"{module}._correlate", "conv2d_input", dtype, target) in compiled
                assert (f"{module}._correlate_weight", "conv2d_weight", dtype, target) in compiled
                for op in ("conv_bn_act", "conv2d_statistics"):
                    assert (f"{module}._correlate", op, dtype, target) in compiled
            assert ("common._sum_splits", "conv2d_weight", dtype, target) in compiled
            for op in ("aspp_branches", "aspp_branches_act"):
                assert ("aspp._branches", op, dtype, target) in compiled
            for kernel in ("_statistics", "_apply", "_sums", "_add_parts", "_input_gradient"):
                assert (f"conv_bn_relu.{kernel}", "conv_bn_relu", dtype, target) in compiled
            assert ("psp_conv._add_upsampled", "psp_conv", dtype, target) in compiled
            for kernel in ("_pool_cells", "_unite_cells", "_gather"):
                assert (f"pyramid_pool.{kernel}", "pyramid_pool", dtype, target) in compiled
            for kernel in ("_loss", "_finish", "_gather"):
                assert (f"upsample_cross_entropy.{kernel}", "upsample_cross_entropy", dtype, target) in compiled
            assert ("upsample_argmax._argmax", "upsample_argmax", dtype, target) in compiled


def test_no_spills_and_shared_memory_fits(table: dict[str, Any]) -> None:
    spilled = [row for row in table["rows"] if row["spill_bytes"]]
    assert spilled == []
    for row in table["rows"]:
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= SHARED_LIMIT[row["target"]], row


def _dense(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in table["rows"] if row["kernel"].startswith(("conv2d.", "aspp.", "psp_conv."))]


def test_dense_kernels_multiply_with_matrix_instructions(table: dict[str, Any]) -> None:
    dense = _dense(table)
    on_matrix_units = [row for row in dense if row["dtype"] != "float32" or row["tf32"]]
    assert len(on_matrix_units) > 20
    for row in on_matrix_units:
        # wgmma and tcgen05 work on 64 rows at a time; smaller tiles (few channels per group) use mma everywhere.
        newest = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[row["target"]]
        assert row[newest if row["blocks"][0] >= 64 else "mma"] > 0, row
    for row in dense:
        if row["dtype"] == "float32" and not row["tf32"]:
            assert row["mma"] == row["wgmma"] == row["tcgen05"] == 0, row  # a matrix instruction would round to TF32


def test_channels_last_tiles_are_copied_asynchronously(table: dict[str, Any]) -> None:
    # Of ASPP's branches as well: the alignment of weights found in a table is known to the compiler.
    rows = [row for row in _dense(table) if row["case"].startswith("ASPP") and row["channels_last"]]
    assert len(rows) >= 3 * (2 * 3 + 4)
    for row in rows:
        assert row["async_copies"] > 0, row


def test_weights_are_copied_in_blocks_from_sm_90_on(table: dict[str, Any]) -> None:
    whole = [row for row in _dense(table) if row["case"].startswith(("ASPP rate 12", "strided")) and row["op"] != "conv2d_weight"]
    for row in whole:
        wanted = row["channels_last"] and row["dtype"] != "float32" and row["target"] != "sm_80"
        assert (row["block_copies"] > 0) == wanted, row
    assert sum(row["block_copies"] > 0 for row in whole) >= 2 * (2 * 3 + 2)


def test_committed_table_is_current(table: dict[str, Any]) -> None:
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != table["triton"]:
        pytest.skip(f"committed for Triton {committed['triton']}, this is {table['triton']}")
    assert committed["rows"] == table["rows"], f"write it anew: python -m atrous_kernels.triton.report --output {COMMITTED}"


def test_compiling_while_interpreting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch = report.cases()[0].plan()[0]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        report.compile_launch(launch, 90)
