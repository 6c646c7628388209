"""swap and unswap of whole modules: ASPP and pyramid pooling as other libraries write them, and what only looks like them."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import atrous_kernels as ak
from atrous_kernels import swap_modules
from tests.models.torchvision_twin import randomise_batch_norm
from tests.test_swap import _same_state_dict, _state, _tensors

# fp64: sums of some hundred products in another order, one BatchNorm over three pooled values behind them.
EXACT = dict(rtol=1e-9, atol=1e-9)
# fp32, the same sums.
CLOSE = dict(rtol=1e-4, atol=1e-4)


def _layers(cin: int, cout: int, kernel: int = 1, rate: int = 1, bias: bool = False) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel, padding=rate * (kernel // 2), dilation=rate, bias=bias)
    return [conv, nn.BatchNorm2d(cout), nn.ReLU()]


class Branch(nn.Sequential):
    """As torchvision's: only an __init__."""

    def __init__(self, cin: int, cout: int, rate: int, bias: bool = False) -> None:
        super().__init__(*_layers(cin, cout, 3, rate, bias))


class Pooling(nn.Sequential):
    """As torchvision's: runs its children, then upsamples."""

    def __init__(self, cin: int, cout: int, bias: bool = False) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *_layers(cin, cout, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for child in self:
            x = child(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Aspp(nn.Module):
    """As torchvision's."""

    def __init__(self, bias: bool = False, pooling: bool = True, dropout: float = 0.0, rates: Sequence[int] = (2, 3)) -> None:
        super().__init__()
        branches = [nn.Sequential(*_layers(6, 5, bias=bias)), *(Branch(6, 5, rate, bias) for rate in rates)]
        self.convs = nn.ModuleList([*branches, *([Pooling(6, 5, bias)] if pooling else [])])
        self.project = nn.Sequential(*_layers(5 * len(self.convs), 4, bias=bias), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.convs], dim=1))


def _level(cin: int, cout: int, bins: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(bins), nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
    )


class Ppm(nn.Module):
    """As the authors' of PSPNet."""

    def __init__(self, align_corners: bool = True, bins: Sequence[Any] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.features = nn.ModuleList(_level(6, 2, each) for each in bins)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        up = [F.interpolate(level(x), size, mode="bilinear", align_corners=self.align_corners) for level in self.features]
        return torch.cat([x, *up], 1)


class Block(nn.Module):
    """As a level of segmentation_models.pytorch: upsamples by itself; one bin has a bias and no BatchNorm."""

    def __init__(self, cin: int, cout: int, bins: int) -> None:
        super().__init__()
        norm = nn.Identity() if bins == 1 else nn.BatchNorm2d(cout)
        after = nn.Sequential(nn.Conv2d(cin, cout, 1, bias=bins == 1), norm, nn.ReLU(inplace=True))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((bins, bins)), after)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.pool(x), size=x.shape[2:], mode="bilinear", align_corners=True)


class Blocks(nn.Module):
    """As segmentation_models.pytorch: the input comes last."""

    def __init__(self, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(6, 3, each) for each in bins)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([block(x) for block in self.blocks] + [x], dim=1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "aspp": Aspp,
    "aspp with biases": lambda: Aspp(bias=True),
    "aspp without image pooling": lambda: Aspp(pooling=False),
    "pyramid, corners aligned": Ppm,
    "pyramid, areas aligned": lambda: Ppm(align_corners=False),
    "pyramid, bins not square": lambda: Ppm(bins=((1, 2), 4)),
    "pyramid, input last": Blocks,
    "pyramid, one level, input last": lambda: Blocks((2,)),
}


def _build(name: str, training: bool = False) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(MODULES[name]())
    randomise_batch_norm(module)
    return module.train(training)


