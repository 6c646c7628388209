"""Every mistake in the settings is answered with key, value and what was expected."""

from __future__ import annotations

import dataclasses

import pytest

from segmodels.config import SECTIONS, Config, ConfigError, describe, load_config, recipes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", r"unknown key train\.lrr \(value 1\).*did you mean lr"),
        ("trian.lr=1", r"unknown section 'trian'.*did you mean train.*one of data, model, train, weak, distributed, eval, run"),
        ("train.lr=fast", r"train\.lr='fast'.*expected float, > 0"),
        ("train.lr=-1", r"train\.lr=-1\.0: expected float, > 0"),
        ("train.lr=.nan", r"train\.lr=nan: expected float, > 0"),
        ("train.lr=.inf", r"train\.lr=inf: expected float, > 0"),
        ("train.iterations=1.5", r"train\.iterations=1\.5.*expected int, >= 1"),
        ("train.iterations=true", r"train\.iterations=True.*expected int"),
        ("train.nesterov=1", r"train\.nesterov=1.*expected bool"),
        ("train.optimizer=adam", r"train\.optimizer='adam': expected one of sgd, adamw"),
        ("data.name=7", r"data\.name=7.*expected str"),
        ("data.crop=[3]", r"data\.crop=\[3\]: expected list\[int\] of 2, >= 1"),
        ("data.crop=[3,0]", r"data\.crop=\[3, 0\]"),
        ("data.scale=[2,1]", r"data\.scale=\[2\.0, 1\.0\]: expected the smaller bound first"),
        ("model.output_stride=12", r"model\.output_stride=12: expected a power of two"),
        ("eval.scales=[]", r"eval\.scales=\[\]: expected at least one scale"),
        ("train=3", r"train=3.*expected keys of this section"),
        ("train.lr", r"override 'train\.lr': expected section\.key=value"),
        ("data.crop=[1", r"override 'data\.crop=\[1': the value is not YAML"),
        (
            "data.root=${oc.env:ATROUS_NOT_SET}/x",
            r"data\.root='\$\{oc\.env:ATROUS_NOT_SET\}/x'.*not found.*data\.root=VALUE",
        ),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"class_weights=\[1\.0\] with train\.balance=0\.5"):
        load_config({"train": {"class_weights": [1], "balance": 0.5}})
    with pytest.raises(ConfigError, match=r"nesterov=True: expected train\.optimizer=sgd"):
        load_config({"train": {"optimizer": "adamw", "nesterov": True}})


def test_files(tmp_path, monkeypatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "train:\n  lr: 0.5\ndata:\n  root: ${oc.env:ATROUS_TEST_ROOT}/x\nmodel:\n  options:\n    rates: [1, 2]\n"
    )
    monkeypatch.setenv("ATROUS_TEST_ROOT", "/somewhere")
    config, raw = load_config(path, ["train.batch_size=3", "model.options.separable=true"])
    assert (config.train.lr, config.train.batch_size, config.data.root) == (0.5, 3, "/somewhere/x")
    assert config.model.options == {"rates": [1, 2], "separable": True}
    assert raw["data"]["root"] == "${oc.env:ATROUS_TEST_ROOT}/x", "no folder of this machine in reports"
    assert load_config(raw)[0] == config
    path.write_text("train: [1, 2")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: not readable as YAML"):
        load_config(path)
    path.write_text("train:\n  nothing: 1\n")
    with pytest.raises(ConfigError, match=r"unknown key train\.nothing \(value 1\) in .*recipe\.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"did you mean .*expected a YAML file or one of the recipes"):
        load_config(recipes()[0] + "x")


def test_recipes_are_valid(monkeypatch) -> None:
    monkeypatch.setenv("ATROUS_SHARED", "/somewhere")
    assert recipes()
    for name in recipes():
        config, _ = load_config(name)
        published = name.endswith("_published")
        crop = "x".join(map(str, (published and config.eval.canvas) or config.data.crop))
        assert f"_os{config.model.output_stride}_" in name
        batch = "published" if published else f"b{config.train.batch_size}"
        assert f"_{crop}_{batch}" in name, "the name says crop and batch size, or that nothing is trained"
        assert config.data.root is None or config.data.root.startswith("/somewhere/")


def test_help_lists_every_key() -> None:
    text = describe()
    for section, kind in SECTIONS.items():
        for item in dataclasses.fields(kind):
            assert f"{section}.{item.name}=" in text
            assert item.metadata["text"] in text
    assert set(SECTIONS) == {item.name for item in dataclasses.fields(Config)}
