"""Settings of every command: dataclasses whose fields carry type, default, bounds and explanation.

A recipe is a YAML file of the same sections; ``section.key=value`` on the command line overrides it. ``--help`` and all
error messages are made from the fields below, so they cannot drift from what the code accepts.
"""

# The fields' _setting(...) only describes a field, as dataclasses.field does.
# ruff: noqa: RUF009

from __future__ import annotations

import difflib
import os
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message names key, value and what is expected."""


def _setting(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    length: int | None = None,
) -> Any:
    """A field. ``low``/``high`` are inclusive bounds, ``above`` an exclusive one; for lists they hold for each element."""
    metadata = {"text": text, "low": low, "above": above, "high": high, "choices": choices, "length": length}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Where the images come from and how they are augmented."""

    name: str = _setting("synthetic", "data set: camvid, voc, folder or synthetic")
    root: str | None = _setting(None, "its folder; ${oc.env:NAME} reads an environment variable")
    train_split: str = _setting("train", "split to train on")
    val_split: str = _setting("val", "split of the periodic validation, of evaluate and of best.pt")
    options: dict[str, Any] = _setting({}, "further arguments of the data set, for both splits")
    crop: list[int] = _setting([321, 321], "height and width of the training crops", low=1, length=2)
    scale: list[float] = _setting([0.5, 2.0], "bounds of the random scale factor", above=0, length=2)
    cat_max_ratio: float = _setting(1.0, "draw crops again in which one class covers more than this share", above=0, high=1)
    flip: float = _setting(0.5, "probability of mirroring left and right", low=0, high=1)
    jitter: float = _setting(0.0, "strength of the random brightness, contrast and saturation", low=0, high=1)
    cache: bool = _setting(True, "keep decoded images in memory")
    workers: int = _setting(0, "loading processes; 0 loads in the training process", low=0)


@dataclass
class ModelConfig:
    """The network."""

    name: str = _setting("deeplabv3_resnet50", "see segmodels.list_models()")
    output_stride: int = _setting(
        16, "pixels of the image per pixel of the encoder's output: 4 to 32, with cascade to 256", low=4, high=256
    )
    weights_backbone: str | None = _setting(None, "classification weights of the backbone: imagenet, a file, or null")
    weights: str | None = _setting(None, "start from these weights: a checkpoint of segmodels.train, or a published network")
    aux_loss: bool = _setting(False, "add the auxiliary head")
    options: dict[str, Any] = _setting({}, "further arguments of create_model: rates, separable, multi_grid, ...")


@dataclass
class TrainConfig:
    """Optimisation. Rates follow the poly schedule lr * (1 - iteration / iterations) ** power."""

    iterations: int = _setting(20000, "optimiser steps", low=1)
    batch_size: int = _setting(16, "images per step", low=1)
    optimizer: str = _setting("sgd", "optimiser", choices=("sgd", "adamw"))
    lr: float = _setting(0.01, "base learning rate", above=0)
    momentum: float = _setting(0.9, "momentum of sgd, beta1 of adamw", low=0, high=0.9999)
    nesterov: bool = _setting(False, "Nesterov momentum (sgd)")
    weight_decay: float = _setting(1e-4, "weight decay", low=0)
    decay_norm_and_bias: bool = _setting(False, "apply it to batch norm and biases as well")
    backbone_rate: float = _setting(1.0, "factor on the learning rate of the backbone", low=0)
    power: float = _setting(0.9, "power of the poly schedule", low=0)
    warmup_iterations: int = _setting(0, "first steps, in which the rate rises linearly", low=0)
    warmup_start: float = _setting(0.01, "factor on the rate at the first step of the warm-up", low=0, high=1)
    label_smoothing: float = _setting(0.0, "label smoothing of the cross-entropy", low=0, high=0.99)
    class_weights: list[float] | None = _setting(None, "one weight per class in the cross-entropy", low=0)
    balance: float = _setting(
        0.0, "weights classes by pixel frequency ** -balance instead; 0 is off, 1 the full inverse", low=0, high=1
    )
    labels_at: str = _setting(
        "image", "where the loss compares: scores upsampled to the labels, or labels sampled on the grid of the scores",
        choices=("image", "scores"),
    )  # fmt: skip
    aux_weight: float = _setting(0.4, "weight of the auxiliary loss", low=0)
    clip_norm: float = _setting(0.0, "largest norm of the gradient; 0 is off", low=0)
    ema_decay: float = _setting(
        0.0, "decay of the moving average of the weights, which is then what is evaluated; 0 is off", low=0, high=0.999999
    )
    amp: str = _setting("none", "mixed precision", choices=("none", "bf16"))
    channels_last: bool = _setting(True, "channels-last memory layout")


