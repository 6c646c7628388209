"""Settings of every command: dataclasses whose fields carry type, default, bounds and explanation.

A recipe is a YAML file of the same sections, perhaps on top of another one (``base: NAME``); ``section.key=value`` on the
command line overrides it. ``--help`` and all error messages are made from the fields below, so they cannot drift from what the
code accepts.
"""

# The fields' _setting(...) only describes a field, as dataclasses.field does.
# ruff: noqa: RUF009

from __future__ import annotations

import os
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segmodels.settings import ConfigError, as_yaml, check_ranges, check_resolved, closest, expected_text, merge, read_recipe
from segmodels.settings import setting as _setting

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class DataConfig:
    """Where the images come from and how they are augmented."""

    name: str = _setting("synthetic", "data set, see python -m segmodels.data list")
    root: str | None = _setting(None, "its folder; ${oc.env:NAME} reads an environment variable")
    train_split: str = _setting("train", "split to train on")
    val_split: str = _setting("val", "split of the periodic validation, of evaluate and of best.pt")
    options: dict[str, Any] = _setting({}, "further arguments of the data set, for both splits")
    crop: list[int] = _setting([321, 321], "height and width of the training crops", low=1, length=2)
    scale: list[float] = _setting([0.5, 2.0], "bounds of the random scale factor", above=0, length=2)
    scale_step: float | None = _setting(None, "draw the factor from steps of this size; null: from the whole interval", above=0)
    rotation: float = _setting(0.0, "largest angle, in degrees, by which every other image is rotated", low=0, high=180)
    blur: float = _setting(0.0, "probability of a Gaussian blur", low=0, high=1)
    cat_max_ratio: float = _setting(1.0, "draw crops again in which one class covers more than this share", above=0, high=1)
    flip: float = _setting(0.5, "probability of mirroring left and right", low=0, high=1)
    jitter: float = _setting(0.0, "strength of the random brightness, contrast and saturation", low=0, high=1)
    hard_classes: list[str] = _setting([], "training images that show one of these classes come hard_copies times per epoch")
    hard_copies: int = _setting(2, "see hard_classes", low=2)
    cache: bool = _setting(True, "keep decoded images in memory, as many as fit into half of it")
    workers: int = _setting(0, "loading processes; 0 loads in the training process", low=0)
    on_error: str = _setting(
        "stop", "at an unreadable training image: stop, or skip (take the next one, and count)", choices=("stop", "skip")
    )
    max_skipped: float = _setting(0.01, "share of the training split above which on_error=skip stops", above=0, high=1)


@dataclass
class ModelConfig:
    """The network."""

    name: str = _setting("deeplabv3_resnet50", "see segmodels.list_models()")
    output_stride: int = _setting(
        16, "pixels of the image per pixel of the encoder's output: 4 to 32, with cascade to 256", low=4, high=256
    )
    weights_backbone: str | None = _setting(None, "classification weights of the backbone: imagenet, a file, or null")
    weights: str | None = _setting(None, "start from these weights: a checkpoint of segmodels.train, or a published network")
    weights_skip: list[str] = _setting([], "with weights: parts of the network that do not take them, for example [classifier]")
    aux_loss: bool = _setting(False, "add the auxiliary head")
    options: dict[str, Any] = _setting({}, "further arguments of create_model: rates, separable, multi_grid, ...")


