"""From settings to data, network and predictor."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from segmodels.backbones.weights import read_state_dict
from segmodels.config import Config, ConfigError, load_config
from segmodels.data import SegmentationDataset, class_names, create_dataset
from segmodels.data.hard_classes import HardClasses
from segmodels.data.loader import ResumableSampler
from segmodels.data.shards import Shards, ShardSampler
from segmodels.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorJitter,
    Compose,
    RandomBlur,
    RandomCrop,
    RandomFlip,
    RandomRotation,
    RandomScale,
    Transform,
)
from segmodels.engine.checkpoints import CheckpointError, is_checkpoint, load_checkpoint
from segmodels.engine.inference import Predictor, Refinement
from segmodels.engine.parts import part_of
from segmodels.readers import read_published
from segmodels.refine import CRFRNN, DenseCRF, DomainTransform, unary_from_probabilities
from segmodels.registry import create_model
from segmodels.weak.annotations import WeakLabels
from segmodels.weak.dataset import Subset, WeakDataset, draw_strong
from segmodels.weak.sampler import MixedSampler


def prepare_runtime(config: Config) -> torch.device:
    """Threads, seeds, memory and device. Raises ValueError for a device that is not there."""
    if config.run.keep_memory:
        keep_freed_memory()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
        cv2.setNumThreads(config.run.threads)
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % 2**32)
    torch.manual_seed(config.run.seed)
    try:
        device = torch.device(config.run.device)
    except RuntimeError as error:
        raise ValueError(f"run.device={config.run.device!r}: expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"run.device={config.run.device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def keep_freed_memory() -> None:
    """glibc gives blocks of 32 MB and more back to the system when they are freed. A training step frees and takes many of
    them, and the operating system clears every page again."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def build_dataset(config: Config, split: str) -> SegmentationDataset:
    """One split of the data set; errors as :func:`segmodels.data.create_dataset`."""
    return create_dataset(config.data.name, config.data.root, split, **config.data.options)


def build_train_set(config: Config) -> SegmentationDataset:
    """The training split with the images that ``config.weak`` leaves, strong or weak; errors as those of its parts."""
    dataset, settings = build_dataset(config, config.data.train_split), config.weak
    strong = draw_strong(len(dataset), settings.strong, settings.strong_seed)
    if settings.method == "none":
        if settings.strong:
            dataset = Subset(dataset, np.flatnonzero(strong).tolist())
        hard = config.data.hard_classes
        return HardClasses(dataset, hard, config.data.hard_copies) if hard else dataset
    assert settings.labels is not None  # the configuration has checked it
    return WeakDataset(dataset, WeakLabels.load(settings.labels), ~strong, settings.method, settings.labels)


def build_sampler(config: Config, train_set: SegmentationDataset) -> ResumableSampler | None:
    """The order of training where it is a special one: batches of strong and weak images, or shard after shard; else None."""
    if isinstance(train_set, Shards):
        return ShardSampler(train_set, config.run.seed, config.train.batch_size)
    if not isinstance(train_set, WeakDataset) or train_set.weak.all() or not train_set.weak.any():
        return None
    size = config.train.batch_size
    share = config.weak.strong_per_batch or size // 2
    if not 1 <= share < size:
        raise ValueError(f"weak.strong_per_batch={share} in batches of train.batch_size={size}: expected 1 to {size - 1}")
    strong, weak = np.flatnonzero(~train_set.weak), np.flatnonzero(train_set.weak)
    return MixedSampler(strong, weak, share, size, config.run.seed)


def build_transforms(config: Config) -> Transform:
    """Scale, flip and crop (DeepLabv3, Chen et al. 2017, arXiv:1706.05587, section 4.1), rotation and blur (PSPNet), colour."""
    data = config.data
    transforms: list[Transform] = [RandomScale(data.scale[0], data.scale[1], data.scale_step)]
    if data.rotation:
        transforms.append(RandomRotation(data.rotation))
    if data.blur:
        transforms.append(RandomBlur(data.blur))
    if data.flip:
        transforms.append(RandomFlip(data.flip))
    transforms.append(RandomCrop(data.crop, data.cat_max_ratio))
    if data.jitter:  # after the crop: fewer pixels
        transforms.append(ColorJitter(data.jitter, data.jitter, data.jitter))
    return Compose(transforms)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of ``config.model``; errors as :func:`segmodels.create_model` and :func:`load_trained`."""
    settings = config.model
    continued = settings.weights is not None and is_checkpoint(settings.weights)
    model = create_model(
        settings.name,
        num_classes,
        settings.output_stride,
        aux_loss=settings.aux_loss,
        weights=None if continued else settings.weights,
        weights_backbone=settings.weights_backbone,
        **settings.options,
    )
    if settings.weights is not None and continued:
        _load_weights(model, load_checkpoint(settings.weights), settings.weights, settings.name, settings.weights_skip)
    elif settings.weights_skip:
        raise ConfigError(f"model.weights_skip={settings.weights_skip}: expected model.weights, a checkpoint of segmodels.train")
    return model


def write_out_published_options(config: Config, raw: dict[str, Any]) -> None:
    """Adds to the settings the options that published weights bring, so that a checkpoint says what its network was.

    Args:
        config, raw: as :func:`segmodels.config.load_config` returns them; changed in place.
    """
    weights = config.model.weights
    if weights is not None and not is_checkpoint(weights):
        options = dict(read_published(weights).options)
        options.pop("output_stride", None)  # has a setting of its own
        config.model.options = options | config.model.options
        raw["model"]["options"] = options | raw["model"]["options"]


def _load_weights(
    model: nn.Module, state: dict[str, Any], path: str | os.PathLike[str], name: str, skip: Sequence[str] = ()
) -> None:
    """The weights of a checkpoint, but for the parts in ``skip``: the averaged ones where the run kept an average."""
    weights = state["ema"]["model"] if state.get("ema") else state["model"]
    own = model.state_dict()
    for part in skip:
        if not any(part_of(key, [part]) for key in (*own, *weights)):
            raise ConfigError(f"model.weights_skip: neither {name} nor {path} has a part {part!r}")
    weights = {key: value for key, value in weights.items() if part_of(key, skip) is None}
    weights |= {key: value for key, value in own.items() if part_of(key, skip) is not None}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} does not fit {name}: {reason[:600]}") from error


def normalization(model: nn.Module) -> dict[str, Any]:
    """``mean`` and ``std`` under which the weights of the model's backbone were published."""
    backbone = getattr(model, "backbone", None)
    return {
        "mean": getattr(backbone, "input_mean", IMAGENET_MEAN),
        "std": getattr(backbone, "input_std", IMAGENET_STD),
    }


