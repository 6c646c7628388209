"""How :func:`atrous_kernels.swap` gives a module another class and back, and the first use of it: Conv-BN-ReLU chains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atrous_kernels.nn import Conv2d, as_one

#: The class a swapped module had before; its presence says that swap() was here, not the model's author.
ORIGINAL = "_atrous_original"
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


@dataclass(frozen=True)
class Line:
    """One module that was looked at. ``left`` is None where it now runs on our kernels, else the reason why it does not."""

    path: str
    what: str
    left: str | None = None


# Another class --------------------------------------------------------------------------------------------------------


class Mixed:
    """Base of what is mixed into a module's class to give it another ``forward``.

    Its one attribute has a name that no model uses: an attribute of the class would hide a child of the same name.
    """

    _atrous_recipe: tuple[Any, ...]  # the arguments of mixed() that made the class

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles name the original class: the made one exists at run time only.
        made: Any = super().__reduce_ex__(protocol)
        return _blank, self._atrous_recipe, *made[2:]


_made: dict[tuple[Any, ...], type[nn.Module]] = {}


def mixed(mixin: type[Mixed], kind: type[nn.Module], *options: Any) -> type[nn.Module]:
    """``kind`` with ``mixin`` in front, under the name of ``kind``; one class for the same arguments."""
    recipe = (mixin, kind, *options)
    if recipe not in _made:
        own = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_atrous_recipe": recipe}
        _made[recipe] = type(kind.__name__, (mixin, kind), own)
    return _made[recipe]


def _blank(*recipe: Any) -> nn.Module:
    into = mixed(*recipe)
    return into.__new__(into)


def turn(module: nn.Module, into: type[nn.Module], **attributes: object) -> None:
    """Makes ``module`` an instance of ``into``, and notes what it was."""
    module.__dict__[ORIGINAL] = type(module)
    module.__dict__.update(attributes)
    module.__class__ = into


def name_of(kind: type) -> str:
    """As a report writes it: with its module where it is neither the framework's nor ours."""
    known = kind.__module__.startswith(("torch.nn.", "atrous_kernels."))
    return kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}"


# Chains ---------------------------------------------------------------------------------------------------------------


class Chained(Mixed, nn.Sequential):
    """Mixed into the class of a Sequential: convolution, BatchNorm and activation that follow one another run as one op.

    What is a chain is decided at every call, so children may be added, removed, hooked or set to another mode as ever.
    """

    def forward(self, input: Tensor) -> Tensor:
        return run_in_turn(self, input)


def run_in_turn(modules: Iterable[nn.Module], input: Tensor) -> Tensor:
    """What a Sequential of these modules gives, its chains as one op each."""
    children = list(modules)
    at = 0
    while at < len(children):
        length, activation = _chain(children[at : at + 3])
        input = _run_chain(children[at], children[at + 1], activation, input) if length else children[at](input)
        at += max(length, 1)
    return input


def has_own_forward(module: nn.Sequential) -> bool:
    """Whether it does anything but to run its children in turn."""
    plain = type(module).forward in (nn.Sequential.forward, Chained.forward)
    return not plain or "forward" in module.__dict__


def swap_chains(path: str, module: nn.Sequential) -> list[Line]:
    """Every convolution with a BatchNorm after it; where one can run as a chain, ``module`` gets the class for it."""
    children = list(module)
    lines = []
    for at in range(len(children) - 1):
        if not (isinstance(children[at], nn.Conv2d) and isinstance(children[at + 1], nn.modules.batchnorm._BatchNorm)):
            continue
        length, _ = _chain(children[at : at + 3], planning=True)
        reason = why_apart(children[at], children[at + 1])
        if isinstance(module, Chained):
            reason = "already ours"
        elif has_own_forward(module):
            reason = "the Sequential has a forward of its own"
        names = [type(child).__name__ for child in children[at : at + max(length, 2)]]
        lines.append(Line(f"{path}[{at}:{at + len(names)}]", " + ".join(names), reason))
    if any(line.left is None for line in lines):
        turn(module, mixed(Chained, type(module)))
    return lines


def _chain(children: list[nn.Module], planning: bool = False) -> tuple[int, str]:
    """How many of up to three modules run as one, 0 for none, and their activation."""
    if len(children) < 2 or why_apart(children[0], children[1]):
        return 0, ""
    if children[0].bias is not None and children[1].training and not planning:
        return 0, ""  # its gradient, however small, is the framework's business
    activation = _ACTIVATIONS.get(type(children[2])) if len(children) > 2 and not hooked(children[2]) else None
    return (3, activation) if activation else (2, "none")


def why_apart(conv: nn.Module, norm: nn.Module) -> str | None:
    """None, or the reason why the two do not run as one. Asked at every call."""
    if type(conv) is not Conv2d or type(norm) is not nn.BatchNorm2d:
        return f"expected Conv2d and BatchNorm2d, got {name_of(type(conv))} and {name_of(type(norm))}"
    if hooked(conv) or hooked(norm):
        return "it has hooks inside"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if not norm.track_running_stats:
        return "BatchNorm2d keeps no running statistics"
    replaced = "forward" in norm.__dict__ or "forward" in conv.__dict__
    return "a forward inside was replaced" if replaced else None


def hooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` does anything beside its ``forward``."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(each) > 0 for each in hooks)


def _run_chain(conv: Any, norm: Any, activation: str, input: Tensor) -> Tensor:
    return as_one(input, conv, norm, shift_of(conv, norm), activation)


def shift_of(conv: Any, norm: Any) -> Tensor | None:
    """The bias of ``norm`` with that of ``conv`` in it. With a bias in ``conv``: in evaluation only."""
    if conv.bias is None:
        return norm.bias
    scale = torch.rsqrt(norm.running_var + norm.eps)  # the convolution's bias is scaled as its output is
    scale = scale if norm.weight is None else scale * norm.weight
    return conv.bias * scale if norm.bias is None else torch.addcmul(norm.bias, conv.bias, scale)
