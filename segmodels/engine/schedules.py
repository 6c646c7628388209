"""Learning rates as functions of the iteration, so that nothing but the iteration has to be stored to resume."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from segmodels.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The factor on all rates in each step, with an optional warm-up.

    Args:
        total: number of steps.
        kind: ``"poly"``: ``(1 - iteration / total) ** power`` (DeepLabv2, Chen et al. 2016, arXiv:1606.00915, section 4.1);
            ``"step"``: ``step_factor`` to the power of how many of ``steps`` have been reached (DeepLab v1, Chen et al. 2014,
            arXiv:1412.7062, section 4); ``"constant"``: 1 (FCN, Long et al. 2015, section 4.3).
        power, steps, step_factor: see ``kind``.
        warmup: number of first steps in which the factor is smaller.
        warmup_start: what it is smaller by in the first of them.
        warmup_kind: ``"linear"``: from then on it rises to 1; ``"constant"``: it stays to the end of the warm-up.

    Raises:
        ValueError: ``total`` below 1, a warm-up that is negative or not shorter than ``total``, a step outside the run.
    """

    total: int
    power: float = 0.9
    warmup: int = 0
    warmup_start: float = 0.01
    kind: str = "poly"
    steps: Sequence[int] = ()
    step_factor: float = 0.1
    warmup_kind: str = "linear"

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"total={self.total}: expected 1 iteration or more")
        if not 0 <= self.warmup < self.total:
            raise ValueError(f"warm-up of {self.warmup} iterations: expected 0 to fewer than the {self.total} in all")
        if self.steps and max(self.steps) >= self.total:
            raise ValueError(f"steps={list(self.steps)}: expected iterations before the last of {self.total}")

    def factor(self, iteration: int) -> float:
        """What the base rate is multiplied by in step ``iteration`` (0 is the first)."""
        if not 0 <= iteration < self.total:
            raise ValueError(f"iteration {iteration}: expected 0 to {self.total - 1}")
        factor = 1.0
        if self.kind == "poly":
            factor = (1 - iteration / self.total) ** self.power
        elif self.kind == "step":
            factor = self.step_factor ** bisect_right(self.steps, iteration)
        if iteration < self.warmup:
            risen = iteration / self.warmup if self.warmup_kind == "linear" else 0.0
            factor *= self.warmup_start + (1 - self.warmup_start) * risen
        return factor

    def apply(self, optimizer: Optimizer, iteration: int) -> float:
        """Sets the rate of every group from its ``initial_lr``; returns the factor."""
        factor = self.factor(iteration)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return factor


def build_schedule(settings: TrainConfig) -> Schedule:
    """As the settings say; errors as :class:`Schedule`."""
    return Schedule(
        settings.iterations,
        settings.power,
        settings.warmup_iterations,
        settings.warmup_start,
        settings.schedule,
        tuple(settings.steps),
        settings.step_factor,
        settings.warmup,
    )
