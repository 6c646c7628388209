"""ASPP and pyramid pooling of any library, for :func:`atrous_kernels.swap`: found by structure, then proven by a trial.

A ``forward`` can do anything, so structure proves nothing. The trial gives copies of a module random weights, runs its own
``forward`` and ours in float64, and compares outputs, gradients and running statistics. It also finds out what no attribute
tells: whether bilinear upsampling aligns corners, and on which side of the concatenation the input stands.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atrous_kernels.functional import ConvBN, aspp, pyramid_pool, upsample_concat
from atrous_kernels.nn import ASPP, PyramidPooling, conv_bn
from atrous_kernels.ops.conv2d import is_channels_last
from atrous_kernels.swap_chains import Mixed, has_own_forward, hooked, mixed, name_of, run_in_turn, shift_of, why_apart


class Found(NamedTuple):
    """A module that looks like one of these: the class it can get, or why it is ``left``."""

    what: str
    left: str | None
    into: type[nn.Module] | None = None

    @property
    def ours(self) -> bool:
        """Whether its parts run on our kernels without being called one by one."""
        return self.into is not None or self.left == _OURS


_OURS = "already ours"


def find(module: nn.Module) -> Found | None:
    """What ``module`` is, or None where it resembles none of these. Changes nothing."""
    name = name_of(type(module))
    if isinstance(module, (ASPP, PyramidPooling, _Fused)):
        return Found(name, _OURS)
    for mixin in (_SwappedAspp, _SwappedPyramid):
        if not mixin._atrous_resembles(module):
            continue
        name = f"{name} as {mixin._atrous_ops}"
        into = _why_untouchable(module) or mixin._atrous_why_not(module, _own_forwards(module), None) or _prove(module, mixin)
        return Found(name, into) if isinstance(into, str) else Found(name, None, into)
    return None


class _Fused(Mixed):
    """Mixed into the class of a module: one call of our ops where the parts allow it, decided at every call.

    The options of its recipe: the classes with a ``forward`` of their own that the trial has run, then what the trial found out.
    """

    _atrous_ops: str
    _atrous_options: tuple[tuple[bool, ...], ...] = ((),)  # what the trial can find out

    @staticmethod
    def _atrous_resembles(module: nn.Module) -> bool:
        """Whether the report says something about ``module``."""
        raise NotImplementedError

    @staticmethod
    def _atrous_why_not(module: Any, trusted: frozenset[type], x: Tensor | None) -> str | None:
        """None, or why our ops do not stand for the parts of ``module``: for this ``x [N, C, H, W]``, or for any (None)."""
        raise NotImplementedError

    @staticmethod
    def _atrous_run(module: nn.Module, x: Tensor, *options: bool) -> Tensor:
        """What the ``forward`` that the trial has seen gives for ``x [N, C, H, W]``, by our ops."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _, _, trusted, *options = self._atrous_recipe
        # Elsewhere than on the CPU nobody has measured that the ops are faster than the module's own.
        usual = not kwargs and len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() == 4 and args[0].is_cpu
        if not usual or self._atrous_why_not(self, trusted, args[0]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._atrous_run(cast(nn.Module, self), args[0], *options)


# Parts ----------------------------------------------------------------------------------------------------------------


def _touched(module: nn.Module) -> str | None:
    if hooked(module):
        return "it has hooks inside"
    return "a forward inside was replaced" if "forward" in module.__dict__ else None


def _why_untouchable(module: nn.Module) -> str | None:
    """None, or why no trial of the module is made."""
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks of all modules are registered, and a trial would call them"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for part in itertools.islice(module.modules(), 1, None):
        reason = _touched(part)
        if reason:
            return reason
        if parametrize.is_parametrized(part):
            return "parametrized inside"
        if isinstance(part, nn.SyncBatchNorm):
            return "SyncBatchNorm inside: its statistics are those of all processes"
        if _is_leaf(part) and not type(part).__module__.startswith(("torch.nn.modules.", "atrous_kernels.")):
            return f"{name_of(type(part))} inside, which may do anything"
    return None


def _own_forwards(module: nn.Module) -> frozenset[type]:
    """The classes of its containers whose ``forward`` only a trial can tell."""
    parts = itertools.islice(module.modules(), 1, None)
    return frozenset(type(part) for part in parts if not (_is_leaf(part) or _is_plain(part)))


def _why_no_container(part: nn.Module, trusted: frozenset[type]) -> str | None:
    known = _is_plain(part) or type(part) in trusted
    return _touched(part) or (None if known else f"{name_of(type(part))} was put in since")


def _is_leaf(part: nn.Module) -> bool:
    return next(part.children(), None) is None


def _is_plain(part: nn.Module) -> bool:
    return isinstance(part, nn.Sequential) and not has_own_forward(part)


def _is_pooling(part: nn.Module) -> bool:
    return isinstance(part, nn.Sequential) and len(part) > 0 and type(part[0]) is nn.AdaptiveAvgPool2d


# ASPP -----------------------------------------------------------------------------------------------------------------


class _SwappedAspp(_Fused):
    _atrous_ops = "aspp"

    @staticmethod
    def _atrous_resembles(module: nn.Module) -> bool:
        children = list(module.children())
        if sorted(isinstance(child, nn.ModuleList) for child in children) != [False, True]:
            return False
        branches, project = _aspp_parts(module)
        if not isinstance(project, nn.Sequential) or len(branches) < 2 or len(project) == 0:
            return False
        if not all(isinstance(branch, nn.Sequential) for branch in branches) or not isinstance(project[0], nn.Conv2d):
            return False
        dilated = any(isinstance(part, nn.Conv2d) and max(part.dilation) > 1 for b in branches for part in b.modules())
        return project[0].kernel_size == (1, 1) and (dilated or any(_is_pooling(branch) for branch in branches))

    @staticmethod
    def _atrous_why_not(module: Any, trusted: frozenset[type], x: Tensor | None) -> str | None:
        branches, project = _aspp_parts(module)
        for at, branch in enumerate(branches):
            pooling = _is_pooling(branch)
            reason = _why_no_container(branch, trusted)
            if pooling and at < len(branches) - 1:
                reason = "image pooling is not the last branch"
            elif pooling and branch[0].output_size not in (1, (1, 1)):
                reason = f"a pooled branch of {branch[0].output_size} bins"
            reason = reason or (_touched(branch[0]) if pooling else None) or _why_no_layer(list(branch)[pooling:], x is None)
            reason = reason or (f"{len(branch)} layers" if len(branch) != 3 + pooling else None)
            if reason:
                return f"branch {at}: {reason}"
        reason = _why_no_container(project, trusted) or _why_no_layer(list(project), x is None)
        if reason:
            return f"projection: {reason}"
        width = sum(branch[int(_is_pooling(branch))].out_channels for branch in branches)
        if project[0].kernel_size != (1, 1) or project[0].in_channels != width:
            return f"projection: expected a 1x1 convolution of the {width} channels of all branches"
        alone = x is not None and x.shape[0] == 1 and _is_pooling(branches[-1]) and branches[-1][2].training
        return "one image, no statistics: the framework's own error" if alone else None

    @staticmethod
    def _atrous_run(module: nn.Module, x: Tensor, *options: bool) -> Tensor:
        branches, project = _aspp_parts(module)
        pooling = branches.pop() if _is_pooling(branches[-1]) else None
        out = aspp(x, [_layer(b) for b in branches], _layer(project), None if pooling is None else _layer(pooling, 1))
        return run_in_turn(list(project)[3:], out)


def _aspp_parts(module: nn.Module) -> tuple[list[Any], Any]:
    """The branches and the projection: of its two children the list and the other."""
    first, second = module.children()
    return (list(first), second) if isinstance(first, nn.ModuleList) else (list(cast(nn.ModuleList, second)), first)


def _why_no_layer(layers: list[Any], planning: bool) -> str | None:
    """None, or why the first three are no centred Conv-BN-ReLU that keeps the size."""
    if len(layers) < 3:
        return f"expected Conv2d, BatchNorm2d and ReLU, got {len(layers)} layers"
    conv, norm, activation = layers[:3]
    reason = why_apart(conv, norm) or _touched(activation)
    if reason:
        return reason
    if type(activation) is not nn.ReLU:
        return f"expected ReLU, got {name_of(type(activation))}"
    centred = all(k % 2 for k in conv.kernel_size) and conv.padding in (
        "same",
        tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)),
    )
    if conv.stride != (1, 1) or conv.groups != 1 or not centred:
        return "expected stride 1, no groups and a padding that keeps the size"
    if conv.backend != "auto":
        return f"its convolution asks for backend {conv.backend!r}"
    if conv.bias is not None and norm.training and not planning:
        return "a bias, whose gradient is the framework's business"
    return None


