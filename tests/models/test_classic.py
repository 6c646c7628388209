"""The systems before DeepLabv3: parameters, fields of view, sizes, and that they train."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segmodels import create_model
from segmodels.backbones import VGG16, AlexNet, GoogLeNet
from segmodels.backbones.base import SamePaddedConv2d, set_geometry
from segmodels.engine.losses import SegmentationLoss
from segmodels.summary import summarise

NARROW = {
    "fcn32s_vgg16": {}, "fcn16s_vgg16": {}, "fcn8s_vgg16": {}, "fcn32s_alexnet": {}, "fcn32s_googlenet": {},
    "frontend_vgg16": {}, "dilation7_vgg16": {}, "dilation8_vgg16": {}, "dilation10_vgg16": {},
    "deeplabv1_vgg16": {}, "deeplabv2_vgg16": {"fc_channels": 16, "scales": (1, 0.75, 0.5)},
    "deeplabv2_resnet50": {"scales": (1, 0.5)}, "attentiontoscale_vgg16": {"attention_channels": 8},
}
#: The same systems on a backbone that aligns its maps with the image, and brings neither fc6 nor fc7.
LIGHT = {
    "fcn32s_mobilenetv2": {}, "fcn8s_mobilenetv2": {}, "frontend_mobilenetv2": {}, "dilation8_mobilenetv2": {"context": "basic"},
    "deeplabv1_mobilenetv2": {"fc_channels": 16}, "deeplabv2_mobilenetv2": {"scales": (1, 0.5)},
    "attentiontoscale_mobilenetv2": {"attention_channels": 8, "fc_channels": 16},
}  # fmt: skip


def narrow(name: str, num_classes: int = 5, **options) -> nn.Module:
    torch.manual_seed(0)
    width = {"width_mult": 0.25} if name in LIGHT else {"width_mult": 1 / 16}
    return create_model(name, num_classes, **{**width, **(NARROW | LIGHT)[name], **options})


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("fcn32s_vgg16", {}, 134_346_581),
        ("fcn16s_vgg16", {}, 134_357_354),
        ("fcn8s_vgg16", {}, 134_362_751),
        ("fcn32s_alexnet", {}, 56_954_261),
        ("fcn32s_googlenet", {}, 5_973_552 + 1024 * 21 + 21),  # Caffe's network without its classifier; the paper says 6M
        ("frontend_vgg16", {}, 134_346_581),
        ("dilation8_vgg16", {"context": "basic"}, 134_346_581 + 28_392),
        ("dilation8_vgg16", {"context": "large"}, 134_346_581 + 6_803_139),
        ("deeplabv1_vgg16", {}, 20_505_429),
        ("deeplabv1_vgg16", {"fc6": "4x4"}, 65_140_565),
        ("deeplabv2_vgg16", {}, 37_877_652),
        ("deeplabv2_vgg16", {"rates": "largefov"}, 20_505_429),
        ("deeplabv2_resnet101", {}, 44_048_532),
    ],
)
def test_parameters_with_21_classes(name, options, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, 21, **options).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "num_classes", "context"),
    [("dilation8_vgg16", 11, 7_832), ("dilation7_vgg16", 11, 6_732), ("dilation10_vgg16", 19, 29_792)],
)
def test_parameters_of_the_other_context_modules(name, num_classes, context):
    with torch.device("meta"):
        module = create_model(name, num_classes, **({"context": "basic"} if "8" in name else {})).classifier.context
    assert sum(p.numel() for p in module.parameters()) == context


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: VGG16(fc6="fcn", first_padding=100, width_mult=1 / 64), 404),
        (lambda: AlexNet(width_mult=1 / 16), 355),
        (lambda: GoogLeNet(width_mult=1 / 64, average_pool=True), 907),
    ],
    ids=["vgg16", "alexnet", "googlenet"],
)
def test_field_of_view_of_fcn_by_gradient(build, field):
    """FCN, table 1. Averages stand for the max pools, whose gradient would reach the largest pixel only."""
    backbone = build()
    for module in list(backbone.modules()):
        for name, child in list(module._modules.items()):  # named_children would leave out a second name
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode))
    with torch.no_grad():
        for parameter in backbone.parameters():  # positive: nothing cancels, no ReLU closes
            parameter.fill_(1 / parameter[0].numel() if parameter.dim() > 1 else 0.0)
    x = torch.ones(1, 3, field + 64, field + 64, dtype=torch.float64, requires_grad=True)
    out = backbone.double().eval()(x)["out"]
    middle = out.shape[2] // 2
    (gradient,) = torch.autograd.grad(out[0, :, middle, middle].sum(), x)
    rows, columns = gradient[0, 0].nonzero().unbind(1)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (field, field)
    # The centre that the crop offsets are made of is the middle of this field.
    center = backbone.centers()["out"] + 32 * middle
    assert (rows.max() + rows.min()).item() / 2 == center


@pytest.mark.parametrize("name", NARROW | LIGHT)
def test_any_size(name):
    model = narrow(name).eval()
    for size in ((1, 1), (1, 37), (46, 33)):
        with torch.no_grad():
            out = model(torch.randn(1, 3, *size))
        assert list(out) == ["out"]
        assert out["out"].shape == (1, 5, *size)
        assert torch.isfinite(out["out"]).all()


@pytest.mark.parametrize("name", NARROW | LIGHT)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_training_step(name, autocast):
    """Every parameter gets a finite gradient, and steps along it reduce the loss of the batch, which may be one image."""
    model = narrow(name)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, VGG16, AlexNet)):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
        if isinstance(module, nn.BatchNorm2d):  # of one image, statistics of a few values would change with every step
            module.eval()
    for module in model.modules():
        if type(module).__name__ == "SkipScores":  # they start from zero, which stops the gradient
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.Adam(parameters.values(), lr=3e-4)
    loss_of = SegmentationLoss(align_corners=model.align_corners)
    x, target = torch.randn(1, 3, 41, 33), torch.randint(0, 2, (1, 41, 33))  # of five classes: three to unlearn
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model.logits(x), target)
        loss.backward()
        assert [n for n, p in parameters.items() if p.grad is None or not torch.isfinite(p.grad).all()] == []
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fcn8s_vgg16", {"geometric_classes": 3}),
        ("fcn32s_alexnet", {}),
        ("fcn32s_googlenet", {}),
        ("dilation8_vgg16", {}),
        ("dilation10_vgg16", {"tile": (3, 3)}),
        ("deeplabv1_vgg16", {"msc": True, "branch_channels": 8}),
        ("deeplabv2_vgg16", {}),
        ("attentiontoscale_vgg16", {}),
        ("fcn8s_mobilenetv2", {}),
        ("dilation8_mobilenetv2", {}),
        ("deeplabv2_resnet50", {}),
    ],
)
def test_compile_and_export(name, options):
    torch._dynamo.reset()
    model = narrow(name, **options).eval()
    x = torch.randn(1, 3, 33, 41)
    with torch.no_grad():
        expected = model(x)["out"]
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)["out"]
        exported = torch.export.export(model, (x,)).module()(x)["out"]
    # The same operations, on strides that may differ: float32 rounding.
    for actual in (compiled, exported):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fcn32s_vgg16", {"output_stride": 8}, "output_stride=8: FCN32s has 32, and no other"),
        ("deeplabv1_vgg16", {"output_stride": 16}, "output_stride=16: DeepLabV1 has 8, and no other"),
        ("fcn32s_alexnet", {"output_stride": 16}, "output_stride=16: expected one of 32"),
        ("fcn8s_vgg16", {"aux_loss": True}, "FCN8s has no auxiliary head"),
        ("fcn8s_alexnet", {}, "unknown model 'fcn8s_alexnet'"),
        ("deeplabv1_vgg16", {"fc6": "5x5"}, "fc6='5x5': expected None or one of fcn"),
        ("deeplabv1_vgg16", {"pool": 4}, "pool=4: expected 2 or 3"),
        ("dilation8_vgg16", {"context": "huge"}, "context='huge': expected 'basic' or 'large'"),
        ("deeplabv2_vgg16", {"rates": "aspp"}, "rates='aspp': expected one of largefov, aspp-s, aspp-l"),
        ("deeplabv2_vgg16", {"rates": (6, 0)}, r"rates=\(6, 0\): expected positive integers"),
        ("deeplabv2_vgg16", {"scales": (0.5, 1)}, r"scales=\(0.5, 1\): expected 1 first"),
        ("attentiontoscale_vgg16", {"fusion": "sum"}, "fusion='sum': expected one of attention, average, max"),
        ("fcn32s_googlenet", {"form": "v4"}, "form='v4': expected one of caffe, torchvision"),
        ("fcn8s_mobilenetv2", {"learn_upsampling": True}, "learn_upsampling=True: expected vgg16"),
        ("deeplabv1_mobilenetv2", {"msc": True}, "msc=True: expected vgg16, whose pools it scores, not MobileNetV2"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_model(name, 5, **options)


def test_on_a_light_backbone_maps_lie_where_the_image_says():
    """Value ``i`` of a map is row ``stride * i`` of the image, at whatever stride the scores were added up."""
    model = narrow("fcn8s_mobilenetv2").eval()
    sizes = {"out": 3, "pool4": 5, "pool3": 9}
    scores = [torch.zeros(1, 1, n, n) for n in sizes.values()]
    for index, stride in enumerate((32, 16, 8)):
        ramps = [s.clone() for s in scores]
        ramps[index] += stride * torch.arange(scores[index].shape[2])[:, None]
        decoded = model.classifier["out"]["decoder"](ramps, torch.Size((65, 65)))
        assert decoded[0, 0, :, 7].equal(torch.arange(65.0))
    features = model.backbone(torch.randn(1, 3, 65, 65))
    assert {name: features[name].shape[2] for name in ("out", "aux", "mid")} == {"out": 3, "aux": 5, "mid": 9}


@pytest.mark.parametrize(("size", "row"), [(193, 0), (180, 19), (192, 31)])
def test_tensorflows_padding_places_a_map_by_the_parity_of_its_sizes(size, row):
    """docs/kernels.md: five strides on an image of ``size`` rows; each convolution picks the centre of its window."""
    x = torch.arange(float(size))[:, None].expand(1, 1, size, size)
    for _ in range(5):
        layer = SamePaddedConv2d(1, 1, 3, bias=False)
        set_geometry(layer, 2, rate=1)
        with torch.no_grad():
            nn.init.dirac_(layer.weight)
            x = layer(x)
    assert x[0, 0, :, 0].equal(row + 32.0 * torch.arange(x.shape[2]))


def test_large_fov_behind_a_light_backbone():
    """The layers of VGG-16's fc6 and fc7: average, 3x3 at rate 12, 1x1; DeepLab v2's one branch of that rate has no average."""
    model = narrow("deeplabv1_mobilenetv2").eval()
    x = torch.randn(1, 3, 65, 41)
    with torch.no_grad():
        features = model.backbone(x)["out"]
        assert features.shape[2:] == (9, 6)
        (_, fc6, _, _, fc7, _, _), fc8 = model.classifier["fc7"], model.classifier["fc8"]
        hidden = F.conv2d(F.avg_pool2d(features, 3, 1, 1), fc6.weight, fc6.bias, padding=12, dilation=12).relu()
        expected = F.conv2d(F.conv2d(hidden, fc7.weight, fc7.bias).relu(), fc8.weight, fc8.bias)
        torch.testing.assert_close(model.logits(x)["out"], expected, rtol=1e-4, atol=1e-6)  # sums in another order


def test_one_value_per_channel_in_training_says_what_to_do():
    for name in ("fcn32s_mobilenetv2", "frontend_mobilenetv2", "deeplabv1_mobilenetv2", "attentiontoscale_mobilenetv2"):
        with pytest.raises(ValueError, match="its map has one value per channel"):
            narrow(name)(torch.randn(1, 3, 7, 7))
    # Four values per channel at the full scale, one at three quarters.
    with pytest.raises(ValueError, match="one image of 7 x 7 pixels"):
        narrow("attentiontoscale_mobilenetv2")(torch.randn(1, 3, 9, 9))


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"\[1, 3, 8, 8\]: expected 6 channels in dimension 1, not 3"):
        narrow("fcn32s_vgg16", late_fusion=True)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="expected 3 channels"):
        narrow("deeplabv2_vgg16")(torch.zeros(1, 4, 8, 8))


def test_losses_of_scales_are_added():
    """DeepLab v2: four unweighted losses."""
    target = torch.randint(0, 5, (1, 9, 9))
    out = {name: torch.randn(1, 5, 9, 9) for name in ("out", "scale1", "scale0.75", "scale0.5")}
    expected = sum(F.cross_entropy(logits, target) for logits in out.values())
    torch.testing.assert_close(SegmentationLoss()(out, target), expected)


def test_table_counts_containers_that_are_not_called_and_every_scale():
    front, seven, largefov, attention = (
        summarise(name, size=(65, 65), num_classes=11)
        for name in ("frontend_vgg16", "dilation7_vgg16", "deeplabv1_vgg16", "attentiontoscale_vgg16")
    )
    assert seven.dense_flops - front.dense_flops == 2 * 9 * 9 * (6 * 9 * 11 * 11 + 11 * 11)
    assert seven.receptive_field - front.receptive_field == 8 * 2 * (1 + 1 + 2 + 4 + 8 + 1)
    body = largefov.dense_flops
    # Scales 0.75 and 0.5 have maps of about (7 / 9)^2 and (5 / 9)^2 the size; the attention network comes on top.
    assert 1.7 * body < attention.dense_flops - 2 * 81 * 9 * 3072 * 512 < 2.1 * body
