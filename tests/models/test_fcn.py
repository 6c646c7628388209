"""FCN against the authors' network written down in plain PyTorch, and its variants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmodels import create_model
from segmodels.heads.upscore import Upscore, bilinear_kernel


def fcn(name: str, num_classes: int = 4, **options) -> nn.Module:
    """Narrow, with scores that are not zero."""
    torch.manual_seed(0)
    model = create_model(name, num_classes, **{"width_mult": 1 / 16, **options}).eval()
    for key, parameter in model.named_parameters():
        if ".scores." in key:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("name", "offset", "skips", "kernel"),
    [
        ("fcn32s_vgg16", 19, [], 64),
        ("fcn16s_vgg16", 27, [5], 32),
        ("fcn8s_vgg16", 31, [5, 9], 16),
        ("fcn32s_alexnet", 18, [], 63),
    ],
)
def test_offsets_are_those_of_the_authors(name, offset, skips, kernel):
    decoder = fcn(name).classifier["out"]["decoder"]
    assert (decoder.offset, decoder.skip_offsets, decoder.upscore.kernel) == (offset, skips, kernel)


def upscored(x: Tensor, kernel: int, stride: int) -> Tensor:
    weight = torch.zeros(x.shape[1], x.shape[1], kernel, kernel, dtype=x.dtype)
    for channel in range(x.shape[1]):
        weight[channel, channel] = bilinear_kernel(kernel)
    return F.conv_transpose2d(x, weight, stride=stride)


def authors_fcn8s(weights: dict[str, Tensor], x: Tensor, at_once: bool) -> Tensor:
    """conv1_1 ... score, with the paddings and offsets of the published prototxt."""
    pools = []
    size = x.shape[2:]
    convolutions = iter(sorted({int(key.split(".")[2]) for key in weights if key.startswith("backbone.features.")}))
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        for layer in range(count):
            index = next(convolutions)
            weight, bias = weights[f"backbone.features.{index}.weight"], weights[f"backbone.features.{index}.bias"]
            x = F.conv2d(x, weight, bias, padding=100 if (stage, layer) == (0, 0) else 1).relu()
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        pools.append(x)
    for name in ("fc6", "fc7"):
        x = F.conv2d(x, weights[f"backbone.{name}.weight"], weights[f"backbone.{name}.bias"]).relu()
    heads = {name: f"classifier.out.scores.0.score.{name}" for name in ("out", "pool4", "pool3")}
    score = {name: (weights[f"{key}.weight"], weights[f"{key}.bias"]) for name, key in heads.items()}
    up = upscored(F.conv2d(x, *score["out"]), 4, 2)
    pool4 = F.conv2d(pools[3] * (0.01 if at_once else 1), *score["pool4"])
    up = upscored(up + pool4[:, :, 5 : 5 + up.shape[2], 5 : 5 + up.shape[3]], 4, 2)
    pool3 = F.conv2d(pools[2] * (0.0001 if at_once else 1), *score["pool3"])
    up = upscored(up + pool3[:, :, 9 : 9 + up.shape[2], 9 : 9 + up.shape[3]], 16, 8)
    return up[:, :, 31 : 31 + size[0], 31 : 31 + size[1]]


@pytest.mark.parametrize("at_once", [False, True])
def test_fcn8s_is_the_authors_network(at_once):
    model = fcn("fcn8s_vgg16", at_once=at_once).double()
    x = torch.randn(2, 3, 50, 37, dtype=torch.float64)
    with torch.no_grad():
        expected = authors_fcn8s(model.state_dict(), x, at_once)
        # The same sums in another order.
        torch.testing.assert_close(model(x)["out"], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (64, 32), (63, 32)])
@pytest.mark.parametrize("learned", [False, True])
def test_upscore_starts_as_bilinear_interpolation(kernel, stride, learned):
    module = Upscore(3, kernel, stride, learned=learned).double()
    assert len(list(module.parameters())) == learned
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x), upscored(x, kernel, stride))
    if kernel == 2 * stride:  # away from the border: half-pixel bilinear interpolation
        inner = slice(kernel // 2 + stride // 2, -kernel // 2 - stride // 2)
        grown = F.interpolate(x, scale_factor=stride, mode="bilinear")
        outer = slice(stride, grown.shape[2] - stride), slice(stride, grown.shape[3] - stride)
        torch.testing.assert_close(module(x)[:, :, inner, inner], grown[:, :, outer[0], outer[1]])


def test_finer_ones_start_from_coarser_ones():
    coarse, fine = fcn("fcn32s_vgg16"), create_model("fcn16s_vgg16", 4, width_mult=1 / 16).eval()
    fine.start_from(coarse)
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        scores = [model.classifier["out"]["scores"][0](model.backbone(x)) for model in (coarse, fine)]
    assert scores[1][0].equal(scores[0][0])
    assert not scores[1][1].any()
    with pytest.raises(ValueError, match=r"classifier.out.scores.0.score.pool4.weight of FCN16s has shape .*expected nothing"):
        coarse.start_from(fine)


def test_learned_upsampling_is_all_but_the_last():
    model = fcn("fcn8s_vgg16", learn_upsampling=True)
    learned = {key: list(p.shape) for key, p in model.named_parameters() if ".decoder." in key}
    assert learned == {f"classifier.out.decoder.doublings.{i}.weight": [4, 4, 4, 4] for i in (0, 1)}


def test_two_heads():
    """SIFT Flow: semantic and geometric classes."""
    model = fcn("fcn16s_vgg16", geometric_classes=3)
    x = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        out = model(x)
        assert {key: list(value.shape) for key, value in out.items()} == {"out": [1, 4, 33, 40], "geometric": [1, 3, 33, 40]}
        alone = fcn("fcn16s_vgg16")
        alone.load_state_dict({k: v for k, v in model.state_dict().items() if ".geometric." not in k})
        assert alone(x)["out"].equal(out["out"])


def test_late_fusion_averages_the_scores_of_two_networks():
    model = fcn("fcn16s_vgg16", late_fusion=True)
    first = list(model.backbone.parameters())
    assert all(a.equal(b) and a is not b for a, b in zip(first, model.backbone_hha.parameters(), strict=True))
    x = torch.randn(2, 6, 40, 33)
    state = model.state_dict()
    parts = []
    for stream, (backbone, colours) in enumerate((("backbone.", x[:, :3]), ("backbone_hha.", x[:, 3:]))):
        single = fcn("fcn16s_vgg16")
        own = {f"backbone.{k.removeprefix(backbone)}": v for k, v in state.items() if k.startswith(backbone)}
        scores = f"classifier.out.scores.{stream}."
        own |= {f"classifier.out.scores.0.{k.removeprefix(scores)}": v for k, v in state.items() if k.startswith(scores)}
        single.load_state_dict(own)
        with torch.no_grad():
            parts.append(single(colours)["out"])
    with torch.no_grad():  # linear from the scores on, up to rounding
        torch.testing.assert_close(model(x)["out"], (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-4)


def test_early_fusion_is_more_channels():
    model = fcn("fcn32s_vgg16", in_channels=4)
    assert list(model.backbone.features[0].weight.shape) == [4, 4, 3, 3]
    assert model(torch.randn(1, 4, 20, 20))["out"].shape == (1, 4, 20, 20)
