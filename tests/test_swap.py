"""swap and unswap: same objects, same state, same results on our kernels, and back without a trace."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import atrous_kernels as ak
import segmodels
from tests.models.torchvision_twin import TorchvisionDeepLabV3ResNet50, randomise_batch_norm

# Some of the framework's ways to wrap a convolution are deprecated and still in use.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")

# fp32 sums of some hundred to some thousand products, taken in another order layer after layer, on activations of order 1.
CLOSE = dict(rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """A bit of everything: stem, grouped, depthwise, biases, chains, an odd padding mode, a 1x1 classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12), nn.BatchNorm2d(12), nn.ReLU6(),
            nn.Conv2d(12, 16, 3, padding=1, groups=2, padding_mode="reflect"), nn.ReLU(),
            nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.classifier = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(self.stem(x)))


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    randomise_batch_norm(net)
    return net


def _state(model: nn.Module) -> list[Any]:
    """Everything that unswap has to give back: per module its identity, class and attributes."""
    return [(path, id(module), type(module), dict(vars(module))) for path, module in model.named_modules()]


def _same_state_dict(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return list(before) == list(after) and all(before[key] is after[key] for key in before)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))


@pytest.mark.parametrize("training", [False, True])
def test_results_gradients_and_statistics_stay(training: bool) -> None:
    ours, theirs = _net().train(training), _net().train(training)
    ak.swap(ours)
    x = torch.randn(2, 3, 33, 29)
    results = []
    for model in (ours, theirs):
        y = model(x)
        y.square().mean().backward()
        results.append(y)
    torch.testing.assert_close(*results, **CLOSE)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_every_object_stays_the_same_one_and_unswap_leaves_no_trace() -> None:
    model = _net()
    before, tensors, text = _state(model), _tensors(model), repr(model)
    report = ak.swap(model)
    convolutions = ["stem.0", "body.0", "body.3", "body.5", "classifier"]
    assert [line.path for line in report.swapped] == [*convolutions, "stem[0:3]", "body[0:3]", "body[5:7]"]
    assert not report.left
    assert all(isinstance(model.get_submodule(path), ak.nn.Conv2d) for path in convolutions)
    assert [entry[1] for entry in _state(model)] == [entry[1] for entry in before]
    assert _same_state_dict(tensors, _tensors(model))
    ak.unswap(model)
    assert _state(model) == before
    assert _same_state_dict(tensors, _tensors(model))
    assert repr(model) == text


def test_swapping_twice_changes_nothing_more() -> None:
    model = _net()
    ak.swap(model)
    once = _state(model)
    report = ak.swap(model)
    assert not report.swapped
    assert {line.left for line in report.left} == {"already ours"}
    assert _state(model) == once
    ak.unswap(model)
    ak.unswap(model)
    assert not any(isinstance(module, ak.nn.Conv2d) for module in model.modules())


def test_an_optimizer_made_before_goes_on_and_mode_and_moves_survive_unswap() -> None:
    ours, theirs = _net(), _net()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (ours, theirs)]
    x = torch.randn(2, 3, 17, 17)
    for step in range(4):
        if step == 1:
            ak.swap(ours)
        if step == 3:
            ak.unswap(ours)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    ak.swap(ours)
    ours.eval().double()
    ak.unswap(ours)
    assert not any(module.training for module in ours.modules())
    assert {value.dtype for value in ours.parameters()} == {torch.float64}


def test_our_own_modules_stay_ours() -> None:
    model = nn.Sequential(ak.nn.Conv2d(3, 4, 1, backend="reference"), nn.Conv2d(4, 4, 1))
    report = ak.swap(model)
    assert [(line.path, line.left) for line in report.lines] == [("0", "already ours"), ("1", None)]
    ak.unswap(model)
    assert [type(module) for module in model] == [ak.nn.Conv2d, nn.Conv2d]
    assert model[0].backend == "reference"


def test_a_convolution_by_itself_and_one_used_twice() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    assert [line.path for line in ak.swap(conv).swapped] == ["(the model itself)"]
    ak.unswap(conv)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv)})
    assert [line.path for line in ak.swap(model).swapped] == ["a"]
    assert model["a"] is model["b"][0] is conv
    assert type(conv) is ak.nn.Conv2d


def _hooks(conv: nn.Conv2d) -> None:
    conv.register_forward_hook(lambda module, args, output: output + 1)
    conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


@pytest.mark.parametrize(
    "wrap",
    [_hooks, torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)],
    ids=["hooks", "weight_norm", "spectral_norm", "pruning"],
)
def test_hooks_go_on(wrap: Callable[[nn.Conv2d], Any]) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        wrap(model[0])
        models.append(model.eval())
    assert len(ak.swap(models[0]).swapped) == 1
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(models[0](x), models[1](x), **CLOSE)


class Mine(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(3, 4, 1))


def _patched() -> nn.Module:
    conv = nn.Conv2d(3, 4, 1)
    conv.forward = lambda x: x
    return conv


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Mine(3, 4, 1), "subclass"),
        (_parametrized, r"parametrized \(weight\)"),
        (lambda: nn.LazyConv2d(4, 1), "not known yet"),
        (_patched, "its forward was replaced"),
        (lambda: torch.ao.nn.quantized.Conv2d(3, 4, 1), "quantised"),
    ],
)
def test_what_is_left_and_why(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make(), nn.Conv2d(4, 4, 1))
    before = type(model[0])
    report = ak.swap(model)
    (line,) = report.left
    assert line.path == "0"
    assert re.search(reason, line.left)
    assert type(model[0]) is before
    assert type(model[1]) is ak.nn.Conv2d


