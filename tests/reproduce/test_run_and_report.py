"""``python -m segmodels.reproduce`` from the command line: dry run, miniature, a tiny VOC folder, results and the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from segmodels.config import ConfigError
from segmodels.data import DataError
from segmodels.reproduce import comparison, report, results, run
from segmodels.reproduce.__main__ import main
from segmodels.reproduce.rows import rows
from tests.data.miniature import write_image, write_palette_mask

POOL = "deeplabv3_resnet101_os16_voc_513x513_b16_t5-mg124-pool"
OS8 = "deeplabv3_resnet101_os8_voc_513x513_b16_t6-os8"
#: A network and a training that take seconds.
TINY = [
    "model.options.width_mult=0.0625", "model.options.head_channels=8", "data.crop=[33,33]", "train.iterations=1",
    "train.batch_size=2", "train.norm_decay=0.5", "eval.sheet=0", "run.tensorboard=false", "run.threads=1",
]  # fmt: skip


def write_voc(root: Path) -> Path:
    """Two images to train on and one to validate on."""
    rng = np.random.default_rng(0)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, stems in (("train_aug", ["a", "b"]), ("val", ["c"])):
        (lists / f"{split}.txt").write_text("\n".join(stems))
        for number, stem in enumerate(stems):
            write_image(root / "JPEGImages" / f"{stem}.jpg", (40, 48), number)
            write_palette_mask(root / "SegmentationClass" / f"{stem}.png", rng.integers(0, 21, (40, 48)).astype(np.uint8))
    return root


def test_run_to_report(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "reproduction"
    given = ["run", OS8, "--data", f"voc={write_voc(tmp_path / 'voc')}", "--from-scratch", "--results", str(folder), *TINY]
    assert main(given) == 0
    # The evaluated row has brought the one that trains it.
    trained, evaluated = (json.loads((folder / f"{name}_seed0.json").read_text()) for name in (POOL, OS8))
    assert trained["start"] == {"from": "scratch", "file": None}
    assert trained["config"]["train"]["iterations"] == 1
    assert evaluated["trained_by"] == POOL
    assert evaluated["config"]["eval"]["output_stride"] == 8
    assert evaluated["data"]["val"] == trained["data"]["val"]
    assert (evaluated["data"]["val"]["images"], evaluated["data"]["val"]["published_images"]) == (1, 1449)
    assert trained["data"]["train"]["images"] == 2
    assert str(tmp_path) not in json.dumps([trained, evaluated]), "no folder of this machine"
    assert 0 <= evaluated["obtained"]["miou"] <= 100
    capsys.readouterr()
    assert main(given) == 0, "a second call has nothing to do"
    assert "done, see" in capsys.readouterr().out

    other = folder / f"{OS8}_seed1.json"
    other.write_text(json.dumps(evaluated | {"seed": 1}))
    line = next(line for line in comparison.lines(folder) if line.row.name == OS8)
    assert (line.seeds, line.data, line.stand_in) == ([0, 1], "voc val, 1 images", False)
    assert "1 of 1,449 images of val" in line.differs
    assert "with model.options.width_mult=0.0625" in line.differs
    assert line.spread().endswith("± 0.00 (2 seeds)")
    found = comparison.lines(folder)
    monkeypatch.setattr(report, "lines", lambda: found)
    page, site = tmp_path / "page.md", tmp_path / "site"
    assert main(["report", "--page", str(page), "--html", str(site)]) == 0
    assert f"results/reproduction/{OS8}_seed0.json" in page.read_text()
    assert {path.suffix for path in site.iterdir()} == {".png", ".html"}
    assert main(["report", "--page", str(page), "--check"]) == 0
    page.write_text(page.read_text() + "\nWritten by others.\n")
    assert main(["report", "--page", str(page), "--check"]) == 0
    page.write_text(page.read_text().replace("# Reproduction", "# Drifted"))
    assert main(["report", "--page", str(page), "--check"]) == 1
    assert report.with_rows(page.read_text(), report.page()).endswith("Written by others.\n")


@pytest.mark.parametrize("name", ["fcn16s_vgg16_os32_voc_500x500_b1_16s"])
def test_miniature_of_a_row_that_starts_from_another(name: str, tmp_path: Path, capsys) -> None:
    work = tmp_path / "work"
    assert main(["run", name, "--miniature", "--work-dir", str(work), "run.threads=1"]) == 0
    start = rows()[name].start
    assert f"trains into {work}/miniature/{start}/seed0" in capsys.readouterr().out
    assert (work / "miniature" / f"{name}_seed0.json").is_file()
    assert not results.seeds_of(name), "a miniature is no result"


def test_dry_run_and_list(capsys) -> None:
    assert main(["run", POOL, "--dry-run", "--gpus", "4", "--data", "voc=/data/voc", "train.lr=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "multi_grid:" in printed
    assert "lr: 0.5" in printed
    assert "torchrun --nproc-per-node=4 -m segmodels.train --config papers/deeplabv3/" in printed
    assert "data.root=/data/voc" in printed
    assert main(["list", "--paper", "deeplabv3"]) == 0
    printed = capsys.readouterr().out
    assert POOL in printed
    assert "77.21 mIoU" in printed


def test_mistakes_are_named(tmp_path: Path) -> None:
    for arguments, kind, message in (
        (["frobnicate"], ConfigError, "unknown command 'frobnicate': expected one of list, run, report, findings"),
        (["run", "nothing-like-it"], ConfigError, "no row 'nothing-like-it'"),
        (["run", POOL, "--data", "vocs=/x"], ConfigError, r"--data 'vocs=/x': expected NAME one of .*voc"),
        (["run", POOL], ConfigError, r"starts from ImageNet weights of resnet101: expected --weights resnet101=FILE"),
        (["run", POOL, "--from-scratch"], DataError, rf"{POOL} needs PASCAL VOC 2012: .*JPEGImages.*--data voc=ROOT"),
        (["run", POOL, "--from-scratch", "--data", "voc=/nowhere"], DataError, "/nowhere.*does not exist"),
        (["run", POOL, "--from-scratch", "data.name=voc", "train.lrr=1"], ConfigError, "unknown key train.lrr"),
        (["list", "--paper", "unknown"], ConfigError, "--paper unknown: expected one of attention"),
    ):
        with pytest.raises(kind, match=message):
            main([*arguments, "--work-dir", str(tmp_path)] if arguments[0] == "run" else arguments)


def test_stand_ins_exist_and_say_so() -> None:
    for entry in results.STAND_INS:
        assert entry.row in rows()
        assert (results.RESULTS / entry.result).is_file()
    assert all(line.stand_in for line in comparison.lines(Path("nowhere")))


def test_the_page_says_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0


def test_an_interrupted_training_leaves_no_result(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run.train, "main", lambda arguments: 143)
    name = "deeplabv3_resnet50_os16_voc_513x513_b16_t1"
    assert main(["run", name, "--miniature", "--work-dir", str(tmp_path), "run.threads=1"]) == 143
    assert not list(tmp_path.glob("miniature/*_seed0.json"))