def build_predictor(config: Config, model: nn.Module, device: torch.device) -> Predictor:
    """Inference as ``config.eval`` says, with the precision and layout of training."""
    return Predictor(
        model,
        **normalization(model),
        scales=config.eval.scales,
        flip=config.eval.flip,
        refine=_refinement(config),
        canvas=config.eval.canvas,
        device=device,
        amp=config.train.amp,
        mode=config.eval.mode,
        window=config.eval.window,
        window_stride=config.eval.window_stride,
        margin=config.eval.margin,
        long_side=config.eval.long_side,
        channels_last=config.train.channels_last,
    )


def _refinement(config: Config) -> Refinement | None:
    if config.eval.refine == "none":
        return None
    if config.eval.refine == "dt":
        sigma_s, sigma_r = config.eval.dt
        return DomainTransform(sigma_s, sigma_r)
    if config.eval.refine == "crf_rnn":
        return _crf_rnn(config.eval.crf_rnn)
    w1, sigma_alpha, sigma_beta, w2, sigma_gamma = config.eval.crf
    crf = DenseCRF(w1, sigma_alpha, sigma_beta, w2, sigma_gamma)
    return lambda probabilities, images: crf(unary_from_probabilities(probabilities), images)


class Origin(NamedTuple):
    """Where weights come from: the file, its classes with their colours, and the steps of its training where known."""

    path: str
    classes: list[str]
    colors: list[list[int]]
    iteration: int | None


def _crf_rnn(weights: str | None) -> Refinement:
    state = read_state_dict(weights) if weights is not None else None

    @torch.inference_mode()
    def refine(probabilities: Tensor, images: Tensor) -> Tensor:
        layer = CRFRNN(probabilities.shape[1]).to(probabilities.device).eval()
        if state is not None:
            layer.load_state_dict(state)
        return layer(-unary_from_probabilities(probabilities), images)

    return refine


def load_trained(
    checkpoint: str | None, recipe: str | None, overrides: list[str]
) -> tuple[nn.Module, Config, dict[str, Any], Origin]:
    """Builds a network and loads its weights: of a checkpoint (the averaged ones where the run kept an average), or the
    published ones that a recipe names as ``model.weights``.

    Args:
        checkpoint: written by :mod:`segmodels.train`, or None.
        recipe: used without a checkpoint only.
        overrides: ``section.key=value`` on top of the settings.

    Returns:
        The model in evaluation mode, the settings, the same as plain containers, and the origin.

    Raises:
        CheckpointError: unreadable, or its weights do not fit the network of the settings.
        ConfigError: as :func:`segmodels.config.load_config`; neither checkpoint nor recipe, both, or a recipe without weights.
    """
    if (checkpoint is None) == (recipe is None):
        raise ConfigError("expected either --checkpoint FILE or --config RECIPE whose model.weights is a file")
    if checkpoint is not None:
        state = load_checkpoint(checkpoint)
        # The weights come from the checkpoint: the file they once started from need not exist here.
        config, raw = load_config(state["config"], ["model.weights_backbone=null", "model.weights=null", *overrides])
        origin = Origin(checkpoint, state["classes"], state["colors"], state["iteration"])
        model = build_model(config, len(state["classes"]))
        _load_weights(model, state, checkpoint, config.model.name)
    else:
        config, raw = load_config(recipe, overrides)
        if config.model.weights is None:
            raise ConfigError(f"model.weights of {recipe} is null: expected a file, or --checkpoint FILE")
        write_out_published_options(config, raw)
        classes, colors = class_names(config.data.name, config.data.options)
        origin = Origin(config.model.weights, classes, colors.tolist(), None)
        model = build_model(config, len(classes))
    if config.eval.output_stride is not None:
        model.set_output_stride(config.eval.output_stride)  # type: ignore[operator]
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval(), config, raw, origin