@dataclass
class TrainConfig:
    """Optimisation and the loss."""

    iterations: int = _setting(20000, "optimiser steps", low=1)
    batch_size: int = _setting(16, "images per step", low=1)
    accumulate: int = _setting(
        1, "parts that a batch is computed in, one after the other: less memory, the gradient of the whole batch", low=1
    )
    optimizer: str = _setting("sgd", "optimiser", choices=("sgd", "adamw"))
    lr: float = _setting(0.01, "base learning rate", above=0)
    momentum: float = _setting(0.9, "momentum of sgd, beta1 of adamw", low=0, high=0.9999)
    nesterov: bool = _setting(False, "Nesterov momentum (sgd)")
    weight_decay: float = _setting(1e-4, "weight decay", low=0)
    decay_norm_and_bias: bool = _setting(False, "apply it to batch norm and biases as well")
    backbone_rate: float = _setting(1.0, "factor on the learning rate of the backbone", low=0)
    head_rate: float = _setting(1.0, "factor on the learning rate of everything else", low=0)
    bias_rate: float = _setting(1.0, "further factor on the learning rate of biases (not of batch norm's shifts)", low=0)
    rates: dict[str, Any] = _setting(
        {}, "factor per part of the network, in place of backbone_rate and head_rate: {backbone.fc6: 10}; the longest name counts"
    )
    schedule: str = _setting(
        "poly", "of the rate: lr * (1 - iteration / iterations) ** power, lr * step_factor ** (steps that have passed), or lr",
        choices=("poly", "step", "constant"),
    )  # fmt: skip
    power: float = _setting(0.9, "power of schedule=poly", low=0)
    steps: list[int] = _setting([], "iterations at which schedule=step lowers the rate", low=1)
    step_factor: float = _setting(0.1, "factor on the rate at each of the steps", above=0, high=1)
    warmup: str = _setting(
        "linear", "in the warm-up the rate rises from warmup_start, or stays there", choices=("linear", "constant")
    )
    warmup_iterations: int = _setting(0, "first steps, which are the warm-up", low=0)
    warmup_start: float = _setting(0.01, "factor on the rate at the first step of the warm-up", low=0, high=1)
    freeze: list[str] = _setting([], "parts of the network that are not trained: [backbone.conv1, backbone.layer1]")
    freeze_norm: bool = _setting(False, "every batch norm keeps its statistics, scale and shift")
    norm_decay: float | None = _setting(
        None, "decay of the running statistics of batch norm; null: the network's, mostly 0.9", low=0, high=0.999999
    )
    label_smoothing: float = _setting(0.0, "label smoothing of the cross-entropy", low=0, high=0.99)
    class_weights: list[float] | None = _setting(None, "one weight per class in the cross-entropy", low=0)
    balance: float = _setting(
        0.0, "weights classes by pixel frequency ** -balance instead; 0 is off, 1 the full inverse", low=0, high=1
    )
    labels_at: str = _setting(
        "image", "where the loss compares: scores upsampled to the labels, or labels sampled on the grid of the scores",
        choices=("image", "scores"),
    )  # fmt: skip
    reduction: str = _setting("mean", "of the losses of all labelled pixels of a batch", choices=("mean", "sum"))
    hard_fraction: float = _setting(1.0, "share of the pixels, those of largest loss, that are learned from", above=0, high=1)
    hard_fraction_iterations: int = _setting(0, "first steps, in which that share falls from 1 linearly", low=0)
    aux_weight: float = _setting(0.4, "weight of the auxiliary loss", low=0)
    clip_norm: float = _setting(0.0, "largest norm of the gradient; 0 is off", low=0)
    ema_decay: float = _setting(
        0.0, "decay of the moving average of the weights, which is then what is evaluated; 0 is off", low=0, high=0.999999
    )
    amp: str = _setting("none", "mixed precision; fp16 scales the loss", choices=("none", "bf16", "fp16"))
    channels_last: bool = _setting(True, "channels-last memory layout")
    compile: bool = _setting(False, "torch.compile the network")
    checkpoint_blocks: bool = _setting(False, "recompute the blocks of the backbone in the backward pass: slower, less memory")


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
class DistributedConfig:
    """Several processes, started by torchrun; see docs/scaling.md. train.batch_size is that of all of them together."""

    mode: str = _setting(
        "ddp", "ddp: every process holds the network; fsdp: a share of weights, gradients and optimiser", choices=("ddp", "fsdp")
    )
    sync_bn: bool = _setting(False, "batch norm over the images of all processes instead of each one's own")
    sync_bn_processes: int = _setting(0, "with sync_bn: so many neighbours share statistics, instead of all; 0: all", low=0)
    timeout: float = _setting(600.0, "seconds after which a process that waits for another gives up", above=0)


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
    mode: str = _setting(
        "whole", "what the network sees at once: the image; overlapping windows, whose probabilities are averaged; or tiles "
        "with a margin, reflected at the borders of the image", choices=("whole", "slide", "tile"),
    )  # fmt: skip
    window: list[int] | None = _setting(None, "height and width of mode=slide and tile, margins included", low=1, length=2)
    window_stride: float = _setting(2 / 3, "from one window of mode=slide to the next, as a share of it", above=0, high=1)
    margin: int = _setting(0, "of the tiles of mode=tile, on each side; it is predicted by their neighbours", low=0)
    long_side: int | None = _setting(None, "resize every image to this longer side at scale 1", low=1)
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
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, type] = {
    "data": DataConfig, "model": ModelConfig, "train": TrainConfig, "weak": WeakConfig,
    "distributed": DistributedConfig, "eval": EvalConfig, "run": RunConfig,
}  # fmt: skip


