"""Published weights: safetensors, PyTorch files that contain tensors and nothing else, and Caffe's."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from segmodels.backbones.base import Backbone
from segmodels.backbones.caffemodel import read_caffemodel


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pth``, ``.pt`` or ``.caffemodel`` file, on the CPU. No code of the file is ever run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that holds more than named tensors; the message says what.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"weights file {str(file)!r} does not exist")
    if file.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"reading {str(file)!r} needs: pip install safetensors") from error
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is not a readable safetensors file: {error}") from error
    if file.suffix == ".caffemodel":
        return read_caffemodel(file)
    if file.suffix not in (".pth", ".pt"):
        raise ValueError(
            f"weights file {str(file)!r}: expected .safetensors, .pth, .pt or .caffemodel, not "
            f"{file.suffix or 'a name without suffix'!r}"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{str(file)!r} cannot be read as plain tensors (weights_only=True), so it is refused: {reason}"
        ) from error
    for key in _NESTED:  # a checkpoint of a training script: the weights beside optimiser and epoch
        if isinstance(state, Mapping) and _is_flat(state.get(key)):
            state = state[key]
    if not _is_flat(state):
        raise ValueError(
            f"{str(file)!r} holds {type(state).__name__}: expected a flat dictionary of named tensors, as it is or under one of "
            f"{', '.join(_NESTED)}"
        )
    # DataParallel and its kin name everything after themselves.
    wrapped = all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state.items()}


_NESTED = ("state_dict", "model", "model_state")


def _is_flat(state: object) -> bool:
    return isinstance(state, Mapping) and len(state) > 0 and all(isinstance(value, Tensor) for value in state.values())


def load_backbone(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a published classification state_dict into ``backbone``; its classifier's tensors are left out.

    Files whose BatchNorm was folded into the convolutions (they have biases) load too: BatchNorm becomes the identity
    plus that bias. That is exact in eval mode only; in training, batch statistics change the function at once.

    Raises:
        ValueError: names every missing, unexpected or mis-shaped tensor; nothing is copied.
    """
    expected = backbone.state_dict()
    state = backbone.from_published(_deep_stem(state))
    state = _unfold_batch_norm(state, expected, backbone)
    # A name of the classifier may begin like one of ours (EfficientNet's two _bn1): ours wins.
    given = {k: v for k, v in state.items() if k in expected or not k.startswith(backbone.classifier_prefixes)}
    hint = " (a ResNet-d: stem='deep', stem_width=32, avg_down=True)" if _RESNET_D in given and _RESNET_D not in expected else ""
    check_fit(given, expected, f"{source} does not fit {type(backbone).__name__}{hint}")
    backbone.load_state_dict(given, strict=False)


#: of timm's ``d`` variants, whose projections have an average before them
_RESNET_D = "layer2.0.downsample.2.weight"


def _deep_stem(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Under the names of timm where the three convolutions of a deep stem are called conv1 to conv3 (hszhao/semseg)."""
    names = {"conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4", "conv3": "conv1.6", "bn3": "bn1"}
    if not {"conv1.weight", "conv2.weight", "conv3.weight"} <= set(state):
        return state
    parts = ((name, name.partition(".")) for name in state)
    return {f"{names.get(first, first)}{dot}{rest}": state[name] for name, (first, dot, rest) in parts}


def _unfold_batch_norm(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], backbone: Backbone
) -> dict[str, Tensor]:
    """Give every folded convolution (a bias that we do not have) a BatchNorm that only adds this bias."""
    unfolded = dict(state)
    for key, bias in state.items():
        prefix, _, last = key.removesuffix(".bias").rpartition(".")
        if not key.endswith(".bias") or key in expected or not last.isdigit():
            continue
        name = f"{prefix}.{int(last) + 1}"
        if f"{name}.running_var" not in expected or f"{name}.running_var" in state:
            continue
        norm = backbone.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        del unfolded[key]
        unfolded |= adding_batch_norm(bias, name, norm.eps)
    return unfolded


def check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], complaint: str) -> None:
    """Raises ValueError that names every missing, unexpected or mis-shaped tensor; BatchNorm's counters may be missing."""
    problems = [f"missing {key}" for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    problems += [f"unexpected {key}" for key in given if key not in expected]
    problems += [
        f"{key} has shape {list(value.shape)}, expected {list(expected[key].shape)}"
        for key, value in given.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{complaint}:\n  {shown}")


def adding_batch_norm(bias: Tensor, name: str, eps: float = 1e-5) -> dict[str, Tensor]:
    """The state of a BatchNorm that only adds ``bias``: what stands behind a convolution that it was folded into.

    Exact in eval mode only; in training, batch statistics change the function at once.
    """
    return {
        f"{name}.weight": torch.ones_like(bias),
        f"{name}.bias": bias,
        f"{name}.running_mean": torch.zeros_like(bias),
        f"{name}.running_var": torch.full_like(bias, 1 - eps),
    }
