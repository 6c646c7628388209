"""The variants of the papers: cascade and Multi_Grid of DeepLabv3, Xception, valid taps; receptive fields, table of models."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from atrous_kernels.problem import ConvProblem
from segmodels import create_model
from segmodels.backbones import BACKBONES
from segmodels.models import __main__ as models_command
from segmodels.summary import summarise


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_a_cascaded_stage_has_the_published_size():
    with torch.device("meta"):
        counts = [parameters(BACKBONES["resnet50"](cascade=n)) for n in range(4)]
    assert [b - a for a, b in pairwise(counts)] == [13_387_776] * 3


def test_cascade_and_multi_grid_have_the_papers_rates():
    """Section 3.2: block4 to block7 at output stride 16 have base rates 2, 4, 8, 16, times Multi_Grid."""
    with torch.device("meta"):
        model = create_model(
            "deeplabv3_resnet50", aspp=False, cascade=3, multi_grid=(1, 2, 1), stride_placement="last", output_stride=16
        )
    resnet = model.backbone
    for layer, base in ((resnet.layer4, 2), (resnet.layer5, 4), (resnet.layer6, 8), (resnet.layer7, 16)):
        assert [block.conv2.dilation[0] for block in layer] == [base, 2 * base, base]
    # Their strides stand at the end of blocks 1 to 3, one of them removed.
    assert [stage[-1].conv2.stride[0] for stage in (resnet.layer1, resnet.layer2, resnet.layer3)] == [2, 2, 1]
    model.set_output_stride(256)
    assert [stage[-1].conv2.stride[0] for stage in resnet._stages] == [2, 2, 2, 2, 2, 2, 1]
    assert {block.conv2.dilation[0] for stage in resnet._stages for block in stage} == {1, 2}  # Multi_Grid alone


@pytest.mark.parametrize("stride_placement", ["3x3", "last"])
def test_every_output_stride_of_table_1(stride_placement):
    torch.manual_seed(0)
    model = create_model(
        "deeplabv3_resnet50", 5, aspp=False, cascade=3, width_mult=1 / 16, stride_placement=stride_placement
    ).eval()
    x = torch.randn(1, 3, 257, 130)
    with torch.no_grad():
        for output_stride in (256, 128, 64, 32, 16, 8, 4):
            model.set_output_stride(output_stride)
            assert model.logits(x)["out"].shape == (1, 5, 256 // output_stride + 1, -(-130 // output_stride))
    with pytest.raises(ValueError, match="output_stride=512: expected one of 4, 8, 16, 32, 64, 128, 256"):
        model.set_output_stride(512)


def test_xception65():
    with torch.device("meta"):
        model = create_model("deeplabv3plus_xception65")
    running = sum(buffer.numel() for name, buffer in model.named_buffers() if "running" in name)
    # the total, with BatchNorm's statistics, of the widely used port of the authors' VOC network to Keras
    assert parameters(model) + running == 41_258_213
    assert model.backbone.channels == {"low": 256, "aux": 728, "out": 2048}
    rates = {8: (1, 2, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}
    for output_stride, expected in rates.items():
        model.set_output_stride(output_stride)
        backbone = model.backbone
        blocks = (backbone.entry["block3"], backbone.middle[7], backbone.exit["block1"], backbone.exit["block2"])
        assert tuple(block.convs[0][0].dilation[0] for block in blocks) == expected
    grid = BACKBONES["xception65"](16, multi_grid=(1, 2, 4), width_mult=0.1, middle_repeats=1).exit["block2"]
    assert [conv[0].dilation[0] for conv in grid.convs] == [2, 4, 8]


@pytest.mark.parametrize("rate", [1, 6, 12, 18, 24, 32, 33, 48, 64, 65, 96])
def test_valid_taps_of_figure_4(rate):
    """DeepLabv3, figure 4: a 3x3 filter on 65 x 65 features has 9, 4 to 6 or 1 valid weights; from rate 65 on it is a 1x1."""
    problem = ConvProblem(1, 1, 1, (65, 65), (3, 3), padding=(rate, rate), dilation=(rate, rate))
    counts: dict[int, int] = {}
    for rows, columns in problem.rectangles():
        taps = rows.taps * columns.taps
        counts[taps] = counts.get(taps, 0) + rows.size * columns.size
    along = [sum(0 <= i + t * rate < 65 for t in (-1, 0, 1)) for i in range(65)]
    expected: dict[int, int] = {}
    for a in along:
        for b in along:
            expected[a * b] = expected.get(a * b, 0) + 1
    assert {k: v for k, v in counts.items() if v} == expected
    assert expected.get(9, 0) == max(0, 65 - 2 * rate) ** 2
    assert (expected == {1: 65 * 65}) == (rate >= 65)
    assert problem.valid_flops == 2 * sum(taps * count for taps, count in expected.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fcn_mobilenetv2", {"output_stride": 16}),
        ("deeplabv3_mobilenetv2", {"rates": (2, 4), "image_pooling": False, "output_stride": 8}),
        ("deeplabv3plus_xception65", {"rates": (), "image_pooling": False, "middle_repeats": 1}),
    ],
)
def test_receptive_field_is_the_support_of_the_gradient(name, options):
    """No max pooling, whose gradient has holes; positive weights, so that nothing cancels and no ReLU closes."""
    size = 801
    small = {"width_mult": 0.05, "width_divisor": 1} if "mobilenet" in name else {"width_mult": 1 / 64}
    model = create_model(name, 1, **small, **options, **({} if "fcn" in name else {"head_channels": 2})).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        elif isinstance(module, torch.nn.ReLU6):
            module.forward = torch.relu  # saturated units would have no gradient
    # One row is enough: the kernels are square. Its height is one pixel at every stride.
    x = torch.full((1, 3, 1, size), 0.1, requires_grad=True)
    out = model.logits(x)["out"]
    out[0, 0, 0, out.shape[3] // 2].backward()
    seen = x.grad[0, 0, 0].nonzero()[:, 0]
    assert int(seen.min()) > 0
    assert int(seen.max()) < size - 1
    found = summarise(name, (513, 513), num_classes=1, **small, **options, **({} if "fcn" in name else {"head_channels": 2}))
    if "plus" not in name:  # interpolation may weigh a neighbour by zero
        assert int(seen.max() - seen.min()) + 1 == found.receptive_field
    else:
        assert 0 <= found.receptive_field - (int(seen.max() - seen.min()) + 1) <= 2 * 16
    assert not found.global_context


def test_summary_counts_what_the_paper_draws():
    """DeepLabv3's ASPP is one op and PSPNet's pooled half never meets the map; they are counted as the layers they stand for."""
    found = summarise("deeplabv3_resnet50", (65, 65), rates=(), image_pooling=False, head_conv=False, output_stride=8)
    body = summarise("deeplabv3_resnet50", (65, 65), aspp=False, output_stride=8)
    pixels = 9 * 9
    assert found.dense_flops - body.dense_flops == 2 * pixels * (2048 * 256 + 256 * 256 + 256 * 21 - 2048 * 21)
    head = summarise("pspnet_resnet50", (65, 65), stem="conv7")
    levels = 2 * 2048 * 512 * (1 + 4 + 9 + 36)
    assert head.dense_flops - body.dense_flops == levels + 2 * pixels * (4096 * 512 * 9 + 512 * 21 - 2048 * 21)
    assert head.global_context
    assert not body.global_context
    assert body.parameters == 23_508_032 + 2048 * 21 + 21
    assert 0 < body.valid_flops < body.dense_flops


def test_models_command(capsys):
    assert models_command.main(["deeplabv3_resnet18", "pspnet_mobile*", "--size", "65", "65", "--output-stride", "8"]) == 0
    out = capsys.readouterr().out
    assert "deeplabv3_resnet18" in out
    assert "pspnet_mobilenetv2" in out
    assert "Pyramid Scene Parsing Network" in out
    with pytest.raises(ValueError, match="no model matches unet"):
        models_command.main(["unet"])


@pytest.mark.parametrize(("kernel", "rate"), [(4, 1), (4, 2), (7, 1), (3, 3)])
def test_fields_of_view_behind_a_light_backbone_keep_the_map(kernel, rate):
    model = create_model("deeplabv1_resnet18", 5, width_mult=1 / 16, fc_channels=8, fc_kernel=kernel, fc_rate=rate).eval()
    x = torch.zeros(1, model.backbone.channels["out"], 20, 20)
    x[..., 10, 10] = 1
    seen = (model.classifier["fc7"](x) != model.classifier["fc7"](torch.zeros_like(x))).any(1)[0]
    assert seen.shape == (20, 20)
    reach = (kernel - 1) * rate + 1 + (2 if kernel == 3 else 0)  # LargeFOV averages 3 x 3 first
    rows = seen.any(1).nonzero()[:, 0]
    assert int(rows.max() - rows.min()) + 1 <= reach


def test_a_random_context_module_is_no_identity():
    scores = torch.rand(1, 5, 12, 12)
    passed = {}
    for identity in (True, False):
        torch.manual_seed(0)
        options = {"context": "basic", "noise": 0.0, "identity": identity, "width_mult": 1 / 16}
        context = create_model("dilation8_resnet18", 5, **options).classifier.context
        passed[identity] = torch.equal(context(scores), scores)
    assert passed == {True: True, False: False}
