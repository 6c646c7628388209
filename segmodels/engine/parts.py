"""Parts of a network by the names of its modules and parameters: which are trained, and how fast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segmodels.config import TrainConfig


def part_of(name: str, parts: Iterable[str]) -> str | None:
    """The longest of ``parts`` that ``name`` is or lies in, or None: ``backbone.conv1.weight`` lies in ``backbone.conv1``, not in
    ``backbone.conv``."""
    return max((part for part in parts if name == part or name.startswith(f"{part}.")), key=len, default=None)


def check_parts(setting: str, parts: Iterable[str], model: nn.Module) -> None:
    """Raises ValueError for one of ``parts`` that is no part of the model."""
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for part in parts:
        if part not in names or not part:
            first = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"{setting}: {type(model).__name__} has no part {part!r}; expected a module or parameter: {first} "
                             "or a name inside them")  # fmt: skip


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The batch norms with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))


def prepare_for_training(model: nn.Module, settings: TrainConfig) -> None:
    """Takes what ``freeze`` and ``freeze_norm`` name out of training, and sets the decay of running statistics.

    Raises:
        ValueError: a name in ``freeze`` that the model does not have; nothing left to train.
    """
    check_parts("train.freeze", settings.freeze, model)
    for name, parameter in model.named_parameters():
        if part_of(name, settings.freeze) is not None:
            parameter.requires_grad_(False)
    for _, norm in norms(model):
        if settings.freeze_norm:
            norm.requires_grad_(False)
        if settings.norm_decay is not None:
            norm.momentum = 1 - settings.norm_decay  # type: ignore[assignment]
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"train.freeze={settings.freeze} leaves no parameter to train")


def training_mode(model: nn.Module, settings: TrainConfig) -> None:
    """Training mode, but for frozen parts, which compute as in evaluation: without dropout, with their running statistics."""
    model.train()
    for name, module in model.named_modules():
        if part_of(name, settings.freeze) is not None or (settings.freeze_norm and isinstance(module, _BatchNorm)):
            module.training = False