def _layer(layers: Any, first: int = 0) -> ConvBN:
    return conv_bn(layers, first)._replace(bn_bias=shift_of(layers[first], layers[first + 1]))


# Pyramid pooling ------------------------------------------------------------------------------------------------------


class _SwappedPyramid(_Fused):
    _atrous_ops = "pyramid_pool, upsample_concat"
    _atrous_options = tuple(itertools.product((False, True), (True, False)))  # align_corners; whether the input comes first

    @staticmethod
    def _atrous_resembles(module: nn.Module) -> bool:
        children = list(module.children())
        if len(children) != 1 or not isinstance(children[0], nn.ModuleList) or len(children[0]) == 0:
            return False
        convolves = any(isinstance(part, nn.Conv2d) for part in module.modules())
        return convolves and all(_is_pooling(_level(block)) for block in children[0])

    @staticmethod
    def _atrous_why_not(module: Any, trusted: frozenset[type], x: Tensor | None) -> str | None:
        (blocks,) = module.children()
        for at, block in enumerate(blocks):
            level = _level(block)
            if not _is_pooling(level):
                return f"level {at}: it does not begin with AdaptiveAvgPool2d"
            bins = level[0].output_size
            grid = isinstance(bins, int) or (isinstance(bins, (tuple, list)) and all(isinstance(size, int) for size in bins))
            reason = _why_no_container(block, trusted) or _touched(level) or _touched(level[0])
            reason = reason or ("its Sequential has a forward of its own" if has_own_forward(level) else None)
            reason = reason or (None if grid else f"AdaptiveAvgPool2d to {bins}")
            if reason:
                return f"level {at}: {reason}"
        return None

    @staticmethod
    def _atrous_run(module: nn.Module, x: Tensor, *options: bool) -> Tensor:
        align_corners, input_first = options
        (blocks,) = module.children()
        levels = [list(_level(block)) for block in cast(nn.ModuleList, blocks)]
        pooled = pyramid_pool(x, [level[0].output_size for level in levels])
        maps = [run_in_turn(level[1:], p) for level, p in zip(levels, pooled, strict=True)]
        dtype = functools.reduce(torch.promote_types, (level.dtype for level in maps), x.dtype)  # as torch.cat does
        x, maps = x.to(dtype), [level.to(dtype) for level in maps]
        if input_first:
            return upsample_concat(x, maps, align_corners=align_corners)
        # upsample_concat begins with a map of full size. Here the first level is that map, and the whole is copied once more.
        first = F.interpolate(maps[0], x.shape[2:], mode="bilinear", align_corners=align_corners)
        first = first.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
        return torch.cat([upsample_concat(first, maps[1:], align_corners=align_corners), x], 1)


