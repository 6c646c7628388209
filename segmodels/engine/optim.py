"""Parameter groups, optimisers and the moving average of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from segmodels.config import TrainConfig
from segmodels.engine.parts import check_parts, norms, part_of


def parameter_groups(model: nn.Module, settings: TrainConfig) -> list[dict[str, Any]]:
    """One group for every rate and weight decay there is; frozen parameters are in none.

    The rate of a parameter is ``lr`` times the factor of its part: that of the longest name in ``rates`` that it lies in, else
    ``backbone_rate`` or ``head_rate``; biases have ``bias_rate`` on top. One-dimensional parameters are exactly the biases and
    the scales and shifts of normalisation, which do not decay unless ``decay_norm_and_bias``.

    Raises:
        ValueError: ``rates`` of a part that the model does not have.
    """
    check_parts("train.rates", settings.rates, model)
    shifts = {f"{name}.bias" for name, _ in norms(model)}
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        backbone, decays = name.startswith("backbone."), parameter.ndim > 1 or settings.decay_norm_and_bias
        part = part_of(name, settings.rates)
        factor = float(settings.rates[part]) if part else settings.backbone_rate if backbone else settings.head_rate
        if name.endswith("bias") and name not in shifts:
            factor *= settings.bias_rate
        groups.setdefault((backbone, decays, factor), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.lr * factor,
            "initial_lr": settings.lr * factor,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (_, decays, factor), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(model: nn.Module, settings: TrainConfig) -> Optimizer:
    """SGD with momentum, or AdamW (``momentum`` is its beta1)."""
    groups = parameter_groups(model, settings)
    if settings.optimizer == "sgd":
        return SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    return AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999))


class ModelEma:
    """Exponential moving average of parameters and of floating-point buffers (Tarvainen and Valpola 2017,
    arXiv:1703.01780). The decay rises as ``(1 + t) / (10 + t)`` so that the first weights are forgotten quickly.

    ``module`` is the averaged copy, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of the average. Call it after the optimiser's step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averaged, current = [], []
        for mine, theirs in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                averaged.append(mine)
                current.append(theirs)
            else:
                mine.copy_(theirs)
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "model": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.module.load_state_dict(state["model"])
