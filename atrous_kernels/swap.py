"""``swap(model)`` puts our kernels under an existing model, in place; ``unswap(model)`` takes them out again.

A swapped module stays the same object and keeps its parameters, buffers, hooks and name: only its class changes, as the
framework's own parametrizations do it. So optimizers, state_dicts, shared modules and references held elsewhere go on as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atrous_kernels.nn import Conv2d, as_one

# The class a swapped module had before; its presence says that swap() was here, not the model's author.
_ORIGINAL = "_atrous_original"
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


@dataclass(frozen=True)
class Line:
    """One module that was looked at. ``left`` is None where it now runs on our kernels, else the reason why it does not."""

    path: str
    what: str
    left: str | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`swap` did with every module that it could have meant. ``str()`` gives a table."""

    lines: tuple[Line, ...]

    @property
    def swapped(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.left is None)

    @property
    def left(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.left is not None)

    def __str__(self) -> str:
        width = max((len(line.path) for line in self.lines), default=0)
        text = [f"swapped {len(self.swapped)}, left {len(self.left)}"]
        text += [
            f"  {'->' if line.left is None else '  '} {line.path:<{width}}  {line.what}{f': {line.left}' if line.left else ''}"
            for line in self.lines
        ]
        return "\n".join(text)


def swap(model: nn.Module) -> Report:
    """Runs the layers of ``model`` on our kernels from now on, in place.

    Swapped are modules whose type is exactly :class:`torch.nn.Conv2d`, and every :class:`torch.nn.Sequential` (or subclass
    with its ``forward``) in which a BatchNorm2d follows one: from there on these two, and a ReLU or ReLU6 after them, run as
    :func:`atrous_kernels.conv_bn_relu`. Parameters, buffers, state_dict, hooks (weight and spectral norm by hooks, pruning),
    training mode, device and dtype stay as they are. Subclasses, parametrized and quantised modules and those whose
    ``forward`` was replaced are left, each with its reason. Swapping twice changes nothing more.

    Outputs and gradients agree with those of before to the rounding of sums taken in another order: in fp32 about 1e-6 of a
    layer's output, 1e-5 where Winograd's algorithm runs (``with ak.precision("ieee")`` it does not).

    Returns:
        The :class:`Report`: every convolution and every chain with its path, swapped or why not. A module that occurs twice
        is listed by its first path.

    Raises:
        TypeError: ``model`` is no :class:`torch.nn.Module`, or was made by ``torch.jit`` (its code is fixed: swap before).
    """
    _check(model)
    lines = []
    for path, module in model.named_modules():
        if not _is_convolution(module):
            continue
        reason = _why_left(module)
        if reason is None:
            _turn(module, Conv2d, backend="auto")
        lines.append(Line(path or "(the model itself)", _name(type(module)), reason))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Sequential):
            lines += _swap_chains(path, module)
    return Report(tuple(lines))


def unswap(model: nn.Module) -> None:
    """Undoes :func:`swap`: every module has its original class and attributes again. Modules created as ours stay ours.

    Raises:
        TypeError: as :func:`swap`; RuntimeError: a swapped module was parametrized since. Nothing is undone then.
    """
    _check(model)
    swapped = [(path, module) for path, module in model.named_modules() if _ORIGINAL in module.__dict__]
    for path, module in swapped:
        if parametrize.is_parametrized(module):
            raise RuntimeError(f"{path}: parametrized after swap(): remove its parametrizations first")
    for _, module in swapped:
        module.__class__ = module.__dict__.pop(_ORIGINAL)
        if isinstance(module, nn.Conv2d):
            del module.__dict__["backend"]


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("expected a model in Python, but got a torch.jit.ScriptModule: swap before scripting")


def _turn(module: nn.Module, into: type[nn.Module], **attributes: object) -> None:
    module.__dict__[_ORIGINAL] = type(module)
    module.__dict__.update(attributes)
    module.__class__ = into


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) or (_is_quantised(type(module)) and "Conv" in type(module).__name__)


def _is_quantised(kind: type) -> bool:
    return kind.__module__.startswith("torch.ao.nn.") and not {"quantized", "qat"}.isdisjoint(kind.__module__.split("."))


