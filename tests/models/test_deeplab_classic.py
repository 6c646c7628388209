"""DeepLab v1 and v2, and attention to scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segmodels import create_model
from segmodels.models.multiscale import rescale


def narrow(name: str, num_classes: int = 4, **options) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes, **{"width_mult": 1 / 16, **options}).eval()
    for key, parameter in model.named_parameters():
        if key.startswith("classifier."):  # large enough for scores to differ
            nn.init.normal_(parameter, std=0.2)
    return model


def up(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("fc6", ["4x4", "4x4-wide", "7x7", "largefov"])
def test_v1_sizes_and_fields(fc6):
    model = narrow("deeplabv1_vgg16", fc6=fc6)
    with torch.no_grad():
        assert model.logits(torch.randn(1, 3, 321, 65))["out"].shape == (1, 4, 41, 9)
        out = model(torch.randn(1, 3, 65, 33))["out"]
    assert out.shape == (1, 4, 65, 33)
    kernel, rate = {"4x4": (4, 4), "4x4-wide": (4, 8), "7x7": (7, 4), "largefov": (3, 12)}[fc6]
    assert (model.backbone.fc6.kernel_size, model.backbone.fc6.dilation) == ((kernel, kernel), (rate, rate))
    assert [layer.dilation for layer in model.backbone.features if isinstance(layer, nn.Conv2d)][-4:] == [(1, 1)] + [(2, 2)] * 3


def test_v1_of_2x2_pools_loses_a_pixel_on_each_side():
    """The first release: crops of 306 and 514, labels cropped by one of 39 and 65."""
    model = narrow("deeplabv1_vgg16", fc6="4x4", pool=2)
    with torch.no_grad():
        assert model.logits(torch.randn(1, 3, 306, 514))["out"].shape[2:] == (39 - 2, 65 - 2)


def test_largefov_averages_pool5():
    model = narrow("deeplabv1_vgg16")
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        features = model.backbone(x)
        fc6 = model.backbone.fc6(F.avg_pool2d(features["pool5"], 3, 1, 1)).relu()
        assert features["out"].equal(model.backbone.fc7(fc6).relu())


def test_msc():
    """In training all scores meet at stride 8, otherwise at the size of the image; both are sums of the same branches."""
    model = narrow("deeplabv1_vgg16", msc=True, branch_channels=4, dropout=0.0)
    x = torch.randn(1, 3, 65, 33)
    with torch.no_grad():
        features = model.backbone(x)
        maps = {"image": x, **{f"pool{i}": features[f"pool{i}"] for i in range(1, 5)}}
        branches = {name: model.classifier[name](maps[name]) for name in maps}
        expected = up(model.classifier["fc8"](features["out"]), (65, 33)) + sum(up(b, (65, 33)) for b in branches.values())
        assert [tuple(b.shape[2:]) for b in branches.values()] == [(65, 33), (33, 17), (17, 9), (9, 5), (9, 5)]
        torch.testing.assert_close(model.logits(x)["out"], expected)
        for module in model.classifier.values():
            module.train()
        strided = [model.classifier[name](maps[name]) for name in maps]
        for small, name, stride in zip(strided, branches, (8, 4, 2, 1, 1), strict=True):
            torch.testing.assert_close(small, branches[name][:, :, ::stride, ::stride])
        model.backbone.dropout = 0.0
        model.train()
        torch.testing.assert_close(model.logits(x)["out"], model.classifier["fc8"](features["out"]) + sum(strided))
    model.freeze_base()
    trained = {key.split(".")[1] for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {"image", "pool1", "pool2", "pool3", "pool4"}


@pytest.mark.parametrize(("rates", "expected"), [("largefov", [12]), ("aspp-s", [2, 4, 8, 12]), ("aspp-l", [6, 12, 18, 24])])
@pytest.mark.parametrize("backbone", ["vgg16", "resnet50"])
def test_v2_sums_its_branches(backbone, rates, expected):
    model = narrow(f"deeplabv2_{backbone}", rates=rates, **({"fc_channels": 8} if backbone == "vgg16" else {}))
    x = torch.randn(1, 3, 65, 41)
    with torch.no_grad():
        features = model.backbone(x)["out"]
        if backbone == "vgg16" and len(expected) == 1:
            features = F.avg_pool2d(features, 3, 1, 1)
        parts = [branch(features) for branch in model.classifier.branches]
        torch.testing.assert_close(model.logits(x)["out"], sum(parts))
    assert parts[0].shape == (1, 4, 9, 6)
    first = [branch if backbone == "resnet50" else branch[0] for branch in model.classifier.branches]
    assert [layer.dilation[0] for layer in first] == expected


def test_v2_fuses_scales_by_their_maximum():
    model = narrow("deeplabv2_resnet50", scales=(1, 0.75, 0.5))
    single = narrow("deeplabv2_resnet50")
    single.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        assert [tuple(rescale(x, scale).shape[2:]) for scale in (1, 0.75, 0.5)] == [(65, 97), (49, 73), (33, 49)]
        parts = {scale: single.logits(rescale(x, scale))["out"] for scale in (1, 0.75, 0.5)}
        on_one = {scale: up(part, (9, 13)) for scale, part in parts.items()}
        expected = torch.stack(list(on_one.values())).amax(0)
        assert list(model.logits(x)) == ["out"]
        torch.testing.assert_close(model.logits(x)["out"], expected)
        out = model.train().logits(x)  # BatchNorm is frozen, so training computes the same
    assert list(out) == ["out", "scale1", "scale0.75", "scale0.5"]
    for name, value in (("out", expected), ("scale1", parts[1]), ("scale0.75", on_one[0.75]), ("scale0.5", parts[0.5])):
        torch.testing.assert_close(out[name], value)


def test_v2_freezes_batch_norm():
    model = narrow("deeplabv2_resnet50").train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert model.training
    free = narrow("deeplabv2_resnet50", freeze_batch_norm=False).train()
    assert all(module.training for module in free.modules())


@pytest.mark.parametrize("scales", [(1, 0.5), (1, 0.75, 0.5)])
@pytest.mark.parametrize("fusion", ["attention", "average", "max"])
def test_attention_to_scale(scales, fusion):
    model = narrow("attentiontoscale_vgg16", scales=scales, fusion=fusion, attention_channels=8)
    x = torch.randn(2, 3, 65, 33)
    with torch.no_grad():
        features = [up(model.backbone(rescale(x, scale))["out"], (9, 5)) for scale in scales]
        scores = [up(model.classifier["fc8"](model.backbone(rescale(x, scale))["out"]), (9, 5)) for scale in scales]
        if fusion == "attention":
            weights = model.classifier["attention"](torch.cat(features, 1)).softmax(1)
            expected = sum(weights[:, i : i + 1] * score for i, score in enumerate(scores))
            maps = model.attention(x)
            torch.testing.assert_close(maps, up(weights, (65, 33)))
            torch.testing.assert_close(maps.sum(1), torch.ones(2, 65, 33))
            assert maps.shape[1] == len(scales)
        else:
            stacked = torch.stack(scores)
            expected = stacked.mean(0) if fusion == "average" else stacked.amax(0)
            with pytest.raises(ValueError, match="expected a model with fusion='attention'"):
                model.attention(x)
        torch.testing.assert_close(model.logits(x)["out"], expected)
    supervised = model.train().logits(x)
    assert list(supervised) == ["out", *(f"scale{scale:g}" for scale in scales)]
    model.supervise_scales = False
    assert list(model.logits(x)) == ["out"]