def test_the_report_prints() -> None:
    text = str(ak.swap(nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "other": Mine(3, 4, 1), "relu": nn.ReLU()})))
    assert text.splitlines() == [
        "swapped 1, left 1",
        "  -> conv   Conv2d",
        f"     other  {__name__}.Mine: a subclass of torch.nn.Conv2d, which may compute something else",
    ]


def test_mistakes_name_what_was_expected() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, but got dict"):
        ak.swap({})
    with pytest.raises(TypeError, match="swap before scripting"):
        ak.swap(torch.jit.script(nn.Conv2d(3, 4, 1)))
    model = _net()
    ak.swap(model)
    parametrizations.weight_norm(model.classifier)
    with pytest.raises(RuntimeError, match="classifier: parametrized after swap"):
        ak.unswap(model)
    assert type(model.stem[0]) is ak.nn.Conv2d
    parametrize.remove_parametrizations(model.classifier, "weight")
    ak.unswap(model)
    assert type(model.classifier) is nn.Conv2d


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_work_and_can_be_unswapped(how: str) -> None:
    model = _net().eval()
    ak.swap(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 17, 17)
    assert torch.equal(other(x), model(x))
    ak.unswap(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in _net().modules()]
    assert type(model.classifier) is ak.nn.Conv2d


def test_compiles_before_and_after() -> None:
    model = _net().eval()
    x = torch.randn(1, 3, 17, 17)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (None, ak.swap, ak.unswap):
        if change:
            change(model)
        torch.testing.assert_close(compiled(x), expected, **CLOSE)


def test_a_deeplab_written_like_torchvisions() -> None:
    torch.manual_seed(0)
    model = TorchvisionDeepLabV3ResNet50().eval()
    randomise_batch_norm(model)
    keys = list(model.state_dict())
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        expected = model(x)
        report = ak.swap(model)
        ours = model(x)
    assert sum(line.what == "Conv2d" for line in report.swapped) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    chains = {line.path: line.what for line in report.swapped if line.what != "Conv2d"}
    assert chains["classifier.0.convs.2[0:3]"] == chains["classifier.0.convs.4[1:4]"] == "Conv2d + BatchNorm2d + ReLU"
    assert chains["backbone.layer1.0.downsample[0:2]"] == "Conv2d + BatchNorm2d"
    assert chains["classifier.0"].endswith("_ASPP as aspp")
    assert len(chains) == 4 + 6 + 1 + 1 + 1
    assert not report.left
    assert list(model.state_dict()) == keys
    for key, truth in expected.items():
        # Some sixty layers: relative to the size of the logits.
        assert (ours[key] - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_chains_of_our_own_convolutions_run_as_one_and_stay_ours() -> None:
    model = segmodels.create_model("deeplabv3_resnet18", num_classes=3, output_stride=16).eval()
    before = _state(model)
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        expected = model(x)["out"]
        report = ak.swap(model)
        torch.testing.assert_close(model(x)["out"], expected, **CLOSE)
    assert {line.left for line in report.lines if line.what == "Conv2d"} == {"already ours"}
    assert "classifier[1:4]" in [line.path for line in report.swapped]
    ak.unswap(model)
    assert _state(model) == before


class Block(nn.Sequential):
    """As torchvision's: a Sequential that only adds an __init__."""

    def __init__(self, cin: int, cout: int, **options: Any) -> None:
        super().__init__(nn.Conv2d(cin, cout, 3, padding=1, **options), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _frozen(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Block(3, 8),
    "bias": lambda: Block(3, 8, bias=True),
    "depthwise, ReLU6": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
    "no affine part": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
    "plain average": lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU()),
    "other activation": lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 1)),
    "two": lambda: nn.Sequential(*Block(3, 8), *Block(8, 4)),
    "frozen": lambda: _frozen(Block(3, 8, bias=True)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, training: bool) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = CHAINS[name]().train(training)
        for norm in (m for m in model if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
        models.append(_frozen(model) if name == "frozen" else model)
    ours, theirs = models
    assert ak.swap(ours).swapped[-1].path.endswith("]")
    for _ in range(2):
        x = torch.randn(2, 3, 9, 8)
        results = [model(x) for model in models]
        torch.testing.assert_close(*results, **CLOSE)
        for result in results:
            result.square().sum().backward()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            # Sums over 144 pixels of products of order 10.
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def test_a_chain_notices_what_is_changed_later() -> None:
    model = Block(3, 8).eval()
    ak.swap(model)
    x = torch.randn(1, 3, 9, 9)
    expected = model(x)
    seen = []
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(seen[0].relu(), expected, **CLOSE)
    handle.remove()
    model.insert(1, nn.Identity())
    torch.testing.assert_close(model(x), expected, **CLOSE)
    torch.testing.assert_close(model[0](x), nn.functional.conv2d(x, model[0].weight, model[0].bias, padding=1), **CLOSE)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubled(*Block(3, 8)), "the Sequential has a forward of its own"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.SyncBatchNorm(8)), "got Conv2d and SyncBatchNorm"),
        (lambda: nn.Sequential(Mine(3, 8, 1), nn.BatchNorm2d(8)), "got .*Mine and BatchNorm2d"),
        (lambda: Block(3, 8, padding_mode="circular"), "padding mode circular"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)), "no running statistics"),
        (lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 8, 1)), nn.BatchNorm2d(8)), "hooks inside"),
    ],
)
def test_chains_that_stay_apart_and_why(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    kind = type(model)
    line = ak.swap(model).left[-1]
    assert line.path.startswith("[0:")
    assert re.search(reason, line.left)
    assert type(model) is kind


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool) -> None:
    ours, theirs = _net().train(training), _net().train(training)
    ak.swap(ours)
    x = torch.randn(2, 3, 17, 17)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), theirs(x)
    assert a.dtype == b.dtype
    # Both round to 8 bits after every layer.
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
