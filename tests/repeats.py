"""The same computation again: with other numbers of threads, with poisoned scratch memory, on a lesser instruction set.

The last two take a process of their own: the library reads both settings when it loads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from textwrap import indent

import pytest
import torch
from torch import Tensor

from atrous_kernels import native

_DIGESTS = """
import hashlib, torch, atrous_kernels as ak
for threads in (1, 2, 3, 5):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results = []
{body}
    print(hashlib.sha256(b"".join(each.detach().double().contiguous().numpy().tobytes() for each in results)).hexdigest())
"""


def assert_same_bits_for_threads(call: Callable[[], Sequence[Tensor]]) -> None:
    """``call`` gives the same with 1, 2, 3 and again 1 threads: they share out the work, and never change the order of a sum."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def assert_same_bits(body: str) -> None:
    """Statements that add tensors to ``results`` add the same for 1, 2, 3 and 5 threads, scratch memory clean or poisoned."""
    digests = []
    for poison in ("0", "1"):
        command = [sys.executable, "-c", _DIGESTS.format(body=indent(body, "    "))]
        done = subprocess.run(command, env=os.environ | {"ATROUS_POISON": poison}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests += done.stdout.split()
    assert len(digests) == 8
    assert len(set(digests)) == 1


def built_isas() -> list[str]:
    """The instruction sets of the compiled library that this machine has, least first."""
    facts = native.introspect()
    if facts is None:
        return []
    built = facts.build_facts()["isas"]
    return built[: built.index(facts.selected_isa()) + 1]


def repeat_capped(isa: str, chosen: str, *files: str) -> subprocess.CompletedProcess[str]:
    """Runs the tests of ``files`` that ``chosen`` (pytest's -k) selects, capped to ``isa`` and with poisoned scratch memory."""
    if os.environ.get("ATROUS_CPU_ISA"):
        pytest.skip("already capped to an instruction set")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen]
    return subprocess.run(
        command, env=os.environ | {"ATROUS_CPU_ISA": isa, "ATROUS_POISON": "1"}, capture_output=True, text=True
    )