def load_config(
    recipe: str | os.PathLike[str] | dict[str, Any] | None = None, overrides: list[str] | None = None
) -> tuple[Config, dict[str, Any]]:
    """Reads a recipe and applies overrides.

    Args:
        recipe: a YAML file, the name of a recipe of this package, a dictionary of sections, or None for the defaults. Of a
            recipe with stages it is the last one.
        overrides: ``section.key=value``; the value is read as YAML.

    Returns:
        The checked settings, and the same as plain containers with ``${...}`` unresolved: what goes into checkpoints and
        metrics.json, so that they do not name folders of one machine where the recipe does not.

    Raises:
        ConfigError: unknown recipe, unreadable YAML, unknown key, wrong type or value out of range.
    """
    return load_stages(recipe, overrides)[-1]


def load_stages(
    recipe: str | os.PathLike[str] | dict[str, Any] | None = None, overrides: list[str] | None = None
) -> list[tuple[Config, dict[str, Any]]]:
    """As :func:`load_config`, of every stage of a recipe.

    A recipe may end with ``stages``, a list of sections. The first stage has the settings of the recipe with those of the first
    entry on top, each further one those of the stage before with its entry on top; but ``model.weights_skip`` holds for its own
    stage only. Without ``stages`` there is one. Overrides hold for all of them.
    """
    merged = OmegaConf.structured(Config)
    source, sections = "the configuration", dict(recipe) if isinstance(recipe, dict) else {}
    if recipe is not None and not isinstance(recipe, dict):
        path = find_recipe(recipe)
        source, sections = str(path), read_recipe(path, SECTIONS)
        sections.pop("paper", None)  # what it reproduces: see segmodels.reproduce
    stages = sections.pop("stages", [{}])
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"stages={stages!r} in {source}: expected a list of sections {', '.join(SECTIONS)}")
    merge(merged, sections, source, SECTIONS)
    found = []
    for number, stage in enumerate(stages, 1):
        if number > 1:
            merged.model.weights_skip = []
        merge(merged, stage, f"stage {number} of {source}", SECTIONS)
        found.append(_checked(merged.copy(), overrides or []))
    return found


def _checked(merged: DictConfig, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}: expected section.key=value, for example train.lr=0.02")
        try:
            given = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override {text!r}: the value is not YAML: {' '.join(str(error).split())}") from error
        merge(merged, given, "the command line", SECTIONS)
    raw = typing.cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=False))
    check_resolved(merged, raw)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check_ranges(config, SECTIONS)
    _check_together(config)
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
    hint = closest(name, known)
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
            expected = expected_text(hints[item.name], item.metadata)
            lines += [f"  {section}.{item.name}={as_yaml(default)}   ({expected})", f"      {item.metadata['text']}"]
    return "\n".join(lines).lstrip("\n")


def _check_together(config: Config) -> None:
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
    _check_training(config)
    _check_windows(config.eval)


def _check_training(config: Config) -> None:
    train = config.train
    for key, value in train.rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ConfigError(f"train.rates={{{key}: {value!r}}}: expected a factor, >= 0")
    if train.batch_size % train.accumulate:
        raise ConfigError(f"train.accumulate={train.accumulate}: expected a divisor of train.batch_size={train.batch_size}")
    if (train.schedule == "step") != bool(train.steps):
        raise ConfigError(f"train.steps={train.steps} with train.schedule={train.schedule}: expected iterations with step only")
    if train.compile and train.checkpoint_blocks:
        raise ConfigError("train.checkpoint_blocks=True with train.compile=True: expected only one of the two")
    if train.steps != sorted(set(train.steps)):
        raise ConfigError(f"train.steps={train.steps}: expected iterations in ascending order")
    if config.weak.method != "none":
        hard = config.data.hard_classes
        for key, value, expected in (("train.accumulate", train.accumulate, 1), ("data.hard_classes", hard, [])):
            if value != expected:
                raise ConfigError(f"{key}={value} with weak.method={config.weak.method}: expected {expected}")
    if config.train.nesterov and (config.train.optimizer != "sgd" or not config.train.momentum):
        raise ConfigError("train.nesterov=True: expected train.optimizer=sgd with train.momentum above 0")


def _check_windows(settings: EvalConfig) -> None:
    mode, window, margin = settings.mode, settings.window, settings.margin
    if (mode == "whole") != (window is None):
        raise ConfigError(f"eval.window={window} with eval.mode={mode}: expected a size with slide and tile, and only there")
    if margin and mode != "tile":
        raise ConfigError(f"eval.margin={margin} with eval.mode={mode}: expected eval.mode=tile")
    if window is not None and 2 * margin >= min(window):
        raise ConfigError(f"eval.margin={margin}: expected less than half of eval.window={window}")
    if settings.canvas is not None and (mode != "whole" or settings.long_side is not None):
        raise ConfigError(f"eval.canvas={settings.canvas}: expected eval.mode=whole and no eval.long_side")
