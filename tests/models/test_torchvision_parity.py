"""torchvision's state_dicts load unchanged and mean the same."""

from __future__ import annotations

import pytest
import torch
from torchvision_twin import TorchvisionDeepLabV3ResNet50, mobilenetv2_keys, randomise_batch_norm, resnet_keys

from segmodels import create_model
from segmodels.backbones import BACKBONES

DEPTHS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_resnet_keys(name):
    with torch.device("meta"):
        backbone = BACKBONES[name]()
    assert set(backbone.state_dict()) == resnet_keys(*DEPTHS[name])


def test_mobilenetv2_keys():
    assert set(BACKBONES["mobilenetv2"]().state_dict()) == mobilenetv2_keys()


# torchvision's published totals, less the 512 * 1000 + 1000 of the classifier; facts of the papers for 50 to 152.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512 - 513_000),
        ("resnet34", 21_797_672 - 513_000),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("resnet152", 58_143_808),
        # less features.18 (320 * 1280 + 2 * 1280) and the classifier (1280 * 1000 + 1000)
        ("mobilenetv2", 3_504_872 - 412_160 - 1_281_000),
        # the file's total, less _conv_head, _bn1 and _fc of the same sizes
        ("efficientnet_lite0", 4_652_008 - 412_160 - 1_281_000),
    ],
)
def test_backbone_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in BACKBONES[name]().parameters()) == count


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("deeplabv3_resnet50", {"head_conv": False}, 39_048_533),  # the paper's head
        ("deeplabv3_resnet101", {"head_conv": False}, 58_040_661),
        ("deeplabv3_resnet50", {}, 39_048_533 + 256 * 256 * 9 + 512),  # torchvision's extra 3x3 convolution
        # torchvision's published totals
        ("deeplabv3_resnet50", {"aux_loss": True}, 42_004_074),
        ("deeplabv3_resnet101", {"aux_loss": True}, 60_996_202),
        ("fcn_resnet50", {"aux_loss": True}, 35_322_218),
        ("fcn_resnet101", {"aux_loss": True}, 54_314_346),
    ],
)
def test_model_parameter_counts(name, options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, **options).parameters()) == count


def test_deeplabv3_resnet50_equals_its_torchvision_twin():
    torch.manual_seed(0)
    twin = TorchvisionDeepLabV3ResNet50()
    randomise_batch_norm(twin)
    model = create_model("deeplabv3_resnet50", output_stride=8, aux_loss=True)
    model.load_state_dict(twin.state_dict(), strict=True)
    assert list(model.state_dict()) == list(twin.state_dict())
    x = torch.randn(2, 3, 65, 65)
    twin.eval()
    model.eval()
    with torch.no_grad():
        expected, actual = twin(x), model(x)
        aux = model.aux_classifier(model.backbone(x)["aux"])
        expected_aux = twin.aux_classifier(twin.backbone(x)[0])
    # 55 convolutions in another order of summation, each off by at most a few float32 ulps of its largest value.
    scale = expected["out"].abs().max()
    torch.testing.assert_close(actual["out"] / scale, expected["out"] / scale, rtol=0, atol=1e-4)
    torch.testing.assert_close(aux, expected_aux, rtol=1e-4, atol=1e-4 * float(expected_aux.abs().max()))