def _level(block: nn.Module) -> Any:
    """The Sequential of a level, itself or the only child of a module that also upsamples."""
    children = list(block.children())
    return block if isinstance(block, nn.Sequential) or len(children) != 1 else children[0]


# Trial ----------------------------------------------------------------------------------------------------------------

# Weights and inputs are such that every tensor is of order 1. Two orders of the same float64 sums differ by some 1e-13; another
# computation (a corner elsewhere, a branch left out, a gradient cut off) by 1e-3 and more.
_TOLERANCE = 1e-6


def _prove(module: nn.Module, mixin: type[_Fused]) -> type[nn.Module] | str:
    """The class with which ``module`` computes what it computes now, or why there is none."""
    trusted = _own_forwards(module)
    candidates = [mixed(mixin, type(module), trusted, *each) for each in mixin._atrous_options]
    try:
        # Whatever the caller has set for models of their own does not hold here, and random numbers go on as if nothing was.
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            trial = _Trial(module)
            truth = trial.run(type(module), False)
            equal = [into for into in candidates if _equal(trial.run(into, False), truth)]
            if not equal:
                return "its forward computes something else: a trial with random weights gave other results"
            if not _equal(trial.run(equal[0], True), trial.run(type(module), True)):
                return "its forward computes something else in training: a trial with random weights gave other results"
    except Exception as error:
        return f"a trial of its forward failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return equal[0]


