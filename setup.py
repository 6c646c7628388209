"""Builds the compiled half of atrous_kernels with CMake; everything else about the package is in pyproject.toml.

Environment: ``ATROUS_CUDA=AUTO|ON|OFF``, ``ATROUS_CUDA_ARCHS`` (default: those of ``80;90a;100;120`` that nvcc knows),
``ATROUS_SANITIZE`` (``address,undefined``), ``ATROUS_OUTPUT`` (the folder that receives the results instead of the package),
``ATROUS_BUILD_TYPE`` (default ``Release``), ``CMAKE_BUILD_PARALLEL_LEVEL``. Uses neither the network nor a GPU. Without a
compiler or CMake the package installs all the same and runs on Python, Triton and the framework's own operators.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def _missing() -> list[str]:
    """What a build needs and this machine lacks."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    needs = {
        "a C++ compiler": any(shutil.which(name) for name in compilers),
        "cmake": shutil.which("cmake") is not None,
        "pybind11": importlib.util.find_spec("pybind11") is not None,
        "torch": importlib.util.find_spec("torch") is not None,
    }
    return [name for name, found in needs.items() if not found]


class CMakeBuild(build_ext):
    """One CMake project gives the libraries and the module; setuptools only learns where they are."""

    def run(self) -> None:
        missing = _missing()
        if missing:
            if os.environ.get("ATROUS_CUDA") == "ON":
                raise RuntimeError(f"ATROUS_CUDA=ON, but the compiled library cannot be built without {', '.join(missing)}")
            line = f"atrous_kernels: {', '.join(missing)} not found, so the compiled library is NOT built."
            print(f"{'!' * len(line)}\n{line}\nEverything works without it, but slower.\n{'!' * len(line)}", file=sys.stderr)
            return
        self._build()

    def _build(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "atrous_kernels" if in_place else Path(self.build_lib).resolve() / "atrous_kernels"
        if os.environ.get("ATROUS_OUTPUT"):
            package = Path(os.environ["ATROUS_OUTPUT"]).resolve()
        sanitize = os.environ.get("ATROUS_SANITIZE", "")
        # A sanitized build next to the ordinary one: neither recompiles the other's objects.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-sanitized' if sanitize else ''}"
        cache = folder / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(folder)  # the source tree was copied or moved
        # Paths are given anew each time: an isolated build has its tools and torch in a folder of its own.
        torch = importlib.util.find_spec("torch")
        assert torch is not None
        assert torch.origin is not None
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(folder),
            f"-DATROUS_OUTPUT={package}",
            f"-DATROUS_TORCH={Path(torch.origin).parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('ATROUS_BUILD_TYPE', 'Release')}",
            f"-DATROUS_CUDA={os.environ.get('ATROUS_CUDA', 'AUTO')}",
            f"-DATROUS_CUDA_ARCHS={os.environ.get('ATROUS_CUDA_ARCHS', 'AUTO')}",
            f"-DATROUS_SANITIZE={sanitize}",
        ]  # fmt: skip
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        elif cache.exists() and "CMAKE_GENERATOR:INTERNAL=Ninja" in cache.read_text():
            shutil.rmtree(folder)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder)], check=True)

    # Only what was really built: a build without a compiler has no outputs.
    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {built: source for built, source in super().get_output_mapping().items() if Path(built).exists()}


setup(ext_modules=[Extension("atrous_kernels._introspect", sources=[])], cmdclass={"build_ext": CMakeBuild})
