"""What every committed result carries: machine, versions, threads, commit."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from atrous_kernels import native


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    introspect = native.introspect()
    cpu = machine_info.get("cpu", {})
    keep = {key: cpu.get(key) for key in ("brand_raw", "arch", "count", "l2_cache_size", "l3_cache_size")}
    machine_info.clear()
    machine_info.update(
        cpu=keep,
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        mkldnn=torch.backends.mkldnn.is_available(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cudnn=torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        instruction_set=introspect.selected_isa() if introspect else "library not built",
        load_average=os.getloadavg()[0],
    )


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """The times of every candidate are in extra_info; the plugin's own list of ours would say the same again."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
