"""aspp: every backend that this machine can run, against the framework's composition with a concatenation, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import atrous_kernels as ak
from atrous_kernels import native
from tests.repeats import assert_same_bits_for_threads

BACKENDS = ("auto", "cpu", "torch", "reference")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# Of the root mean square of the result. fp32: sums of a few hundred rounded terms, then batch norms over 2 images that divide
# by small deviations. bf16: convolutions and, branch by branch, their sum are rounded to 8 bits; values at a ReLU's edge keep
# or lose their whole gradient.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.4}


class Twin(nn.Module):
    """torchvision's ASPP: the same keys, with the concatenation."""

    def __init__(self, cin: int, cout: int, rates: tuple[int, ...], image_pooling: bool) -> None:
        super().__init__()

        def layer(cin: int, kernel: int = 1, rate: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(cin, cout, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False)
            return [conv, nn.BatchNorm2d(cout), nn.ReLU()]

        branches = [nn.Sequential(*layer(cin)), *(nn.Sequential(*layer(cin, 3, rate)) for rate in rates)]
        if image_pooling:
            branches.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *layer(cin)))
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(*layer(len(branches) * cout), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        maps = [F.interpolate(branch(x), x.shape[2:], mode="bilinear") for branch in self.convs]
        return self.project(torch.cat(maps, dim=1))


def _skip_unless_runnable(backend: str) -> None:
    if backend == "cpu" and native.cpu_missing():
        pytest.skip(str(native.cpu_missing()))


def _pair(
    backend: str = "auto", rates: tuple[int, ...] = (2, 5), image_pooling: bool = True, width: int = 7
) -> tuple[ak.nn.ASPP, Twin]:
    ours = ak.nn.ASPP(6, width, rates, image_pooling, dropout=0.0, backend=backend)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
    theirs = Twin(6, width, rates, image_pooling)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _results(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out, (x, *module.parameters()), g.to(out.dtype))
    names = ["x", *(name for name, _ in module.named_parameters())]
    running = {name: b for name, b in module.named_buffers() if "running" in name}
    return {"out": out.detach(), **dict(zip(names, grads, strict=True)), **running}


def _error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).square().mean() / truth.square().mean().clamp(min=1e-12)).sqrt().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_against_float64(dtype: torch.dtype, layout: str, training: bool, backend: str, poison: None) -> None:
    _skip_unless_runnable(backend)
    ours, theirs = _pair(backend)
    ours, theirs = ours.to(dtype).train(training), theirs.to(dtype).double().train(training)
    x, g = torch.randn(3, 6, 9, 8).to(dtype), torch.randn(3, 7, 9, 8).to(dtype)
    a, b = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, g))
    results, truth = _results(ours, a, b), _results(theirs, x.double(), g.double())
    for name, expected in truth.items():
        # The bf16 batch norm of three pooled pixels divides by a deviation of a few roundings.
        if not (dtype is torch.bfloat16 and training and name not in ("out", "project.1.running_mean")):
            assert _error(results[name], expected) < TOLERANCE[dtype], name
    assert results["out"].is_contiguous(memory_format=LAYOUTS[layout])
    if not training:
        with torch.no_grad():
            assert _error(ours(a), truth["out"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("image_pooling", [True, False])
@pytest.mark.parametrize("rates", [(), (1,), (3, 20)])
def test_any_branches(rates: tuple[int, ...], image_pooling: bool) -> None:
    ours, theirs = _pair("auto", rates, image_pooling, 33)
    x, g = torch.randn(2, 6, 5, 12), torch.randn(2, 33, 5, 12)
    for training in (False, True):
        results = _results(ours.train(training), x, g)
        for name, expected in _results(theirs.double().train(training), x.double(), g.double()).items():
            if not (image_pooling and training and name != "out"):  # pooling over two images: gradients are ill-conditioned
                assert _error(results[name], expected) < 1e-3, name


def test_odd_strides_and_an_empty_batch() -> None:
    ours, _ = _pair()
    ours.eval()
    x = torch.randn(2, 12, 9, 16)[:, ::2, :, ::2]
    torch.testing.assert_close(ours(x), ours(x.contiguous()))
    with torch.no_grad():
        assert ours(x[:0]).shape == (0, 7, 9, 8)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_both_orders(training: bool, backend: str) -> None:
    _skip_unless_runnable(backend)

    def layer(o: int, c: int, k: int = 1, rate: int = 1) -> tuple[Callable[..., ak.ConvBN], list[Tensor]]:
        def make(w: Tensor, g: Tensor, b: Tensor) -> ak.ConvBN:
            return ak.ConvBN(w, g, b, torch.zeros(o).double(), torch.ones(o).double(), (rate, rate), training)

        return make, [t.double().requires_grad_() for t in (torch.randn(o, c, k, k), torch.rand(o) + 0.5, torch.rand(o))]

    layers = [layer(2, 2), layer(1, 2, 3, 2), layer(1, 2), layer(2, 4)]
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        parts = [make(*parameters[3 * i : 3 * i + 3]) for i, (make, _) in enumerate(layers)]
        return ak.aspp(x, parts[:2], parts[3], parts[2], backend=backend)

    leaves = (x, *(t for _, tensors in layers for t in tensors))
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_the_concatenation_is_never_made() -> None:
    ours, _ = _pair(width=8, rates=(2, 4))
    x = torch.randn(2, 6, 16, 16, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        ours(x)
    assert max(sizes) == 2 * 8 * 16 * 16  # one branch


def test_thread_counts_give_the_same_bits() -> None:
    _skip_unless_runnable("cpu")
    ours = ak.nn.ASPP(24, 40, (3, 6), dropout=0.0, backend="cpu")
    x, g = torch.randn(2, 24, 21, 19), torch.randn(2, 40, 21, 19)
    assert_same_bits_for_threads(lambda: [v for k, v in _results(ours, x, g).items() if "running" not in k])


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training: bool) -> None:
    torch._dynamo.reset()
    ours, _ = _pair()
    ours.train(training)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, 9, 8)
    torch.testing.assert_close(compiled(x), ours(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ours(x))


def test_exports() -> None:
    ours, _ = _pair()
    x = torch.randn(1, 6, 9, 8)
    program = torch.export.export(ours.eval(), (x,))
    torch.testing.assert_close(program.module()(x), ours(x))


def test_explain() -> None:
    layers = [ak.ConvBN(torch.empty(7, 6, 1, 1), *[torch.empty(7)] * 4)]
    layers += [ak.ConvBN(torch.empty(7, 6, 3, 3), *[torch.empty(7)] * 4, (12, 12))]
    projection = ak.ConvBN(torch.empty(7, 21, 1, 1), *[torch.empty(7)] * 4)
    explanation = ak.explain("aspp", torch.empty(1, 6, 33, 33), layers, projection, layers[0])
    assert [c.name for c in explanation.choices] == ["cpu", "triton", "torch", "reference"]
    assert "[1x1 rate 1, 3x3 rate 12] and image pooling inference float32" in str(explanation)


def _layer(o: int, c: int, k: int = 1, **changes: Any) -> ak.ConvBN:
    return ak.ConvBN(torch.ones(o, c, k, k), torch.ones(o), torch.zeros(o), torch.zeros(o), torch.ones(o), **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(branches=[]), ValueError, "branches: expected at least one, but got none"),
        (dict(branches=[_layer(5, 4, 2)]), ValueError, r"branch 0: expected a kernel of odd size.*\[5, 4, 2, 2\]"),
        (dict(branches=[_layer(5, 3)]), RuntimeError, "to have 3 channels, but got 4 channels"),
        (dict(projection=_layer(5, 9)), ValueError, r"expected weight of size \[O, 10, 1, 1\].*\[5, 9, 1, 1\]"),
        (dict(projection=_layer(5, 10)._replace(bn_bias=torch.ones(3))), ValueError, "bn_bias: expected 5 values"),
        (dict(pooling=_layer(5, 4, 3)), ValueError, r"pooling: expected a 1x1 kernel.*\[5, 4, 3, 3\]"),
        (dict(pooling=_layer(5, 4, training=True)), ValueError, "training with a batch of 1"),
        (dict(backend="nope"), ValueError, "unknown backend 'nope'"),
    ],
)
def test_mistakes_name_the_value(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(
        input=torch.zeros(1, 4, 8, 8), branches=[_layer(5, 4)], projection=_layer(5, 10), pooling=_layer(5, 4)
    )
    assert ak.aspp(**arguments).shape == (1, 5, 8, 8)
    with pytest.raises(error, match=message):
        ak.aspp(**(arguments | changes))


@pytest.mark.parametrize(("rates", "message"), [((0,), "expected positive integers"), ((1.5,), "expected positive integers")])
def test_bad_modules(rates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ak.nn.ASPP(8, 4, rates)
    with pytest.raises(ValueError, match="width of ASPP is 0"):
        ak.nn.ASPP(8, 0)
