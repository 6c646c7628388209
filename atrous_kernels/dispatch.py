"""Per op, an ordered list of implementations; which one runs, and why the others do not.

``backend="auto"`` is quiet: it takes the first implementation that can run and is not known to lose. A backend asked for
by name runs or raises with the reason. :func:`explain` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

AUTO = "auto"


class Problem(Protocol):
    """One call as numbers. ``str()`` gives its sizes; ``cost()`` a line about its arithmetic or its memory traffic."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device_type(self) -> str: ...
    def cost(self) -> str: ...


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``can_run`` gives None or the reason why not; ``loses`` gives None or the reason why automatic choice passes it over
    although it could run.
    """

    name: str
    run: Callable[..., Any]
    can_run: Callable[[Any], str | None]
    loses: Callable[[Any], str | None]


@dataclass(frozen=True)
class Choice:
    """One line of an explanation."""

    name: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Every implementation of an op for one problem: chosen, or why not. ``str()`` gives a table."""

    op: str
    problem: Problem
    choices: tuple[Choice, ...]

    @property
    def chosen(self) -> str:
        return next(choice.name for choice in self.choices if choice.chosen)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.problem}"]
        lines += [f"  {self.problem.cost()}"]
        lines += [f"  {'->' if c.chosen else '  '} {c.name:<11} {c.reason}" for c in self.choices]
        return "\n".join(lines)


_implementations: dict[str, list[Implementation]] = {}
_chosen: dict[tuple[Any, ...], Implementation] = {}
#: Whole calls, kept by :mod:`atrous_kernels.repeats`; here because they hold choices.
repeats: dict[tuple[Any, ...], Callable[..., Any]] = {}
_default_backend = AUTO
_precision = "fast"


def register(op: str, implementations: list[Implementation]) -> None:
    """Sets the ordered list of implementations of ``op``."""
    _implementations[op] = implementations


def implementations(op: str) -> list[Implementation]:
    """The implementations of ``op`` in their order."""
    return _implementations[op]


def backends(op: str) -> list[str]:
    """Names accepted as ``backend=`` of ``op``."""
    return [AUTO, *(implementation.name for implementation in _implementations[op])]


def known_backends() -> list[str]:
    """Names accepted by :func:`backend`: those of any op."""
    return list(dict.fromkeys(name for op in _implementations for name in backends(op)))


def default_backend(op: str | None = None) -> str:
    """The backend used where a call says ``"auto"``; set by :func:`backend`. An op without that backend stays automatic."""
    return AUTO if op is not None and _default_backend not in backends(op) else _default_backend


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, calls that say ``backend="auto"`` (the default) use ``name`` instead.

    Process-wide, like ``torch.backends`` flags. Raises ValueError for an unknown name.
    """
    global _default_backend
    if name not in known_backends():
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(known_backends())}")
    previous = _default_backend
    _default_backend = name
    try:
        yield
    finally:
        _default_backend = previous


def precision_mode() -> str:
    """``"fast"`` or ``"ieee"``; set by :func:`precision`."""
    return _precision


@contextmanager
def precision(mode: str) -> Iterator[None]:
    """Within the block, which algorithms may be chosen: ``"fast"`` (the default) or ``"ieee"``.

    ``"ieee"`` leaves out those whose rounding errors exceed those of summing the products one by one: Winograd's
    (docs/kernels.md has both). Process-wide, like ``torch.backends`` flags. Raises ValueError for an unknown mode.
    """
    global _precision
    if mode not in ("fast", "ieee"):
        raise ValueError(f"unknown precision {mode!r}: expected 'fast' or 'ieee'")
    previous = _precision
    _precision = mode
    try:
        yield
    finally:
        _precision = previous


def choose(op: str, problem: Problem, backend: str, cache_key: tuple[Any, ...]) -> Implementation:
    """The implementation that runs ``problem``.

    Raises ValueError for an unknown backend and RuntimeError where a backend asked for by name cannot run.
    """
    key = (op, backend, _precision, cache_key)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _by_name(op, problem, backend) if backend != AUTO else _automatic(op, problem)
    return found


def cached(op: str, backend: str, cache_key: tuple[Any, ...]) -> Implementation | None:
    """The earlier choice for this key, so that the hot path need not build a problem."""
    return _chosen.get((op, backend, _precision, cache_key))


def forget() -> None:
    """Drops cached choices, for use after libraries or settings change."""
    _chosen.clear()
    repeats.clear()


def _by_name(op: str, problem: Problem, name: str) -> Implementation:
    for implementation in _implementations[op]:
        if implementation.name == name:
            reason = implementation.can_run(problem)
            if reason is not None:
                raise RuntimeError(f"{op}: backend {name!r} cannot run {problem}: {reason}")
            return implementation
    raise ValueError(f"{op}: unknown backend {name!r}: expected one of {', '.join(backends(op))}")


def _automatic(op: str, problem: Problem) -> Implementation:
    able = [implementation for implementation in _implementations[op] if implementation.can_run(problem) is None]
    for implementation in able:
        if implementation.loses(problem) is None:
            return implementation
    if able:  # nothing is known to be fast, but the call can be answered
        return able[0]
    raise RuntimeError(f"{op}: no implementation can run {problem}")


def explain(op: str, problem: Problem, backend: str = AUTO) -> Explanation:
    """Every implementation of ``op``: chosen, or why not. Runs nothing."""
    if op not in _implementations:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(_implementations)}")
    chosen = _by_name(op, problem, backend) if backend != AUTO else _automatic(op, problem)
    choices = []
    for implementation in _implementations[op]:
        reason = implementation.can_run(problem)
        if reason is not None:
            reason = f"cannot run: {reason}"
        elif implementation is chosen:
            reason = "chosen" if backend == AUTO else "chosen: asked for by name"
        else:
            reason = implementation.loses(problem) or f"could run; {chosen.name} comes first"
        choices.append(Choice(implementation.name, implementation is chosen, reason))
    return Explanation(op, problem, tuple(choices))
