"""``swap(model)`` puts our kernels under an existing model, in place; ``unswap(model)`` takes them out again.

A swapped module stays the same object and keeps its parameters, buffers, hooks and name: only its class changes, as the
framework's own parametrizations do it. So optimizers, state_dicts, shared modules and references held elsewhere go on as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from atrous_kernels.nn import Conv2d
from atrous_kernels.swap_chains import ORIGINAL, Line, has_own_forward, name_of, swap_chains, turn
from atrous_kernels.swap_modules import find

__all__ = ["Line", "Report", "swap", "unswap"]

_ITSELF = "(the model itself)"


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

    Swapped are:

    - modules whose type is exactly :class:`torch.nn.Conv2d`;
    - every :class:`torch.nn.Sequential` (or subclass with its ``forward``) in which a BatchNorm2d follows one: from there on
      these two, and a ReLU or ReLU6 after them, run as :func:`atrous_kernels.conv_bn_relu`;
    - ASPP modules written as torchvision's (parallel Conv-BN-ReLU branches ``[N, C, H, W] -> [N, O, H, W]``, image pooling
      last or absent, and the 1x1 projection of their concatenation): on the CPU they run as :func:`atrous_kernels.aspp`;
    - pyramid pooling written as the authors' of PSPNet (per level AdaptiveAvgPool2d, layers, bilinear upsampling;
      concatenated with the input, which comes first or last): on the CPU as :func:`atrous_kernels.pyramid_pool` and
      :func:`atrous_kernels.upsample_concat`.

    The last two are found by their structure, whatever their classes are called, and swapped after a trial: copies of the
    module with random weights have to give the outputs, gradients and running statistics of its own ``forward``, in evaluation
    and in training. The trial runs on the CPU (a second or two for 2048 channels), calls no hook and leaves the model and the
    state of random numbers as they are. Where a call cannot run as one (another device, hooks set on a part since, a bias
    before BatchNorm in training), the module's own ``forward`` runs, over its swapped convolutions and chains. A setting that
    its ``forward`` reads from an attribute (``self.align_corners``) holds as it was at the trial.

    Parameters, buffers, state_dict, hooks (weight and spectral norm by hooks, pruning), training mode, device and dtype stay
    as they are. Subclasses of Conv2d, parametrized and quantised modules and those whose ``forward`` was replaced are left,
    each with its reason. Swapping twice changes nothing more.

    Outputs and gradients agree with those of before to the rounding of sums taken in another order: in fp32 about 1e-6 of a
    layer's output, 1e-5 where Winograd's algorithm runs (``with ak.precision("ieee")`` it does not).

    Returns:
        The :class:`Report`: every convolution, every ASPP and pyramid pooling and every chain with its path, swapped or why
        not. A module that occurs twice is listed by its first path. A chain that only an ASPP with a ``forward`` of its own
        runs has no line beside that of the ASPP.

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
            turn(module, Conv2d, backend="auto")
        lines.append(Line(path or _ITSELF, name_of(type(module)), reason))
    inside: set[nn.Module] = set()
    for path, module in list(model.named_modules()):
        found = find(module)
        if found is None:
            continue
        if found.into is not None:
            turn(module, found.into)
        if found.ours:
            inside.update(module.modules())
        lines.append(Line(path or _ITSELF, found.what, found.left))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Sequential) and not (module in inside and has_own_forward(module)):
            lines += swap_chains(path, module)
    return Report(tuple(lines))


def unswap(model: nn.Module) -> None:
    """Undoes :func:`swap`: every module has its original class and attributes again. Modules created as ours stay ours.

    Raises:
        TypeError: as :func:`swap`; RuntimeError: a swapped module was parametrized since. Nothing is undone then.
    """
    _check(model)
    swapped = [(path, module) for path, module in model.named_modules() if ORIGINAL in module.__dict__]
    for path, module in swapped:
        if parametrize.is_parametrized(module):
            raise RuntimeError(f"{path}: parametrized after swap(): remove its parametrizations first")
    for _, module in swapped:
        module.__class__ = module.__dict__.pop(ORIGINAL)
        if isinstance(module, nn.Conv2d):
            del module.__dict__["backend"]


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("expected a model in Python, but got a torch.jit.ScriptModule: swap before scripting")


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