@dataclass
class WeakConfig:
    """Training with tags or boxes in place of label maps (Papandreou et al. 2015); see python -m segmodels.weak."""

    method: str = _setting(
        "none", "how to train on weak images; none leaves them out",
        choices=("none", "em_fixed", "em_adapt", "bbox_rect", "bbox_seg", "bbox_em_fixed"),
    )  # fmt: skip
    labels: str | None = _setting(None, "file of tags and boxes of the training split")
    strong: int = _setting(
        0, "images that keep their label maps, the others are weak; with method=none and 0 there are no weak images", low=0
    )
    strong_seed: int = _setting(0, "of the draw of the strong images", low=0)
    strong_per_batch: int | None = _setting(None, "strong images in each batch; by default half of it", low=1)
    strong_weight: float = _setting(0.7, "weight of the loss on the strong images of a batch", low=0)
    weak_weight: float = _setting(0.3, "weight of the loss on the weak ones; a batch of one kind has no weights", low=0)
    background_portion: float = _setting(0.4, "of an image that em_adapt gives the background at least", low=0, high=1)
    foreground_portion: float = _setting(0.2, "of an image that em_adapt gives each of its other classes at least", low=0, high=1)
    background_bias: float | None = _setting(None, "added to the background's scores; by default 1 (em_fixed), 5 (bbox_em_fixed)")
    foreground_bias: float | None = _setting(None, "added to the scores of other present classes; by default 2 and 6")
    exclude_absent: bool = _setting(True, "em_fixed and bbox_em_fixed never choose absent classes; false: as in the paper")


@dataclass
class EvalConfig:
    """Validation, ``evaluate`` and ``predict``."""

    scales: list[float] = _setting([1.0], "image scales whose probabilities are averaged", above=0, high=8)
    flip: bool = _setting(False, "average with the mirrored image")
    refine: str = _setting("none", "refinement of the classes by the image (--refine)", choices=("none", "crf", "crf_rnn", "dt"))
    crf: list[float] = _setting(
        [4.0, 67.0, 3.0, 3.0, 1.0], "w1, sigma_alpha, sigma_beta, w2, sigma_gamma of refine=crf", above=0, length=5
    )
    crf_rnn: str | None = _setting(None, "weights of the CRF-RNN layer of refine=crf_rnn; by default it starts as a dense CRF")
    dt: list[float] = _setting([50.0, 100.0], "sigma_s, sigma_r of refine=dt, along image gradients", above=0, length=2)
    output_stride: int | None = _setting(None, "evaluate at another output stride than trained", low=4, high=256)
    canvas: list[int] | None = _setting(
        None, "height and width onto which every image is placed, top left; larger ones are reduced to it", low=1, length=2
    )
    limit: int | None = _setting(None, "at most this many images of the split", low=1)
    sheet: int = _setting(4, "rows of the picture image | truth | prediction; 0 draws none", low=0, high=64)


@dataclass
class RunConfig:
    """The run itself."""

    work_dir: str | None = _setting(None, "output folder; by default runs/NAME of the recipe (--work-dir)")
    resume: bool = _setting(False, "continue the run in work_dir, if there is one (--resume)")
    overwrite: bool = _setting(False, "train into a folder that is not empty")
    seed: int = _setting(0, "of initialisation, order, augmentation and dropout (--seed)", low=0)
    device: str = _setting("cpu", "cpu, cuda or cuda:N (--device)")
    threads: int | None = _setting(None, "CPU threads; by default PyTorch's choice (--threads)", low=1)
    backend: str = _setting("auto", "of the convolutions: auto, reference, cpu, triton, cuda or torch (--backend)")
    keep_memory: bool = _setting(
        True, "keep freed memory in the process (glibc); returning it after every layer and taking it back costs time"
    )
    validate_every: int = _setting(0, "steps between validations; 0 validates at the end only", low=0)
    checkpoint_every: int = _setting(100, "steps between checkpoints; 0 saves when validating and at the end", low=0)
    log_every: int = _setting(10, "steps per point of the curves", low=1)
    print_seconds: float = _setting(30.0, "seconds between log lines when the output is not a terminal", above=0)
    tensorboard: bool = _setting(True, "write TensorBoard scalars into work_dir/tensorboard")


