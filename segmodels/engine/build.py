"""From settings to data, network and predictor."""

from __future__ import annotations

import ctypes
import os
import random
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from segmodels.backbones.weights import read_state_dict
from segmodels.config import Config, load_config
from segmodels.data import SegmentationDataset, create_dataset
from segmodels.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorJitter,
    Compose,
    RandomCrop,
    RandomFlip,
    RandomScale,
    Transform,
)
from segmodels.engine.checkpoints import CheckpointError, load_checkpoint
from segmodels.engine.inference import Predictor, Refinement
from segmodels.refine import CRFRNN, DenseCRF, DomainTransform, unary_from_probabilities
from segmodels.registry import create_model


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


def build_transforms(config: Config) -> Transform:
    """Scale, colour, flip and crop (DeepLabv3, Chen et al. 2017, arXiv:1706.05587, section 4.1)."""
    data = config.data
    transforms: list[Transform] = [RandomScale(*data.scale)]
    if data.flip:
        transforms.append(RandomFlip(data.flip))
    transforms.append(RandomCrop(data.crop, data.cat_max_ratio))
    if data.jitter:  # after the crop: fewer pixels
        transforms.append(ColorJitter(data.jitter, data.jitter, data.jitter))
    return Compose(transforms)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of ``config.model``; errors as :func:`segmodels.create_model` and :func:`load_trained`."""
    settings = config.model
    model = create_model(
        settings.name,
        num_classes,
        settings.output_stride,
        aux_loss=settings.aux_loss,
        weights_backbone=settings.weights_backbone,
        **settings.options,
    )
    if settings.weights is not None:
        _load_weights(model, load_checkpoint(settings.weights), settings.weights, settings.name)
    return model


def _load_weights(model: nn.Module, state: dict[str, Any], path: str | os.PathLike[str], name: str) -> None:
    """The weights of a checkpoint: the averaged ones where the run kept an average."""
    weights = state["ema"]["model"] if state.get("ema") else state["model"]
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
        device=device,
        amp=config.train.amp != "none",
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
    path: str | os.PathLike[str], overrides: list[str]
) -> tuple[nn.Module, Config, dict[str, Any], dict[str, Any]]:
    """Builds the network of a checkpoint and loads its weights: the averaged ones where the run kept an average.

    Args:
        path: written by :mod:`segmodels.train`.
        overrides: ``section.key=value`` on top of the settings in it.

    Returns:
        The model in evaluation mode, the settings, the same as plain containers, and the checkpoint itself.

    Raises:
        CheckpointError: unreadable, or its weights do not fit the network of the settings.
        ConfigError: as :func:`segmodels.config.load_config`.
    """
    state = load_checkpoint(path)
    # The weights come from the checkpoint: the file they once started from need not exist here.
    config, raw = load_config(state["config"], ["model.weights_backbone=null", "model.weights=null", *overrides])
    model = build_model(config, len(state["classes"]))
    _load_weights(model, state, path, config.model.name)
    if config.eval.output_stride is not None:
        model.set_output_stride(config.eval.output_stride)  # type: ignore[operator]
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval(), config, raw, state
