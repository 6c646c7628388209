"""A process that interprets Triton kernels, beside the one that runs the tests.

``TRITON_INTERPRET`` counts when Triton is first imported, and some other test may have imported it already.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

Interpret = Callable[..., Any]


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """``interpret(function, *arguments)`` calls a function of ``interpreted`` in the process that interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 fails under NumPy 2.4 for loops over runtime bounds")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            pool.submit(os.getpid).result(timeout=60)  # started, so it has its copy of the environment
            _restore("TRITON_INTERPRET", before)
            yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)
    finally:
        _restore("TRITON_INTERPRET", before)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
