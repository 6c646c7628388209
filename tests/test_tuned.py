"""The measured table of automatic choice: what it says is done, what it lacks is left to the rules, what is shipped is sound."""

from __future__ import annotations

import json

import pytest
import torch

import atrous_kernels as ak
from atrous_kernels import dispatch, native, tuned
from atrous_kernels.problem import ConvProblem

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
PROBLEM = ConvProblem(1, 256, 256, (33, 33), (3, 3), padding=(2, 2), dilation=(2, 2), threads=torch.get_num_threads())


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict:
    times: dict[str, float] = {}
    monkeypatch.setattr(tuned, "table", lambda: {"conv2d": {tuned.bucket(PROBLEM): times}})
    dispatch.forget()
    yield times
    dispatch.forget()


def test_the_fastest_that_was_measured_is_chosen(table: dict) -> None:
    for best in ("winograd", "cpu", "torch"):
        table.clear()
        table.update({"winograd": 2.0, "cpu": 2.0, "torch": 2.0} | {best: 1.0})
        explanation = dispatch.explain("conv2d", PROBLEM)
        assert explanation.chosen == best
        losers = [c for c in explanation.choices if c.name in table and c.name != best]
        assert best == "torch" or any(f"took 2.00 times as long as {best}" in c.reason for c in losers)


def test_ieee_precision_compares_without_winograd(table: dict) -> None:
    table.update({"winograd": 1.0, "cpu": 2.0, "torch": 3.0})
    with ak.precision("ieee"):
        assert dispatch.explain("conv2d", PROBLEM).chosen == "cpu"


def test_problems_that_are_alike_share_a_bucket_and_others_do_not() -> None:
    def key(**changes: object) -> str:
        return tuned.bucket(ConvProblem(**(PROBLEM.__dict__ | changes)))

    assert key() == key(in_channels=250, in_size=(35, 31))
    others = [
        key(in_channels=512), key(in_size=(129, 129)), key(channels_last=True), key(dtype=torch.bfloat16), key(stride=(2, 2)),
        key(kernel=(1, 1), padding=(0, 0)), key(dilation=(12, 12), padding=(12, 12)), key(groups=256), key(groups=2),
        key(threads=PROBLEM.threads % 2 + 1),
    ]  # fmt: skip
    assert len({key(), *others}) == 1 + len(others)


def test_degenerate_problems_have_a_bucket() -> None:
    tuned.bucket(ConvProblem(0, 1, 1, (1, 1), (1, 1)))
    tuned.bucket(ConvProblem(1, 0, 4, (5, 5), (3, 3), dilation=(2, 2), padding=(2, 2)))


def test_the_shipped_tables_are_sound() -> None:
    paths = list(tuned.FOLDER.glob("cpu_*.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text())
        assert found["commit"]
        assert found["machine"]
        assert set(found["milliseconds"]) == {"conv2d", "conv2d_input", "conv2d_weight", "conv_bn_act"}
        for rows in found["milliseconds"].values():
            for times in rows.values():
                assert {"cpu", "torch"} <= set(times) <= {"winograd", "cpu", "torch"}
                assert all(time > 0 for time in times.values())
