"""What the kernels use of Triton's language, held against what was tried: ``make test-triton VERSION=...``."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "atrous_kernels" / "triton"
# Interpreted and compiled with Triton 3.6.0, 3.7.0, 3.8.0 and 3.9.0.
TRIED = """
    PropagateNan PropagateNan.ALL arange cast cdiv constexpr debug_barrier div_rn dot exp exp2 float32 float64 full int32 int64
    load log2 max maximum min minimum multiple_of num_programs program_id reduce reshape rsqrt static_range store sum trans where
    zeros zeros_like
"""


def _used() -> set[str]:
    """``a.b`` of every ``tl.a.b``."""
    found = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            while isinstance(node, ast.Attribute):
                names.insert(0, node.attr)
                node = node.value
            if names and isinstance(node, ast.Name) and node.id == "tl":
                found.add(".".join(names))
    return found


def test_only_what_every_version_has() -> None:
    untried = _used() - set(TRIED.split())
    assert not untried, f"try {untried} with every version, `make test-triton VERSION=3.6.0` and the others, then list them here"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_this_version_has_it() -> None:
    import triton.language as tl

    for name in TRIED.split():
        value = tl
        for part in name.split("."):
            value = getattr(value, part)
