"""Learning rates as functions of the iteration, so that nothing but the iteration has to be stored to resume."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer


@dataclass(frozen=True)
class PolySchedule:
    """``(1 - iteration / total) ** power`` (DeepLabv2, Chen et al. 2016, arXiv:1606.00915, section 4.1), with an optional
    linear warm-up from ``warmup_start`` times the poly value up to it.

    Raises:
        ValueError: ``total`` below 1, or a warm-up that is negative or not shorter than ``total``.
    """

    total: int
    power: float = 0.9
    warmup: int = 0
    warmup_start: float = 0.01

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"total={self.total}: expected 1 iteration or more")
        if not 0 <= self.warmup < self.total:
            raise ValueError(f"warm-up of {self.warmup} iterations: expected 0 to fewer than the {self.total} in all")

    def factor(self, iteration: int) -> float:
        """What the base rate is multiplied by in step ``iteration`` (0 is the first)."""
        if not 0 <= iteration < self.total:
            raise ValueError(f"iteration {iteration}: expected 0 to {self.total - 1}")
        factor = (1 - iteration / self.total) ** self.power
        if iteration < self.warmup:
            factor *= self.warmup_start + (1 - self.warmup_start) * iteration / self.warmup
        return factor

    def apply(self, optimizer: Optimizer, iteration: int) -> float:
        """Sets the rate of every group from its ``initial_lr``; returns the factor."""
        factor = self.factor(iteration)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return factor