def _module_line(report: Any) -> Any:
    (line,) = (line for line in report.lines if line.path == "0")
    return line


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the name of each op that a swapped module calls."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        op = getattr(ak, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return op(*args, **kwargs)

        return call

    for name in ("aspp", "upsample_concat"):
        monkeypatch.setattr(swap_modules, name, counted(name))
    return calls


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_results_gradients_and_statistics_stay(name: str, training: bool, layout: Any, fused: list[str]) -> None:
    ours, theirs = (_build(name, training).double().to(memory_format=layout) for _ in range(2))
    assert _module_line(ak.swap(ours)).left is None
    fused.clear()
    for size in ((9, 11), (5, 4)):  # the second is smaller than the finest grid
        x = torch.randn(3, 6, *size, dtype=torch.float64).to(memory_format=layout)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [model(each) for model, each in zip((ours, theirs), inputs, strict=True)]
        g = torch.randn_like(outputs[1])
        for output in outputs:
            output.backward(g)
        torch.testing.assert_close(*outputs, **EXACT)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **EXACT)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **EXACT, msg=lambda m, key=key: f"{key}: {m}")
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    with_bias = name == "aspp with biases" and training  # the chains' rule: its gradient is the framework's business
    assert fused == ([] if with_bias else 2 * ["aspp" if "aspp" in name else "upsample_concat"])


@pytest.mark.parametrize("name", MODULES)
def test_every_object_stays_the_same_one_and_unswap_leaves_no_trace(name: str) -> None:
    model = _build(name, training=True)
    before, tensors, text = _state(model), _tensors(model), repr(model)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    line = _module_line(ak.swap(model))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert line.what.endswith(" as aspp" if "aspp" in name else " as pyramid_pool, upsample_concat")
    assert repr(model[0]).splitlines()[0] == text.splitlines()[1].removeprefix("  (0): ")
    assert isinstance(model[0], before[1][2])
    assert [entry[1] for entry in _state(model)] == [entry[1] for entry in before]
    assert _same_state_dict(tensors, _tensors(model))
    once = _state(model)
    again = ak.swap(model)
    assert {line.left for line in again.lines if line.path == "0" or line.what == "Conv2d"} == {"already ours"}
    assert not again.swapped
    assert _state(model) == once
    ak.unswap(model)
    assert _state(model) == before
    assert _same_state_dict(tensors, _tensors(model))
    assert repr(model) == text


def test_the_report_has_one_line_for_what_an_aspp_alone_runs() -> None:
    report = ak.swap(_build("aspp"))
    assert not report.left
    chains = [line.path for line in report.lines if "[" in line.path]
    assert chains == ["0.convs.0[0:3]", "0.convs.1[0:3]", "0.convs.2[0:3]", "0.project[0:3]"]


def test_our_own_modules_stay_ours() -> None:
    model = nn.Sequential(ak.nn.ASPP(6, 4), ak.nn.PyramidPooling(4, 2))
    report = ak.swap(model)
    assert {line.path: line.left for line in report.lines if line.path in "01"} == dict.fromkeys("01", "already ours")
    ak.unswap(model)
    assert [type(module) for module in model] == [ak.nn.ASPP, ak.nn.PyramidPooling]


# Look-alikes ------------------------------------------------------------------------------------------------------------


