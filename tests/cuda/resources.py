"""Compiles the CUDA kernels for the supported architectures and tells what each needs: registers, shared memory, spills.

``python tests/cuda/resources.py`` rewrites ``benchmarks/results/cuda_resources.json``; a test holds the file against the
sources.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "cuda_resources.json"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100", "120")
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror"]

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_TILE = re.compile(r"TileShape<(\d+), (\d+),")


def nvcc() -> str | None:
    """The CUDA compiler: on the PATH, or below CUDA_HOME."""
    below_home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(below_home) if below_home.exists() else None)


def nvcc_version(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release \S+ V(\S+)", text)
    return found[1] if found else "unknown"


def compile_kernel_file(compiler: str, source: Path, target: Path) -> dict[str, Any]:
    """Compiles one file with warnings as errors; kernel -> architecture -> what it needs."""
    generate = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [compiler, *FLAGS, *generate, f"-I{ROOT / 'csrc/include'}", "-Xptxas", "-v", "-c", source, "-o", target]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc does not compile {source.name}:\n{done.stderr}")
    return parse(done.stderr)


def parse(report: str) -> dict[str, Any]:
    """Reads the report of ``ptxas -v``."""
    kernels: dict[str, Any] = {}
    entry: dict[str, int] = {}
    for line in report.splitlines():
        if found := _ENTRY.search(line):
            entry = kernels.setdefault(readable(found[1]), {}).setdefault(found[2], {})
        if found := _FRAME.search(line):
            entry.update(
                zip(("stack_bytes", "spill_store_bytes", "spill_load_bytes"), map(int, found.groups()), strict=True)
            )
        if found := _USED.search(line):
            shared = _SHARED.search(line)
            entry.update(registers=int(found[1]), shared_bytes=int(shared[1]) if shared else 0)
    for kernel, architectures in kernels.items():
        if tile := _TILE.search(kernel):
            for entry in architectures.values():
                entry["dynamic_shared_bytes"] = dynamic_shared_bytes(int(tile[1]), int(tile[2]))
    return dict(sorted(kernels.items()))


def dynamic_shared_bytes(rows: int, columns: int) -> int:
    """What a launch asks for, which the compiler does not see: four stages of 64 bytes for each row and column of a tile."""
    return 4 * 64 * (rows + columns)


def readable(symbol: str) -> str:
    """``correlate<float, 4>`` from a mangled name."""
    name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("atrous::cuda::", "").removeprefix("void ")
    return name.split("(")[0]


def measure(objects: Path) -> dict[str, Any]:
    """Compiles every kernel file into ``objects``."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is neither on the PATH nor below CUDA_HOME")
    files = {path.name: compile_kernel_file(compiler, path, objects / f"{path.stem}.o") for path in KERNELS}
    return {"nvcc": nvcc_version(compiler), "flags": " ".join(FLAGS), "files": files}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}")
