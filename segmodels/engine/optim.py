"""Parameter groups, optimisers and the moving average of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from segmodels.config import TrainConfig


def parameter_groups(model: nn.Module, settings: TrainConfig) -> list[dict[str, Any]]:
    """Up to four groups: backbone or not (learning rate), one-dimensional or not (weight decay).

    One-dimensional parameters are exactly the biases and the scales and shifts of normalisation.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 or settings.decay_norm_and_bias
            groups.setdefault((name.startswith("backbone."), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.lr * (settings.backbone_rate if backbone else 1.0),
            "initial_lr": settings.lr * (settings.backbone_rate if backbone else 1.0),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (backbone, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
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
