"""The recipes of published rows: valid, buildable, and consistent with each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from segmodels import create_model
from segmodels.config import Config, ConfigError, load_config
from segmodels.engine.parts import check_parts
from segmodels.reproduce.rows import METRICS, PAPERS, STARTS, find_rows, read_row, rows

#: How the data sets of the recipes label (the papers; PASCAL-Context has a background on request).
CLASSES = {
    "voc": 21, "coco": 21, "camvid": 11, "kitti": 11, "cityscapes": 19, "ade20k": 150, "pascal_context": 59, "person_part": 7,
    "nyudv2": 40, "siftflow": 33,
}  # fmt: skip


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    return {name: row.load()[0] for name, row in rows().items()}


def test_rows_are_consistent(configs) -> None:
    published = [row for row in rows().values() if not row.is_stage]
    assert len(published) >= 110
    for name, row in rows().items():
        config = configs[name]
        assert row.path.parent.name.startswith(row.key), "the folder is that of the paper"
        assert all((row.table, row.row, row.dataset, row.split, row.source, row.title)), name
        assert all(metric in METRICS and 15 < value < 99 for metric, value in row.published.items())
        assert config.data.root is None, "no folder of one machine"
        assert (config.model.weights, config.model.weights_backbone) == (None, None)
        evaluated = row.trained_by is not None or row.start == "published"
        stride = (evaluated and config.eval.output_stride) or config.model.output_stride
        assert f"{config.model.name}_os" in row.name
        assert f"_os{stride}_" in row.name or "eval" in row.name, row.name
        batch = "published" if row.start == "published" else f"b{config.train.batch_size}"
        assert f"_{batch}_" in row.name, row.name
        if row.is_stage:
            assert row.name.endswith("stage")
            assert any(other.start == row.name for other in rows().values()), "a stage is there for a row"
    named = [(row.key, row.table, row.row, row.dataset, row.split) for row in published]
    assert len(named) == len(set(named)), "no row twice"


def test_an_evaluation_is_of_what_was_trained(configs) -> None:
    for row in rows().values():
        if row.trained_by is None:
            continue
        trained = rows()[row.trained_by]
        assert trained.trained_by is None
        assert trained.start != "published"
        evaluated, of = configs[row.name], configs[trained.name]
        assert (evaluated.model.name, evaluated.data.name) == (of.model.name, of.data.name)
        assert evaluated.model.options == of.model.options
        # Either the settings differ, or the row repeats one of another table, or it is on a split without labels.
        assert evaluated.eval != of.eval or row.published == trained.published or row.split == "test"


def test_starts_end() -> None:
    for row in rows().values():
        seen = []
        while row.start not in STARTS:
            assert row.name not in seen
            seen.append(row.name)
            row = rows()[row.start]


def test_every_network_can_be_built(configs) -> None:
    """On the meta device: no memory, no initialisation. Each distinct one once."""
    built = set()
    for name, config in configs.items():
        settings, row = config.model, rows()[name]
        classes = CLASSES[config.data.name] + bool(config.data.options.get("background"))
        start = row.start if row.start in rows() else None
        key = json.dumps([vars(settings), classes, config.train.freeze, config.train.rates, start], sort_keys=True)
        if key in built:
            continue
        built.add(key)
        with torch.device("meta"):
            model = create_model(
                settings.name, classes, settings.output_stride, aux_loss=settings.aux_loss, **settings.options
            )
        if config.eval.output_stride is not None:
            model.set_output_stride(config.eval.output_stride)
        for part, names in (("skip", settings.weights_skip), ("freeze", config.train.freeze), ("rates", config.train.rates)):
            check_parts(f"{name} {part}", names, model)


def test_what_a_row_starts_from_fits(configs) -> None:
    """Everything but what ``weights_skip`` leaves out has the same shape in the network that it starts from."""
    checked = set()
    for row in rows().values():
        if row.start in STARTS or row.trained_by is not None:
            continue
        config, before = configs[row.name], configs[row.start]
        key = json.dumps([vars(config.model), vars(before.model), config.data.name, before.data.name])
        if key in checked:
            continue
        checked.add(key)
        states = []
        for each in (config, before):
            classes = CLASSES[each.data.name] + bool(each.data.options.get("background"))
            model = each.model
            with torch.device("meta"):
                built = create_model(model.name, classes, model.output_stride, aux_loss=model.aux_loss, **model.options)
            states.append({key: value.shape for key, value in built.state_dict().items()})
        own, theirs = ({k: v for k, v in state.items() if not _inside(k, config.model.weights_skip)} for state in states)
        assert own == theirs, f"{row.name} from {row.start}"


def _inside(name: str, parts: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def test_hyperparameters_of_a_few_rows(configs) -> None:
    """Read off the papers, one of each kind."""
    v3 = configs["deeplabv3_resnet101_os16_voc_513x513_b16_t5-mg124-pool"]
    assert (v3.train.lr, v3.train.iterations, v3.train.norm_decay, v3.data.crop) == (0.007, 30000, 0.9997, [513, 513])
    assert v3.model.options["multi_grid"] == [1, 2, 4]
    flip = configs["deeplabv3_resnet101_os8_voc_513x513_b16_t6-os8-ms-flip"]
    assert (flip.eval.output_stride, flip.eval.flip, len(flip.eval.scales)) == (8, True, 6)
    msc = configs["deeplabv2_resnet101_os8_voc_321x321_b10_t4-aspp-crf"]
    assert msc.model.options["scales"] == [1.0, 0.75, 0.5]
    assert (msc.train.accumulate, msc.eval.crf) == (10, [4.0, 67.0, 3.0, 3.0, 1.0])
    psp = configs["pspnet_resnet101_os8_cityscapes_713x713_b16_val"]
    assert (psp.eval.mode, psp.eval.window, psp.train.iterations) == ("slide", [713, 713], 90000)
    fcn = configs["fcn8s_vgg16_os32_voc_500x500_b1_8s-staged"]
    assert (fcn.train.lr, fcn.train.momentum, fcn.train.reduction) == (1e-14, 0.99, "sum")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no row 'deeplabv3_t5'.*reproduce list"):
        find_rows(["deeplabv3_t5"])
    assert [row.table for row in find_rows(["deeplabv3_*_t9"])] == ["9"] * 4
    path = tmp_path / "row.yaml"
    path.write_text("paper: {key: x}\n")
    with pytest.raises(ConfigError, match=r"row\.yaml: paper has \['key'\]: expected dataset, key, row"):
        read_row(path)
    whole = "{key: k, title: t, table: 1, row: r, dataset: d, split: s, source: p, published: {miou: 0.5e3}}"
    path.write_text(f"paper: {whole}\n")
    with pytest.raises(ConfigError, match=r"miou: 500\.0; expected miou, pixel_accuracy"):
        read_row(path)


def test_a_base_is_merged_and_its_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "_base.yaml").write_text("train: {lr: 0.5, rates: {backbone: 2.0}}\ndata: {crop: [3, 4]}\n")
    recipe = tmp_path / "row.yaml"
    recipe.write_text("base: _base\ntrain: {rates: {classifier: 3.0}}\ndata: {crop: [5, 6]}\npaper: {key: anything}\n")
    config, raw = load_config(recipe)
    assert (config.train.lr, config.train.rates, config.data.crop) == (0.5, {"backbone": 2.0, "classifier": 3.0}, [5, 6])
    assert "paper" not in raw
    recipe.write_text("base: _other\n")
    with pytest.raises(ConfigError, match=r"row\.yaml: its base .*_other\.yaml' does not exist"):
        load_config(recipe)
    recipe.write_text("base: row\n")
    with pytest.raises(ConfigError, match=r"row\.yaml' stands on it"):
        load_config(recipe)


def test_a_row_is_short() -> None:
    """What all rows of a table share is in the base."""
    for path in PAPERS.glob("*/[!_]*.yaml"):
        assert len(path.read_text().splitlines()) <= 24, path