@dataclass
class Config:
    """All sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    weak: WeakConfig = field(default_factory=WeakConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, type] = {
    "data": DataConfig, "model": ModelConfig, "train": TrainConfig, "weak": WeakConfig, "eval": EvalConfig,
    "run": RunConfig,
}  # fmt: skip


def load_config(
    recipe: str | os.PathLike[str] | dict[str, Any] | None = None, overrides: list[str] | None = None
) -> tuple[Config, dict[str, Any]]:
    """Reads a recipe and applies overrides.

    Args:
        recipe: a YAML file, the name of a recipe of this package, a dictionary of sections, or None for the defaults.
        overrides: ``section.key=value``; the value is read as YAML.

    Returns:
        The checked settings, and the same as plain containers with ``${...}`` unresolved: what goes into checkpoints and
        metrics.json, so that they do not name folders of one machine where the recipe does not.

    Raises:
        ConfigError: unknown recipe, unreadable YAML, unknown key, wrong type or value out of range.
    """
    merged = OmegaConf.structured(Config)
    if isinstance(recipe, dict):
        _merge(merged, recipe, "the configuration")
    elif recipe is not None:
        path = find_recipe(recipe)
        _merge(merged, _read_yaml(path), str(path))
    for text in overrides or []:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}: expected section.key=value, for example train.lr=0.02")
        try:
            given = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override {text!r}: the value is not YAML: {' '.join(str(error).split())}") from error
        _merge(merged, given, "the command line")
    raw = typing.cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=False))
    _check_resolved(merged, raw)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    _check_ranges(config)
    return config, raw


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """The file of a recipe given as path or by name. Raises ConfigError that lists the recipes there are."""
    path = Path(name)
    if path.is_file():
        return path
    packaged = RECIPES / f"{name}.yaml"
    if packaged.is_file():
        return packaged
    known = recipes()
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(f"--config {str(name)!r}{hint}: expected a YAML file or one of the recipes {', '.join(known)}")


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def describe() -> str:
    """Every key with type, default, bounds and explanation, as ``--help`` prints it."""
    lines = []
    for section, kind in SECTIONS.items():
        lines += ["", f"{section}: {(kind.__doc__ or '').strip()}"]
        hints = typing.get_type_hints(kind)
        for item in fields(kind):
            default = getattr(kind(), item.name)
            expected = _expected(hints[item.name], item.metadata)
            lines += [f"  {section}.{item.name}={_yaml(default)}   ({expected})", f"      {item.metadata['text']}"]
    return "\n".join(lines).lstrip("\n")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        given = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected sections {', '.join(SECTIONS)}, found {type(given).__name__}")
    return typing.cast("dict[str, Any]", given)


def _merge(merged: DictConfig, given: Any, source: str) -> None:
    """Merges key by key, so that a failure can be named."""
    for section, values in given.items():
        if section not in SECTIONS:
            raise ConfigError(f"unknown section {section!r} in {source}{_closest(section, SECTIONS)}; "
                              f"expected one of {', '.join(SECTIONS)}")  # fmt: skip
        if not isinstance(values, dict):
            raise ConfigError(f"{section}={values!r} in {source}: expected keys of this section")
        hints = typing.get_type_hints(SECTIONS[section])
        items = {item.name: item for item in fields(SECTIONS[section])}
        for key, value in values.items():
            if key not in items:
                raise ConfigError(f"unknown key {section}.{key} (value {value!r}) in {source}{_closest(key, items)}; "
                                  f"expected one of {', '.join(items)}")  # fmt: skip
            expected = _expected(hints[key], items[key].metadata)
            # OmegaConf would turn 1.0 into True, 3 into "3" and "yes" into True; a setting of another type is a mistake.
            if not _fits(value, hints[key]):
                raise ConfigError(f"{section}.{key}={value!r} in {source}: expected {expected}")
            try:
                merged[section].merge_with({key: value})
            except OmegaConfBaseException as error:
                raise ConfigError(f"{section}.{key}={value!r} in {source}: expected {expected}") from error


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, str) and "${" in value:
        return True
    if value is None:
        return type(None) in typing.get_args(hint)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] if _optional(hint) else [hint]
    kind = kinds[0]
    origin = typing.get_origin(kind)
    if origin is list:
        (element,) = typing.get_args(kind)
        return isinstance(value, list) and all(_fits(entry, element) for entry in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check_resolved(merged: DictConfig, raw: dict[str, Any]) -> None:
    for section, values in raw.items():
        for key, value in values.items():
            try:
                OmegaConf.to_container(merged[section], resolve=True) if isinstance(value, dict) else merged[section][key]
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0].replace("KeyError raised while resolving interpolation: ", "").strip('"')
                raise ConfigError(
                    f"{section}.{key}={value!r}: {reason}; set it, or give {section}.{key}=VALUE on the command line"
                ) from error


def _check_ranges(config: Config) -> None:
    for section, kind in SECTIONS.items():
        values = getattr(config, section)
        hints = typing.get_type_hints(kind)
        for item in fields(kind):
            value, meta = getattr(values, item.name), item.metadata
            entries = value if isinstance(value, list) else [value]
            wrong = [entry for entry in entries if entry is not None and not _in_range(entry, meta)]
            if wrong or (meta["length"] is not None and value is not None and len(entries) != meta["length"]):
                raise ConfigError(f"{section}.{item.name}={value!r}: expected {_expected(hints[item.name], meta)}")
    for key, value in (("model", config.model.output_stride), ("eval", config.eval.output_stride)):
        if value is not None and value.bit_count() != 1:
            raise ConfigError(f"{key}.output_stride={value}: expected a power of two")
    if config.data.scale[0] > config.data.scale[1]:
        raise ConfigError(f"data.scale={config.data.scale}: expected the smaller bound first")
    if not config.eval.scales:
        raise ConfigError("eval.scales=[]: expected at least one scale, for example [1.0]")
    if config.train.class_weights is not None and config.train.balance:
        raise ConfigError(
            f"train.class_weights={config.train.class_weights} with train.balance={config.train.balance}: expected only "
            "one of the two"
        )
    if config.weak.method != "none":
        if config.weak.labels is None:
            raise ConfigError(f"weak.method={config.weak.method} needs weak.labels, a file of python -m segmodels.weak")
        if config.train.balance:
            raise ConfigError(f"train.balance={config.train.balance} counts label maps, which weak images lack: expected 0")
    if config.train.nesterov and (config.train.optimizer != "sgd" or not config.train.momentum):
        raise ConfigError("train.nesterov=True: expected train.optimizer=sgd with train.momentum above 0")


def _in_range(value: Any, meta: Any) -> bool:
    if meta["choices"]:
        return value in meta["choices"]
    if isinstance(value, (int, float)):
        # written so that nan fails
        return ((meta["low"] is None or value >= meta["low"]) and (meta["above"] is None or value > meta["above"])
                and (meta["high"] is None or value <= meta["high"]) and abs(value) != float("inf"))  # fmt: skip
    return True


def _expected(hint: Any, meta: Any) -> str:
    kind = str(hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint)
    text = kind.replace("typing.", "").replace("NoneType", "None").replace("None", "null")
    if meta["choices"]:
        return f"one of {', '.join(meta['choices'])}"
    bounds = [f"{sign} {meta[name]:g}" for name, sign in (("low", ">="), ("above", ">"), ("high", "<="))
              if meta[name] is not None]  # fmt: skip
    if meta["length"] is not None:
        text += f" of {meta['length']}"
    return ", ".join([text, " and ".join(bounds)]) if bounds else text


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _closest(word: Any, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
