"""What a run leaves behind to be compared with: machine, versions, commits, metrics.json and curves.png."""

from __future__ import annotations

import io
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from segmodels.engine.checkpoints import atomic_write


def machine() -> dict[str, Any]:
    """Processor, threads and accelerator, without anything that names this one computer."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    import cv2
    import numpy

    import atrous_kernels

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "opencv": cv2.__version__,
        "atrous_kernels": atrous_kernels.__version__,
    }


def current_commit() -> str:
    """Commit of the checkout this package runs from, with "+changes" where its files differ; "unknown" elsewhere."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", f"{folder.parent}", f"{folder.parents[1]}/atrous_kernels"
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def curves_png(path: str | os.PathLike[str], train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    """Loss, learning rate and validation mIoU over the iterations, written atomically.

    Args:
        path: the PNG.
        train: points with ``iteration``, ``loss``, ``lr``.
        validation: points with ``iteration``, ``miou``.
    """
    # Figure without pyplot: no global state, no display, Agg is its only canvas.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss_axis, score_axis = figure.subplots(1, 2)
    steps = [point["iteration"] for point in train]
    loss_axis.plot(steps, [point["loss"] for point in train], linewidth=1, label="training loss")
    loss_axis.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    rate_axis = loss_axis.twinx()
    rate_axis.plot(steps, [point["lr"] for point in train], linewidth=1, color="tab:orange", label="learning rate")
    rate_axis.set(ylabel="learning rate", ylim=(0, None))
    loss_axis.legend(handles=[*loss_axis.lines, *rate_axis.lines], loc="upper right", fontsize="small")
    score_axis.plot(
        [point["iteration"] for point in validation], [100 * (point["miou"] or 0) for point in validation], marker="o"
    )
    score_axis.set(xlabel="iteration", ylabel="validation mIoU [%]", ylim=(0, 100))
    score_axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    atomic_write(path, buffer.getvalue())


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