def _why_left(module: nn.Module) -> str | None:
    kind = type(module)
    if issubclass(kind, Conv2d):
        return "already ours"
    if parametrize.is_parametrized(module):
        return f"parametrized ({', '.join(module.parametrizations)}): remove the parametrizations first"  # type: ignore[arg-type]
    if _is_quantised(kind):
        return "quantised"
    if kind is nn.LazyConv2d:
        return "its sizes are not known yet: run the model once first"
    if kind is not nn.Conv2d:
        return "a subclass of torch.nn.Conv2d, which may compute something else"
    replaced = {"forward", "_conv_forward"} & module.__dict__.keys()
    return f"its {min(replaced)} was replaced" if replaced else None


def _name(kind: type) -> str:
    known = kind.__module__.startswith(("torch.nn.", "atrous_kernels."))
    return kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}"


# Chains ---------------------------------------------------------------------------------------------------------------


class _Chained(nn.Sequential):
    """Mixed into the class of a Sequential: convolution, BatchNorm and activation that follow one another run as one op.

    What is a chain is decided at every call, so children may be added, removed, hooked or set to another mode as ever.
    """

    kind: type[nn.Sequential]

    def forward(self, input: Tensor) -> Tensor:
        children = list(self)
        at = 0
        while at < len(children):
            length, activation = _chain(children[at : at + 3])
            input = _run_chain(children[at], children[at + 1], activation, input) if length else children[at](input)
            at += max(length, 1)
        return input

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles name the original class: this one is made at run time.
        made: Any = super().__reduce_ex__(protocol)
        return _blank, (self.kind,), *made[2:]


_made: dict[type[nn.Sequential], type[nn.Sequential]] = {}


def _chained(kind: type[nn.Sequential]) -> type[nn.Sequential]:
    if kind not in _made:
        own = {"__module__": kind.__module__, "__doc__": kind.__doc__, "kind": kind}
        _made[kind] = type(kind.__name__, (_Chained, kind), own)
    return _made[kind]


def _blank(kind: type[nn.Sequential]) -> nn.Sequential:
    into = _chained(kind)
    return into.__new__(into)


def _swap_chains(path: str, module: nn.Sequential) -> list[Line]:
    own_forward = type(module).forward is not nn.Sequential.forward or "forward" in module.__dict__
    children = list(module)
    lines = []
    for at in range(len(children) - 1):
        if not (isinstance(children[at], nn.Conv2d) and isinstance(children[at + 1], nn.modules.batchnorm._BatchNorm)):
            continue
        length, _ = _chain(children[at : at + 3], planning=True)
        reason = _why_apart(children[at], children[at + 1])
        if isinstance(module, _Chained):
            reason = "already ours"
        elif own_forward:
            reason = "the Sequential has a forward of its own"
        names = [type(child).__name__ for child in children[at : at + max(length, 2)]]
        lines.append(Line(f"{path}[{at}:{at + len(names)}]", " + ".join(names), reason))
    if any(line.left is None for line in lines):
        _turn(module, _chained(type(module)))
    return lines


def _chain(children: list[nn.Module], planning: bool = False) -> tuple[int, str]:
    """How many of up to three modules run as one, 0 for none, and their activation."""
    if len(children) < 2 or _why_apart(children[0], children[1]):
        return 0, ""
    if children[0].bias is not None and children[1].training and not planning:
        return 0, ""  # its gradient, however small, is the framework's business
    activation = _ACTIVATIONS.get(type(children[2])) if len(children) > 2 and not _hooked(children[2]) else None
    return (3, activation) if activation else (2, "none")


def _why_apart(conv: nn.Module, norm: nn.Module) -> str | None:
    """None, or the reason why the two do not run as one. Asked at every call."""
    if type(conv) is not Conv2d or type(norm) is not nn.BatchNorm2d:
        return f"expected Conv2d and BatchNorm2d, got {_name(type(conv))} and {_name(type(norm))}"
    if _hooked(conv) or _hooked(norm):
        return "it has hooks inside"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if not norm.track_running_stats:
        return "BatchNorm2d keeps no running statistics"
    replaced = "forward" in norm.__dict__ or "forward" in conv.__dict__
    return "a forward inside was replaced" if replaced else None


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(each) > 0 for each in hooks)


def _run_chain(conv: Any, norm: Any, activation: str, input: Tensor) -> Tensor:
    shift = norm.bias
    if conv.bias is not None:  # in evaluation only: the convolution's bias, scaled as its output is
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = conv.bias * scale if shift is None else torch.addcmul(shift, conv.bias, scale)
    return as_one(input, conv, norm, shift, activation)