class _Trial:
    """Copies of a module with random weights on the CPU, in float64; what they share with it is neither read nor written."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.random = torch.Generator("cpu").manual_seed(0)
        self.weights = {id(p): nn.Parameter(self._weight(p)) for p in module.parameters()}
        self.statistics = {id(b): self._weight(b) for b in module.buffers()}
        convolution = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
        grids = [part.output_size for part in module.modules() if isinstance(part, nn.AdaptiveAvgPool2d)]
        least = max(size for grid in (1, *grids) for size in ((grid,) if isinstance(grid, int) else cast(tuple[int, ...], grid)))
        # Larger than the finest grid, not square, and of two sizes, against those that fit one size only. Three images in
        # training: of two, BatchNorm of a pooled pixel knows only the signs.
        self.inputs = {
            False: self._normal((2, convolution.in_channels, least + 3, least + 2)),
            True: self._normal((3, convolution.in_channels, least + 2, least + 4)),
        }

    def _normal(self, size: Any) -> Tensor:
        return torch.randn(size, generator=self.random, dtype=torch.float64, device="cpu")

    def _weight(self, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
        if like.dim() > 1:
            return self._normal(like.shape) / like[0].numel() ** 0.5
        # Of BatchNorm: a scale, a shift, a mean and a variance, which has to be positive.
        return torch.rand(like.shape, generator=self.random, dtype=torch.float64, device="cpu") + 0.5

    def run(self, kind: type[nn.Module], training: bool) -> list[Tensor | None]:
        """Output, gradients in input and parameters, buffers; of the module as one of class ``kind``.

        Raises:
            TypeError: the output is no single tensor; RuntimeError: the forward pass changes attributes.
        """
        memo: dict[int, Any] = {**self.weights, **{key: value.clone() for key, value in self.statistics.items()}}
        for part in self.module.modules():  # a bound method among them would bring its object along
            memo.update({id(v): type(v)() for name, v in vars(part).items() if name.endswith("_hooks")})
        twin = copy.deepcopy(self.module, memo).train(training)
        twin.__class__ = kind
        for part in twin.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
        x = self.inputs[training].clone().requires_grad_()
        before = dict(vars(twin))
        out = twin.forward(x)
        if vars(twin).keys() != before.keys() or any(vars(twin)[key] is not value for key, value in before.items()):
            raise RuntimeError("it changes attributes of the module")
        if not isinstance(out, Tensor):
            raise TypeError(f"it gives no tensor, but {type(out).__name__}")
        g = torch.randn(out.shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64, device="cpu")
        gradients = torch.autograd.grad(out, [x, *twin.parameters()], g, allow_unused=True)
        return [out.detach(), *gradients, *twin.buffers()]


def _equal(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None)
        or (
            a is not None
            and b is not None
            and a.shape == b.shape
            and a.dtype == b.dtype
            and bool(((a - b).abs() <= _TOLERANCE * max(1.0, float(b.abs().amax()) if b.numel() else 1.0)).all())
        )
        for a, b in zip(ours, theirs, strict=True)
    )
