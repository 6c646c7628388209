"""PSPNet: the published sizes, and the head in all its forms against the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from segmodels import create_model


# facts of the papers' code: with the deep stem, without the auxiliary head, and what that adds
@pytest.mark.parametrize(
    ("depth", "classes", "count", "aux"), [(50, 150, 46_782_550, 2_398_358), (101, 21, 65_708_501, 2_365_205)]
)
def test_parameters_are_the_published_ones(depth, classes, count, aux):
    with torch.device("meta"):
        models = [create_model(f"pspnet_resnet{depth}", classes, aux_loss=flag) for flag in (False, True)]
        seven = create_model(f"pspnet_resnet{depth}", classes, stem="conv7")
    found = [sum(p.numel() for p in model.parameters()) for model in (*models, seven)]
    assert found == [count, count + aux, count - 123_776]


@pytest.mark.parametrize("stride_placement", ["3x3", "1x1", "last"])
@pytest.mark.parametrize("depth", [50, 101, 152, 269])
def test_every_depth_and_stride_placement_has_the_same_parameters(depth, stride_placement):
    with torch.device("meta"):
        model = create_model(f"pspnet_resnet{depth}", stride_placement=stride_placement)
        plain = create_model(f"pspnet_resnet{depth}")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    first = model.backbone.layer2[0]
    strides = {"3x3": ((1, 1), (2, 2)), "1x1": ((2, 2), (1, 1)), "last": ((1, 1), (1, 1))}[stride_placement]
    assert (first.conv1.stride, first.conv2.stride) == strides
    assert model.backbone.layer1[-1].conv2.stride == ((2, 2) if stride_placement == "last" else (1, 1))
    # conv4 at rate 2, conv5 at rate 4, in every unit (with strides at the end, conv3's last unit leaves rate 1 behind)
    assert {block.conv2.dilation for block in model.backbone.layer4} == {(4, 4)}
    assert {block.conv2.dilation for block in model.backbone.layer3[:-1]} == {(2, 2)}


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("reduction", [True, False])
@pytest.mark.parametrize("bins", [(1,), (1, 2, 3, 6)])
def test_logits_are_those_of_the_plain_form(mode, reduction, bins):
    """The ablation of the paper's table 1: B1 or B1236, average or maximum, with and without dimension reduction."""
    torch.manual_seed(0)
    options = dict(mode=mode, reduction=reduction, bins=bins, width_mult=0.25, head_channels=16)
    model = create_model("pspnet_resnet18", 5, **options).eval()
    x = torch.randn(2, 3, 65, 73)
    with torch.no_grad():
        features = model.backbone(x)["out"]
        head = model.classifier
        pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
        levels = [pool(features, level) for level in bins]
        if reduction:
            levels = [layers[1:](level) for layers, level in zip(head.ppm.features, levels, strict=True)]
        levels = [F.interpolate(level, features.shape[2:], mode="bilinear", align_corners=True) for level in levels]
        expected = head.cls(torch.cat([features, *levels], 1))
        # The same sums in another order.
        torch.testing.assert_close(model.logits(x)["out"], expected, rtol=1e-4, atol=1e-5)
    assert model.set_output_stride(16) is None
    assert model(x)["out"].shape == (2, 5, 65, 73)
