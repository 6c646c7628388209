"""The findings: their definitions, the statistics, the runner and the report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from segmodels import create_model
from segmodels.config import ConfigError, load_config
from segmodels.reproduce.findings import command, definitions, experiment, main, report, results
from segmodels.reproduce.findings.arms import ARMS, Arm, merged
from segmodels.reproduce.findings.definitions import FINDINGS, Finding
from segmodels.reproduce.findings.experiment import Interrupted, checkpoint_path, needed, row_path, run
from segmodels.reproduce.findings.results import result_of, score
from segmodels.reproduce.findings.statistics import overall, paired, quantile_t

QUIET = pytest.mark.usefixtures("capsys")


# definitions


def test_findings_are_about_arms_in_the_order_of_the_papers():
    definitions.check()
    used = {arm for finding in FINDINGS.values() for arm in finding.arms}
    assert set(ARMS) == used | {needed(ARMS[arm]) for arm in used} - {None}
    for finding in FINDINGS.values():
        assert not any(character.isdigit() for character in finding.why), "numbers come from the rows"


@pytest.mark.parametrize(
    ("arms", "order", "message"),
    [
        ({"v3": 70.0, "v3_gird": 71.0}, (("v3", "v3_gird"),), "unknown arm 'v3_gird'"),
        ({"v3": 70.0, "v3_grid": 71.0}, (("v3", "v3_grid"),), "is not above v3_grid"),
    ],
)
def test_definitions_that_are_wrong(arms, order, message):
    with pytest.raises(ValueError, match=message):
        definitions.check({"wrong": Finding("", "", "", "", arms, order)})


@pytest.mark.parametrize("name", list(ARMS))
def test_the_settings_of_every_arm_make_a_network(name, monkeypatch):
    monkeypatch.setenv("ATROUS_SHARED", "/nowhere")
    arm = ARMS[name]
    config, _ = load_config({section: dict(values) for section, values in arm.settings.items()})
    with torch.device("meta"):
        model = create_model(
            config.model.name, 8, config.model.output_stride, aux_loss=config.model.aux_loss, **config.model.options
        )
    assert sum(parameter.numel() for parameter in model.parameters()) < 4e6
    if arm.start is not None:
        assert set(config.train.freeze) <= {part for part, _ in model.named_modules()}
    if arm.evaluates is not None:
        model.set_output_stride(config.eval.output_stride)


def test_most_taps_of_the_widest_rates_are_outside_the_map():
    """What ``DEGENERATE`` says, of the 7 x 7 map of 97 pixels at stride 16: rate 4 of the fourth branch and of multi-grid."""
    inside = {rate: ((2 * max(0, 7 - rate) / 7 + 1) / 3) ** 2 for rate in (1, 4)}
    assert inside[4] < 0.5 < inside[1]
    model = create_model("deeplabv3_resnet18", 8, **ARMS["v3_rate4"].settings["model"]["options"])
    assert max(module.dilation[0] for module in model.modules() if isinstance(module, torch.nn.Conv2d)) == 4


# statistics


def test_quantiles_of_students_t():
    # tables of the t distribution, two-sided 95 %
    for freedom, value in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}.items():
        assert quantile_t(0.975, freedom) == pytest.approx(value, abs=5e-4)
    assert quantile_t(0.95, 2) == pytest.approx(2.920, abs=5e-4)


def test_differences_are_paired_by_seed():
    found = paired({0: 51.0, 1: 62.0, 2: 73.0, 5: 0.0}, {2: 70.0, 1: 60.0, 0: 50.0, 7: 99.0})
    # 1, 2, 3: mean 2, standard deviation 1, and 4.3027 / sqrt(3) around it
    assert (found.pairs, found.mean, found.above) == (3, 2.0, 3)
    assert (found.low, found.high) == (pytest.approx(-0.4841, abs=1e-4), pytest.approx(4.4841, abs=1e-4))
    assert found.verdict == "undecided"
    assert paired({0: 3.0, 1: 3.1, 2: 2.9}, {0: 1.0, 1: 1.0, 2: 1.0}).verdict == "holds"
    assert paired({0: 1.0, 1: 1.0, 2: 1.0}, {0: 3.0, 1: 3.1, 2: 2.9}).verdict == "does not hold"


def test_fewer_than_two_pairs_decide_nothing():
    one, none = paired({0: 9.0}, {0: 1.0}), paired({0: 9.0}, {1: 1.0})
    assert (one.pairs, one.mean, one.verdict) == (1, 8.0, "undecided")
    assert math.isnan(one.low)
    assert (none.pairs, none.verdict) == (0, "undecided")
    assert math.isnan(none.mean)


def test_a_finding_is_what_its_pairs_are():
    assert overall(["holds", "holds"]) == "holds"
    assert overall(["holds", "undecided"]) == "undecided"
    assert overall(["holds", "undecided", "does not hold"]) == "does not hold"
    assert overall([]) == "undecided"


# runner


def fake_row(arm: str, seed: int, miou: float = 0.5, seconds: float = 10.0) -> dict:
    return {
        "arm": arm, "seed": seed, "settings": ARMS[arm].settings, "start": ARMS[arm].start, "evaluates": ARMS[arm].evaluates,
        "commit": "0" * 40,
        "dirty": False, "date": "2026-01-01T00:00:00Z", "seconds": seconds, "machine": {"cpu": "a", "instruction_set": "b"},
        "miou": miou, "iou": {"tent": miou, "pole": None}, "loss": [[10, 1.0], [20, 0.5]],
    }  # fmt: skip


def write_row(folder: Path, arm: str, seed: int, miou: float = 0.5, seconds: float = 10.0) -> None:
    folder.mkdir(exist_ok=True)
    row_path(arm, seed, folder).write_text(json.dumps(fake_row(arm, seed, miou, seconds)))


def test_runs_are_balanced_over_seeds_and_come_after_what_they_need():
    rows = {("v3", 0): fake_row("v3", 0, seconds=20.0), ("v3_os8", 0): fake_row("v3_os8", 0, seconds=5.0)}
    arms = ["context_basic", "front_end", "v3", "v3_eval8", "v3_os8"]
    todo = command.pending(rows, arms, 2)
    assert [seed for _, seed in todo] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [arm for arm, seed in todo if seed == 1] == ["v3_os8", "front_end", "v3", "v3_eval8", "context_basic"]
    assert ("v3", 0) not in todo


@QUIET
def test_a_run_that_is_kept_is_not_repeated_and_the_budget_is_kept(tmp_path, monkeypatch):
    done = []

    def fake(arm, seed, rows, runs):
        if (arm, seed) == ("fcn_aux09", 1):
            raise ValueError("too hot")
        done.append((arm, seed))
        write_row(rows, arm, seed)
        return fake_row(arm, seed)

    monkeypatch.setattr(command, "run", fake)
    call = ["run", "--rows", str(tmp_path / "rows"), "--runs", str(tmp_path), "--only", "auxiliary_loss", "--seeds", "2"]
    assert main([*call, "--budget", "5s"]) == 0
    assert done == []  # 30 s are expected of a first run
    assert main(call) == 1  # one has failed, the others are done
    assert sorted(done) == [("fcn", 0), ("fcn", 1), ("fcn_aux04", 0), ("fcn_aux04", 1), ("fcn_aux09", 0)]
    done.clear()
    assert main([*call, "--seeds", "1"]) == 0
    assert done == []
    with command.claimed("fcn", 2, tmp_path / "rows", tmp_path, again=False) as ours:
        assert ours
        assert main([*call, "--seeds", "3", "--only", "fcn"]) == 1  # fcn_aux09 has failed again
    assert ("fcn_aux04", 2) in done
    assert ("fcn", 2) not in done, "another process is at it"
    monkeypatch.setattr(command, "run", lambda *_: (_ for _ in ()).throw(Interrupted(15)))
    assert main([*call, "--seeds", "4"]) == 143
    assert main(["list", "--rows", str(tmp_path / "rows")]) == 0


def test_rows_of_arms_that_have_changed_do_not_count(tmp_path):
    write_row(tmp_path, "fcn", 0)
    write_row(tmp_path, "fcn", 1)
    row = json.loads(row_path("fcn", 1, tmp_path).read_text())
    row["settings"]["train"]["iterations"] += 1
    row_path("fcn", 1, tmp_path).write_text(json.dumps(row))
    row_path("gone", 0, tmp_path).write_text(json.dumps(row | {"arm": "gone"}))
    assert list(experiment.load_rows(tmp_path)) == [("fcn", 0)]


def test_what_cannot_be_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="expected a finding"):
        main(["run", "--rows", str(tmp_path), "--only", "outptu_stride"])
    with pytest.raises(SystemExit):
        main(["run", "--budget", "soon"])
    assert [command.seconds_of(text) for text in ("90s", "2m", "1.5h")] == [90, 120, 5400]


@QUIET
def test_rows_of_real_runs(tmp_path, monkeypatch):
    few = {"data": {"options": {"size": 64, "length": 4}, "crop": [64, 64]}, "eval": {"limit": 2}}
    quick = {"train": {"iterations": 2, "batch_size": 2, "warmup_iterations": 0}}
    for name in ("front_end", "context_basic", "v3", "v3_eval8_scales_flip"):
        monkeypatch.setitem(ARMS, name, dataclasses.replace(ARMS[name], settings=merged(ARMS[name].settings, few, quick)))
    rows, runs = tmp_path / "rows", tmp_path / "runs"
    arms = ["context_basic", "v3_eval8_scales_flip"]
    call = ["run", "--rows", str(rows), "--runs", str(runs), "--seeds", "1"]
    assert main([*call, *(text for arm in arms for text in ("--only", arm))]) == 0
    assert sorted(path.stem for path in rows.iterdir()) == sorted(
        f"{arm}_seed0" for arm in ("front_end", "context_basic", "v3", "v3_eval8_scales_flip")
    )
    row = json.loads(row_path("context_basic", 0, rows).read_text())
    assert {"commit", "dirty", "date", "seconds", "settings", "machine", "versions", "miou", "iou", "loss"} <= row.keys()
    assert (row["start"], row["images"], row["settings"]["train"]["iterations"]) == ("front_end", 2, 2)

    def weight(arm, key):
        return torch.load(checkpoint_path(arm, 0, runs), weights_only=True)["model"][key]

    for key in ("backbone.conv1.weight", "backbone.bn1.running_mean", "classifier.final.weight"):
        assert torch.equal(weight("context_basic", key), weight("front_end", key)), "the front end is frozen"
    again = run("v3", 0, tmp_path / "again", tmp_path / "again")
    assert again["miou"] == json.loads(row_path("v3", 0, rows).read_text())["miou"], "a seed decides a run"
    # the weights are gone, as in a fresh checkout with committed rows
    checkpoint_path("v3", 0, runs).unlink()
    row_path("v3_eval8_scales_flip", 0, rows).unlink()
    assert main([*call, "--only", "v3_eval8_scales_flip"]) == 0
    assert checkpoint_path("v3", 0, runs).is_file()


# report


def test_scores_are_of_all_classes_or_of_some():
    row = fake_row("v3", 0, 0.25)
    assert score(row, "miou") == 25.0
    assert score(row, ("tent", "pole")) == 25.0  # no pole in the images
    assert math.isnan(score(row, ("pole",)))


@QUIET
def test_report_from_rows(tmp_path, monkeypatch):
    rows, document = tmp_path / "rows", tmp_path / "reproduction.md"
    few = {name: FINDINGS[name] for name in ("auxiliary_loss", "crop", "labels")}
    monkeypatch.setattr(results, "FINDINGS", few)
    monkeypatch.setattr(report, "DOCUMENT", document)
    monkeypatch.setattr(report, "OVERVIEW", tmp_path / "overview.png")
    for seed in range(3):
        for arm, miou in {"fcn": 0.5, "fcn_aux04": 0.6, "fcn_aux09": 0.7}.items():
            write_row(rows, arm, seed, miou + 0.001 * seed * (arm == "fcn"))
    write_row(rows, "v3", 0, 0.6)
    write_row(rows, "v3_small_crop", 0, 0.5)
    document.write_text("# Rows\n\nof others\n")
    call = ["report", "--rows", str(rows), "--runs", str(tmp_path / "runs")]
    assert main([*call, "--check"]) == 1
    assert main(call) == 0
    text = document.read_text()
    assert text.startswith("# Rows\n\nof others\n")
    aux = result_of(FINDINGS["auxiliary_loss"], experiment.load_rows(rows))
    assert [comparison.ours.verdict for comparison in aux.comparisons] == ["holds", "does not hold"]
    assert aux.verdict == "does not hold"
    assert "Auxiliary loss, weight 0.4 is *below* auxiliary loss, weight 0.9 by 10.0 points" in text
    assert "| crop of 61 | 67.2 | 50.0 | 50.0 |" in text
    missing = text.partition("Missing with seed 1: ")[2].partition("\n")[0]
    assert "`v3`" in missing
    assert "`fcn_aux04`" not in missing
    assert (tmp_path / "overview.png").stat().st_size > 1000
    page = (tmp_path / "runs" / "report" / "index.html").read_text()
    assert all(f'id="{name}"' in page for name in few)
    assert (tmp_path / "runs" / "report" / "auxiliary_loss_loss.png").is_file()
    assert main(call) == 0
    assert document.read_text() == text, "a second time nothing changes"
    assert main([*call, "--check"]) == 0


def test_docs_say_what_the_rows_say():
    assert main(["report", "--check"]) == 0


def test_an_arm_is_plain_settings():
    first = {"model": {"options": {"a": 1}}, "data": {"crop": [1, 1]}}
    one = merged(first, {"model": {"options": {"b": 2}}, "data": {"crop": [2, 2]}})
    assert one == {"model": {"options": {"a": 1, "b": 2}}, "data": {"crop": [2, 2]}}
    assert Arm("", one).settings == one