class Other(Aspp):
    """The structure of an ASPP with another ``forward``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        *local, pooled = [branch(x) for branch in self.convs]
        if self.how == "order":
            local.reverse()
        if self.how == "gradient":
            pooled = pooled.detach()
        if self.how == "training" and self.training:
            pooled = pooled * 2
        if self.how == "one size":
            local[0] = local[0] * (2 if x.shape[2] == x.shape[3] + 1 else 1)
        if self.how == "counts":
            self.calls += 1
        out = self.project(torch.cat([*local, pooled], 1))
        return (out, pooled) if self.how == "two outputs" else out


class Residual(Ppm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Nearest(Ppm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(F.interpolate(level(x), x.shape[2:]) for level in self.features)], 1)


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _with(module: nn.Module, path: str, part: nn.Module) -> nn.Module:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, part)
    return module


def _separable() -> nn.Module:
    """As segmentation_models.pytorch: a depthwise and a 1x1 convolution in a Sequential of their own."""
    branch = nn.Sequential(
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False), nn.Conv2d(6, 5, 1, bias=False)),
        nn.BatchNorm2d(5),
        nn.ReLU(),
    )
    return _with(Aspp(), "convs.1", branch)


def _replaced() -> nn.Module:
    module = Aspp()
    module.forward = lambda x: x
    return module


def _hooked(calls: list[Any]) -> nn.Module:
    module = Aspp()
    module.project[0].register_forward_hook(lambda *a: calls.append(a))
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Other("order"), "^its forward computes something else: a trial"),
        (lambda: Other("gradient"), "^its forward computes something else: a trial"),
        (lambda: Other("training"), "^its forward computes something else in training"),
        (lambda: Other("one size"), "^its forward computes something else"),
        (lambda: Other("counts"), "it changes attributes of the module"),
        (lambda: Other("two outputs"), "it gives no tensor, but tuple"),
        (lambda: Residual(), "^its forward computes something else: a trial"),
        (lambda: Nearest(), "^its forward computes something else: a trial"),
        (_separable, r"^branch 1: expected Conv2d and BatchNorm2d, got Sequential and BatchNorm2d"),
        (_replaced, "its forward was replaced"),
        (lambda: _hooked([]), "it has hooks inside"),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Aspp()), "SyncBatchNorm inside"),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Ppm()), "SyncBatchNorm inside"),
        (lambda: _with(Ppm(), "features.0.3", Strange()), r"test_swap_modules\.Strange inside, which may do anything"),
        (lambda: _with(Aspp(), "convs.0.2", nn.LeakyReLU()), "branch 0: expected ReLU, got LeakyReLU"),
        (lambda: _with(Aspp(), "convs.1.0", nn.Conv2d(6, 5, 3, padding=1, dilation=2)), "branch 1: expected stride 1, no groups"),
        (lambda: _with(Aspp(), "convs.0.0", parametrizations.weight_norm(nn.Conv2d(6, 5, 1))), "parametrized inside"),
        (lambda: _with(Ppm(), "features.0.0", nn.AdaptiveAvgPool2d((None, 2))), r"level 0: AdaptiveAvgPool2d to \(None, 2\)"),
    ],
)
def test_what_is_left_and_why(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make())
    kind = type(model[0])
    line = _module_line(ak.swap(model))
    assert re.search(reason, line.left)
    assert type(model[0]) is kind


def test_the_trial_calls_no_hook_and_changes_nothing() -> None:
    calls: list[Any] = []
    for module in (Aspp(), Ppm()):
        module.register_forward_hook(lambda *a: calls.append(a))
        module.register_forward_pre_hook(lambda *a: calls.append(a))
        assert [line.left for line in ak.swap(module).lines if line.path == "(the model itself)"] == [None]
        assert not calls
        module.eval()(torch.randn(1, 6, 9, 9))
        assert len(calls) == 2
        calls.clear()
    inside = _hooked(calls)
    ak.swap(inside)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: calls.append(a))
    report = ak.swap(nn.Sequential(Aspp()))
    handle.remove()
    assert "hooks of all modules" in _module_line(report).left
    assert not calls


# After the swap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aspp", "pyramid, input last"])
def test_a_swapped_module_notices_what_is_changed_later(name: str, fused: list[str]) -> None:
    model = _build(name)
    ak.swap(model)
    x = torch.randn(2, 6, 9, 8)
    expected = model(x)
    pool = next(part for part in model.modules() if isinstance(part, nn.AdaptiveAvgPool2d))
    seen: list[Tensor] = []
    handle = pool.register_forward_hook(lambda module, args, output: seen.append(output))
    fused.clear()
    torch.testing.assert_close(model(x), expected, **CLOSE)
    assert not fused
    torch.testing.assert_close(seen[0], x.mean((2, 3), keepdim=True), **CLOSE)
    handle.remove()
    torch.testing.assert_close(model(x), expected, **CLOSE)
    assert len(fused) == 1
    children = next(iter(model[0].children()))
    ak.unswap(children)  # its convolutions alone: an ASPP no longer runs as one
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_a_branch_with_another_forward_put_in_later_is_not_trusted(fused: list[str]) -> None:
    class Silent(Pooling):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    model, expected = _build("aspp"), _build("aspp")
    ak.swap(model)
    fused.clear()
    for each in (model, expected):
        last = each[0].convs[-1]
        last.__class__ = Silent
    x = torch.randn(1, 6, 9, 8)
    torch.testing.assert_close(model(x), expected(x), **CLOSE)
    assert not fused


def test_dropout_and_frozen_statistics_and_rates_set_later(fused: list[str]) -> None:
    model = nn.Sequential(Aspp(dropout=1.0)).train()
    ak.swap(model)
    assert not model(torch.randn(2, 6, 9, 9)).any()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    model[0].project[3].p = 0.0
    model[0].convs[1][0].dilation = model[0].convs[1][0].padding = (4, 4)
    theirs = copy.deepcopy(model)
    ak.unswap(theirs)
    x = torch.randn(1, 6, 9, 9)  # one image: frozen statistics do not mind
    fused.clear()
    torch.testing.assert_close(model(x), theirs(x), **CLOSE)
    assert fused == ["aspp"]


@pytest.mark.parametrize("name", ["aspp", "pyramid, corners aligned"])
def test_one_image_in_training_is_the_mistake_it_was(name: str) -> None:
    model = _build(name, training=True)
    ak.swap(model)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        model(torch.randn(1, 6, 9, 9))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["aspp", "pyramid, areas aligned", "pyramid, input last"])
def test_copies_work_and_can_be_unswapped(name: str, how: str, fused: list[str]) -> None:
    model = _build(name)
    kind = type(model[0])
    ak.swap(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(1, 6, 9, 8)
    fused.clear()
    assert torch.equal(other(x), model(x))
    assert len(fused) == 2
    ak.unswap(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in _build(name).modules()]
    assert type(model[0]) is not kind


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["aspp", "pyramid, corners aligned", "pyramid, input last"])
def test_autocast(name: str, dtype: torch.dtype, training: bool, fused: list[str]) -> None:
    ours, theirs = _build(name, training), _build(name, training)
    with torch.autocast("cpu", torch.bfloat16):  # the trial is not affected
        assert _module_line(ak.swap(ours)).left is None
    fused.clear()
    x = torch.randn(3, 6, 9, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), theirs(x)
    assert len(fused) == 1
    assert a.dtype == b.dtype
    # Both round to 8 bits after every layer; BatchNorm over three pooled values enlarges that.
    assert ((a - b).float().square().mean() / b.float().square().mean()).sqrt() < 0.05


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["aspp", "pyramid, corners aligned", "pyramid, input last"])
def test_compiles_before_and_after(name: str, training: bool, fused: list[str]) -> None:
    model = _build(name, training)
    x = torch.randn(3, 6, 9, 8)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (None, ak.swap, ak.unswap):
        if change:
            change(model)
        fused.clear()
        torch.testing.assert_close(compiled(x), expected, **CLOSE)
        assert bool(fused) == (change is ak.swap)


@pytest.mark.parametrize("name", ["aspp", "pyramid, input last"])
def test_other_devices_and_types_and_modes_of_the_caller(name: str) -> None:
    with torch.device("meta"):
        assert _module_line(ak.swap(nn.Sequential(MODULES[name]()))).left is None
    narrow = _build(name).bfloat16()
    theirs = copy.deepcopy(narrow)
    with torch.inference_mode():
        assert _module_line(ak.swap(narrow)).left is None
    x = torch.randn(2, 6, 9, 8).bfloat16()
    # Both round to 8 bits after every layer.
    torch.testing.assert_close(narrow(x), theirs(x), rtol=0.05, atol=0.05)
    assert narrow(x).requires_grad
