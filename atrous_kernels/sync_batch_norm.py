"""Batch normalisation with the statistics of several processes, on the CPU as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atrous_kernels.ops.conv_bn_relu import Normalisation


class SyncBatchNorm2d(torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` whose statistics in training are those of the batches of all processes together, where
    torch.distributed is initialised. Same parameters and state_dict, so the class of an existing layer may be changed to it.

    ``process_group`` None stands for all processes.
    """

    process_group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        group = group_of(self)
        if group is None or not self.training:
            return super().forward(input)
        statistics = (self.weight, self.bias, self.running_mean, self.running_var)
        norm = Normalisation(statistics, True, count_batch(self), self.eps, group)
        return norm.apply(input, folded=False, activation="none", backend="auto")


def group_of(norm: torch.nn.Module) -> Any:
    """The group whose statistics ``norm`` takes in training, or None: those of this process alone."""
    if not (isinstance(norm, SyncBatchNorm2d) and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return norm.process_group or torch.distributed.group.WORLD


def count_batch(norm: torch.nn.BatchNorm2d) -> float:
    """In training, count the batch as ``BatchNorm2d.forward`` does; the weight of this batch in the running statistics."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum
