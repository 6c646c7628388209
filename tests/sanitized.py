"""The op tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer: ``python -m tests.sanitized``.

The sanitized library goes to ``build/sanitized``; the installed one stays as it is. Python itself is not instrumented, so the
sanitizers' runtimes are preloaded. The best instruction set runs all op tests, the others the exact ones, each the fuzz.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from atrous_kernels import native

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "build" / "sanitized"
PROBLEMS = 150

# Left out with the best instruction set: what needs more memory than the sanitizer leaves, what runs Python, not kernels, and
# float64, which is the same templates (the fuzz has it).
SKIPPED = (
    "torch.float64 or beyond_32 or 2_to_the_31 or instruction_set or compile or export or opcheck or own_samples or own_error"
)

# An array that claims one row more than its memory has: the kernel must be caught reading it.
OVERFLOW = """
import numpy, torch
from numpy.lib.stride_tricks import as_strided
from atrous_kernels import native
assert native.cpu_missing() is None
x = torch.from_numpy(as_strided(numpy.zeros(16 * 64 * 64, numpy.float32), (1, 16, 65, 64)))
torch.ops.atrous_native.conv2d(x, torch.zeros(16, 16, 3, 3), None, [1, 1], [1, 1], [1, 1], 1)
"""


def build() -> None:
    settings = {"ATROUS_SANITIZE": "address,undefined", "ATROUS_CUDA": "OFF", "ATROUS_OUTPUT": str(OUTPUT)}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext"], cwd=ROOT, env=os.environ | settings, check=True)


def environment() -> dict[str, str]:
    """Ours plus the sanitized library and its runtimes, as the compiler that built it knows them."""
    compiler = os.environ.get("CXX", "c++").split()
    find = [subprocess.check_output([*compiler, f"-print-file-name=lib{n}.so"], text=True).strip() for n in ("asan", "ubsan")]
    return os.environ | {
        "ATROUS_LIBRARY_DIR": str(OUTPUT / "_lib"),
        "LD_PRELOAD": ":".join(find),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaks by design
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "ATROUS_POISON": "1",
    }


def isas() -> list[str]:
    introspect = native.introspect()
    if introspect is None:
        return ["portable"]
    built = introspect.build_facts()["isas"]
    return built[: built.index(introspect.selected_isa()) + 1]


def main() -> int:
    build()
    settings = environment()
    caught = subprocess.run([sys.executable, "-c", OVERFLOW], env=settings, capture_output=True, text=True)
    if caught.returncode == 0 or "heap-buffer-overflow" not in caught.stderr:
        print(f"the sanitized library did not catch a read past its input:\n{caught.stderr}", file=sys.stderr)
        return 1
    for isa in isas():
        print(f"{isa}:", flush=True)
        settings["ATROUS_CPU_ISA"] = isa
        best = isa == isas()[-1]
        tests = ["tests/test_native_cpu.py", "tests/ops"] if best else ["tests/test_native_cpu.py"]
        chosen = f"not ({SKIPPED})" if best else "integers or empty"
        pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", chosen]
        for command in (pytest, ["-m", "tests.fuzz", "--problems", str(PROBLEMS)]):
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=settings)
            if done.returncode != 0:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
