"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from segmodels.backbones import BACKBONES, CLASSIC_BACKBONES, Backbone
from segmodels.backbones.efficientnet_lite import imagenet_file
from segmodels.backbones.weights import load_backbone, read_state_dict
from segmodels.models import SYSTEMS, SegmentationModel
from segmodels.readers import load_published, read_published


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` takes, sorted; ``pattern`` as in a shell, for example ``"deeplabv3plus_*"``."""
    return fnmatch.filter(sorted(f"{system}_{backbone}" for system in SYSTEMS for backbone in backbones_of(system)), pattern)


def backbones_of(system: str) -> dict[str, Callable[..., Backbone]]:
    """The backbones that a system runs on: those that it names, otherwise all of :data:`BACKBONES`."""
    named = SYSTEMS[system].backbones
    return BACKBONES if named is None else {name: (BACKBONES | CLASSIC_BACKBONES)[name] for name in named}


def create_model(
    name: str,
    num_classes: int = 21,
    output_stride: int | None = None,
    *,
    backbone: str | None = None,
    multi_grid: Sequence[int] | None = None,
    aux_loss: bool = False,
    weights: str | os.PathLike[str] | None = None,
    weights_backbone: str | os.PathLike[str] | None = None,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    **options: Any,
) -> SegmentationModel:
    """A segmentation model, in training mode.

    Args:
        name: ``"deeplabv3_resnet50"`` (see :func:`list_models`), or a system's name with ``backbone=``.
        num_classes: channels of the logits.
        output_stride: 4, 8, 16 or 32 (with ``cascade`` up to 256): how far the backbone may reduce the image; by default the
            paper's, 16 for DeepLab, 8 for PSPNet and FCN. Can be changed later with ``model.set_output_stride``; the systems
            before DeepLabv3 have one stride only.
        backbone: with a system's name only.
        multi_grid: rate factors of the blocks of the last stages of a ResNet (DeepLabv3, section 3.2.1), of the convolutions
            of the last block of Xception.
        aux_loss: with an auxiliary head, active in training.
        weights: a published segmentation network (:mod:`segmodels.readers`). The arguments under which it computes what its
            authors' code computes become the defaults of this call; ``num_classes`` has to be its own.
        weights_backbone: None, ``"imagenet"`` (efficientnet_lite0, from its optional package) or a classification file
            (``.safetensors``; ``.pth``/``.pt`` that holds tensors only; ``.caffemodel``).
        input_mean, input_std: three values each, of the normalisation ``(x - mean) / std`` of RGB in [0, 1] that the input will
            have; by default the one under which the backbone's weights were published.
        options: of the system (:class:`segmodels.models.DeepLabV3`, :class:`segmodels.models.DeepLabV3Plus`,
            :class:`segmodels.models.PSPNet`: ``rates``, ``bins``, ``dropout``, ``head_channels`` ...) or of the backbone
            (:class:`segmodels.backbones.ResNet`: ``stem``, ``stride_placement``, ``first_block``, ``cascade``;
            :class:`segmodels.backbones.MobileNetV2`: ``width_mult``, ``padding`` ...).

    Raises:
        ValueError: unknown name or a value outside what is expected; TypeError: unknown argument. Both name the closest.
        FileNotFoundError, ModuleNotFoundError, ValueError: weights that are missing, unreadable or do not fit.
    """
    system_name, backbone_name = _split_name(name, backbone)
    if weights is not None:
        published = read_published(weights)
        if published.model != f"{system_name}_{backbone_name}":
            raise ValueError(
                f"weights={os.fspath(weights)!r} are of {published.model!r}, not of {f'{system_name}_{backbone_name}'!r}"
            )
        given = {"output_stride": output_stride, "multi_grid": multi_grid, "input_mean": input_mean, "input_std": input_std}
        arguments = published.options | {k: v for k, v in given.items() if v is not None} | options
        model = create_model(
            name, num_classes, backbone=backbone, aux_loss=aux_loss, weights_backbone=weights_backbone, **arguments
        )
        load_published(model, published.state, os.fspath(weights))
        return model
    system = SYSTEMS[system_name]
    build_backbone = backbones_of(system_name)[backbone_name]
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r}: expected a positive integer")
    if not isinstance(aux_loss, bool):
        raise ValueError(f"aux_loss={aux_loss!r}: expected True or False")
    if multi_grid is not None:
        options["multi_grid"] = multi_grid
    backbone_keys = _keywords(build_backbone) - {"output_stride"}
    system_keys = _keywords(system) - {"backbone", "num_classes", "aux_loss"}
    for key in options:
        if key not in backbone_keys | system_keys:
            raise TypeError(
                f"create_model({name!r}) has no argument {key!r}{_closest(key, backbone_keys | system_keys)}; "
                f"{system_name} takes {', '.join(sorted(system_keys))}; {backbone_name} takes "
                f"{', '.join(sorted(backbone_keys)) or 'none'}"
            )
    if output_stride is None:
        output_stride = system.default_output_stride
    backbone_options = {k: v for k, v in (system.backbone_options | options).items() if k in backbone_keys}
    features = build_backbone(output_stride=output_stride, **backbone_options)
    features.input_mean = _three("input_mean", input_mean, features.input_mean)
    features.input_std = _three("input_std", input_std, features.input_std)
    state = None if weights_backbone is None else _load_weights(features, backbone_name, weights_backbone)
    model = system(features, num_classes, aux_loss=aux_loss, **{k: options[k] for k in options if k in system_keys})
    if state is not None:
        model.start_from_classification(state)
    return model


def _split_name(name: str, backbone: str | None) -> tuple[str, str]:
    if backbone is None:
        system, _, backbone_name = name.partition("_")
        if system in SYSTEMS and not backbone_name:
            raise ValueError(
                f"model {name!r} needs a backbone: create_model({name!r}, backbone={next(iter(backbones_of(name)))!r})"
            )
        if system not in SYSTEMS or backbone_name not in backbones_of(system):
            raise ValueError(f"unknown model {name!r}{_closest(name, list_models())}; list_models() has all names")
        return system, backbone_name
    if name not in SYSTEMS:
        hint = "; the name already has a backbone" if name in list_models() else _closest(name, SYSTEMS)
        raise ValueError(f"with backbone={backbone!r}, name={name!r}: expected one of {', '.join(SYSTEMS)}{hint}")
    known = backbones_of(name)
    if backbone not in known:
        raise ValueError(f"unknown backbone {backbone!r}{_closest(backbone, known)}; expected one of {', '.join(known)}")
    return name, backbone


def _load_weights(backbone: Backbone, name: str, source: str | os.PathLike[str]) -> dict[str, Tensor]:
    if source == "imagenet":
        if name != "efficientnet_lite0":
            raise ValueError(
                f"weights_backbone='imagenet' exists for efficientnet_lite0 only; for {name} give the path of a "
                "classification file (.safetensors, .pth, .pt or .caffemodel)"
            )
        source = imagenet_file()
    state = read_state_dict(source)
    load_backbone(backbone, state, os.fspath(source))
    return state


def _three(name: str, given: Sequence[float] | None, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if given is None:
        return default
    if len(given) != 3 or (name == "input_std" and min(given) <= 0):
        kind = "positive numbers" if name == "input_std" else "numbers"
        raise ValueError(f"{name}={list(given)}: expected three {kind}, one per channel")
    red, green, blue = map(float, given)
    return red, green, blue


def _keywords(builder: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(builder).parameters)


def _closest(word: str, known: Collection[str]) -> str:
    matches = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
