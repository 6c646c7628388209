"""What a model costs and how far it looks, without running it: parameters, operations, receptive field."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from atrous_kernels.problem import ConvProblem
from segmodels.registry import create_model


class Summary(NamedTuple):
    """Of one model and one input size.

    Attributes:
        parameters: numbers that are trained, without an auxiliary head.
        receptive_field: side, in pixels of the image, of the square that one logit sees through the convolutions.
        global_context: whether pooling over the whole map sees the rest.
        output_stride: pixels of the image per pixel of the deepest dense map.
        dense_flops: of all convolutions for one image, two per multiplication, padding zeros included.
        valid_flops: without the taps that fall on padding zeros.
        source: the paper.
    """

    name: str
    parameters: int
    receptive_field: int
    global_context: bool
    output_stride: int
    dense_flops: int
    valid_flops: int
    source: str


def summarise(name: str, size: tuple[int, int] = (513, 513), **options: Any) -> Summary:
    """Builds ``create_model(name, **options)`` without memory for its weights and counts for one image of ``size``.

    The counts are those of the network as its paper draws it: concatenations and pooled halves that our kernels avoid by
    algebra are counted as convolutions over what they read.

    Raises:
        As :func:`segmodels.create_model`.
    """
    with FakeTensorMode(), torch.no_grad():
        model = create_model(name, **options).eval()
        image = torch.empty(1, 3, *size)
        with _sizes(model) as seen, _ReceptiveField(image) as field:
            out = model.logits(image)["out"]
        side, _, _ = field.of(out)
        counted = list(_costs(model, seen))
        parameters = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("aux_classifier."))
        stride = getattr(model, "output_stride", None) or round(size[0] / out.shape[-2])
    return Summary(
        name=name,
        parameters=parameters,
        receptive_field=math.ceil(side),
        global_context=field.pooled,
        output_stride=stride,
        dense_flops=sum(dense for dense, _ in counted),
        valid_flops=sum(valid for _, valid in counted),
        source=(sys.modules[type(model).__module__].__doc__ or "").split("\n\n")[0].replace("\n", " "),
    )


@contextmanager
def _sizes(model: nn.Module) -> Iterator[dict[nn.Module, list[torch.Size]]]:
    """Height and width of what every called module reads, call by call, while the block runs."""
    seen: dict[nn.Module, list[torch.Size]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 4:
            seen.setdefault(module, []).append(inputs[0].shape[2:])

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _costs(model: nn.Module, seen: dict[nn.Module, list[torch.Size]]) -> Iterator[tuple[int, int]]:
    """Dense and valid operations of every convolution that the call reached."""

    def visit(module: nn.Module, around: list[torch.Size]) -> Iterator[tuple[int, int]]:
        sizes = seen.get(module, around)
        for size in sizes:
            if isinstance(module, nn.ConvTranspose2d):
                taps = module.weight[0].numel() * module.in_channels * size[0] * size[1]
                yield 2 * taps, 2 * taps
            elif isinstance(module, nn.Conv2d):
                problem = ConvProblem(
                    1, module.in_channels, module.out_channels, (size[0], size[1]), _pair(module.kernel_size),
                    _pair(module.stride), _pair(module.padding), _pair(module.dilation), module.groups,
                )  # fmt: skip
                yield problem.dense_flops, problem.valid_flops
        # A module that computes its parts itself (ASPP, pyramid pooling) calls no hook of theirs: they read what it reads, and
        # behind a pooling, its bins.
        for child in module.children():
            if isinstance(child, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
                side = child.output_size
                assert isinstance(side, int)
                sizes = [torch.Size([side, side])] * len(sizes)
            yield from visit(child, sizes)

    reached = [child for name, child in model.named_children() if name != "aux_classifier"]
    for child in reached:
        yield from visit(child, [])


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class _ReceptiveField(TorchDispatchMode):
    """Follows every tensor through the operators: side of what it sees, and distance of its pixels, in pixels of the image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        # The tensors are kept, so that no two have the same id.
        self._known: dict[int, tuple[Tensor, float, float]] = {id(image): (image, 1.0, 1.0)}
        self.pooled = False

    def of(self, tensor: Tensor) -> tuple[float, float, bool]:
        _, side, step = self._known[id(tensor)]
        return side, step, self.pooled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [self._known[id(t)][1:] for t in _tensors([*args, *(kwargs or {}).values()]) if id(t) in self._known]
        if inputs:
            side, step = max(side for side, _ in inputs), max(step for _, step in inputs)
            named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            side, step = self._through(func._schema.name.partition("::")[2], {**named, **(kwargs or {})}, result, side, step)
            for tensor in _tensors([result]):
                self._known[id(tensor)] = (tensor, side, step)
        return result

    def _through(self, op: str, arguments: dict[str, Any], result: Any, side: float, step: float) -> tuple[float, float]:
        if op in ("conv2d", "conv_bn_act", "convolution"):
            kernel, stride = max(arguments["weight"].shape[2:]), arguments["stride"][0]
            if arguments.get("transposed"):
                return side + (math.ceil(kernel / stride) - 1) * step, step / stride
            return side + (kernel - 1) * arguments["dilation"][0] * step, step * stride
        if op == "conv2d_input":  # as a transposed convolution
            kernel, stride = max(arguments["weight"].shape[2:]), arguments["stride"][0]
            return side + (math.ceil(kernel / stride) - 1) * step, step / stride
        if op in ("max_pool2d_with_indices", "avg_pool2d"):
            kernel = arguments["kernel_size"][0]
            stride = (arguments.get("stride") or arguments["kernel_size"])[0]
            return side + (kernel - 1) * step, step * stride
        if op == "upsample_bilinear2d":
            source = (arguments["self"] if "self" in arguments else arguments["input"]).shape[2]
            return side + (step if source > 1 else 0), step * source / result.shape[2]
        if op == "pyramid_pool" or (op == "mean" and set(arguments["dim"]) & {2, 3, -1, -2}) or op.startswith("adaptive"):
            self.pooled = True
            return 0.0, step
        return side, step


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
