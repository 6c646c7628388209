"""No number in the docs is typed by hand."""

from __future__ import annotations

from importlib import util

import pytest

from atrous_kernels import native
from benchmarks import plan, report


@pytest.mark.skipif(
    native.cpu_missing() is not None or util.find_spec("triton") is None,
    reason="the explain output in the README is that of a machine with the compiled library and Triton",
)
def test_docs_say_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0


def test_the_ratio_is_between_the_best_settings_of_both() -> None:
    times = {"torch contiguous": 3.0, "torch channels_last": 2.0, "torch.compile contiguous": 4.0, "ours auto contiguous": 1.0}
    row = {"candidates": {name: {"p50_ms": value} for name, value in times.items()}}
    assert report.ratio(row) == 2.0
    assert report.geomean([2.0, 8.0]) == pytest.approx(4.0)


def test_the_modelled_plans_are_those_of_the_launchers() -> None:
    assert plan.PATH.read_text() == plan.text(), "run python -m benchmarks.plan and commit the result"
