"""Whole models: outputs, inputs, training steps, compile and export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

from segmodels import create_model

SYSTEMS = ("deeplabv3", "deeplabv3plus", "fcn", "pspnet")
TINY = {
    "mobilenetv2": {"width_mult": 0.25},
    "efficientnet_lite0": {},
    "resnet18": {"width_mult": 0.25},
    "resnet50": {"width_mult": 0.125},
    "xception65": {"width_mult": 0.125, "middle_repeats": 1},
}
PUBLISHED_BACKBONES = ("mobilenetv2", "efficientnet_lite0", "resnet18")


def tiny(system: str, backbone: str = "mobilenetv2", **options):
    torch.manual_seed(0)
    head = {} if system == "fcn" else {"head_channels": 8}
    return create_model(system, backbone=backbone, num_classes=5, **{**TINY[backbone], **head, **options})


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (33, 47), (64, 64)])
def test_any_size_in_eval(system, size):
    model = tiny(system).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        for output_stride in (8, 16, 32):
            model.set_output_stride(output_stride)
            assert model.output_stride == output_stride
            out = model(x)
            assert list(out) == ["out"]
            assert out["out"].shape == (1, 5, *size)
            assert torch.isfinite(out["out"]).all()


@pytest.mark.parametrize(("system", "stride"), [("deeplabv3", 16), ("deeplabv3plus", 4), ("fcn", 8), ("pspnet", 8)])
def test_forward_is_logits_upsampled(system, stride):
    model = tiny(system).eval()
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        logits = model.logits(x)["out"]
        assert logits.shape == (2, 5, 64 // stride + 1, 96 // stride + 1)
        expected = F.interpolate(logits, size=(65, 97), mode="bilinear", align_corners=system == "pspnet")
        assert model(x)["out"].equal(expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_output_stride_of_a_built_model_is_that_of_a_new_one(system):
    changed = tiny(system, output_stride=32).eval()
    built = tiny(system, output_stride=8).eval()
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        coarse = changed(x)["out"]
        changed.set_output_stride(8)
        assert changed(x)["out"].equal(built(x)["out"])
        assert not coarse.equal(built(x)["out"])
    with pytest.raises(ValueError, match="output_stride=12: expected one of 4, 8, 16, 32"):
        changed.set_output_stride(12)
    with torch.no_grad():
        assert changed(x)["out"].equal(built(x)["out"])


def test_aux_only_in_training():
    model = tiny("deeplabv3", aux_loss=True)
    x = torch.randn(2, 3, 64, 64)
    out = model(x)
    assert {k: v.shape for k, v in out.items()} == {"out": (2, 5, 64, 64), "aux": (2, 5, 64, 64)}
    assert model.logits(x)["aux"].shape == (2, 5, 4, 4)
    assert list(model.eval()(x)) == ["out"]
    assert tiny("deeplabv3").aux_classifier is None


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 1, 8, 8), ValueError, r"\[1, 1, 8, 8\]: expected 3 channels"),
        (torch.zeros(3, 8, 8), ValueError, r"\[3, 8, 8\]: expected 4 dimensions"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"\[1, 3, 0, 8\]: expected at least 1 x 1"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, r"torch.uint8: expected normalised floating-point"),
        ([[1.0]], TypeError, "expected a tensor .* not list"),
    ],
)
def test_bad_inputs(system, x, error, message):
    with pytest.raises(error, match=message):
        tiny(system).eval()(x)


def test_empty_batch_in_eval():
    assert tiny("deeplabv3plus").eval()(torch.zeros(0, 3, 33, 33))["out"].shape == (0, 5, 33, 33)


def test_one_image_in_training_says_what_to_do():
    with pytest.raises(ValueError, match="batch of 1"):
        tiny("deeplabv3")(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="batch of 1"):
        tiny("pspnet")(torch.randn(1, 3, 64, 64))
    assert tiny("pspnet", bins=(2, 3))(torch.randn(1, 3, 64, 64))["out"].shape == (1, 5, 64, 64)
    assert tiny("deeplabv3", image_pooling=False)(torch.randn(1, 3, 64, 64))["out"].shape == (1, 5, 64, 64)


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_value_per_channel_in_training_says_what_to_do(system):
    model = tiny(system)
    with pytest.raises(ValueError, match=r"one image of 5 x 3 pixels: at output stride \d+ its map has one value"):
        model(torch.randn(1, 3, 5, 3))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert model(torch.randn(1, 3, 5, 3))["out"].shape == (1, 5, 5, 3)


def test_logits_at_coinciding_positions_do_not_depend_on_the_output_stride():
    """ASPP's rates follow the stride; 97 = 32 * 3 + 1 pixels. Image pooling averages another map, so it is left out."""
    model = tiny("deeplabv3", "resnet18", image_pooling=False, rates=(2, 4), head_conv=False).eval()
    x = torch.randn(1, 3, 97, 97)
    found = {}
    with torch.no_grad():
        for output_stride in (32, 16, 8):
            model.set_output_stride(output_stride)
            found[output_stride] = model.logits(x)["out"]
    for output_stride in (16, 8):
        step = 32 // output_stride
        # The same products summed in another order: float32 rounding, relative to the largest value.
        torch.testing.assert_close(
            found[output_stride][..., ::step, ::step], found[32], rtol=0, atol=1e-5 * float(found[32].abs().max())
        )


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("backbone", TINY)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_training_step(system, backbone, autocast):
    """Every parameter gets a finite gradient, and steps along it reduce the loss of the batch."""
    model = tiny(system, backbone, aux_loss=True)
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, torch.nn.Dropout2d)):
            module.p = 0.0  # the loss must be the same function at every step
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x, target = torch.randn(2, 3, 48, 48), torch.randint(0, 5, (2, 48, 48))
    target[:, :4] = 255
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(x)
            loss = sum(F.cross_entropy(v.float(), target, ignore_index=255) for v in out.values())
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert missing == []
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


LAST = {"stride_placement": "last", "cascade": 1, "multi_grid": (1, 2, 1), "aspp": False}
COMPILED = [
    *((system, backbone, {}) for system in ("deeplabv3", "deeplabv3plus", "pspnet") for backbone in PUBLISHED_BACKBONES),
    ("fcn", "mobilenetv2", {}),
    ("pspnet", "resnet50", {"mode": "max", "reduction": False}),
    ("deeplabv3", "resnet50", LAST),
    ("deeplabv3plus", "xception65", {}),
]


@pytest.mark.parametrize(("system", "backbone", "options"), COMPILED)
def test_compile_without_graph_breaks(system, backbone, options):
    torch._dynamo.reset()
    model = tiny(system, backbone, **options).eval()
    x = torch.randn(1, 3, 48, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        # The same operations in the same order: the same bits.
        assert compiled(x)["out"].equal(model(x)["out"])


@pytest.mark.slow
def test_one_compiled_graph_serves_every_size():
    """Odd and even sizes: not even TensorFlow's padding may branch on the parity of a map."""
    torch._dynamo.reset()
    model = tiny("deeplabv3plus", "efficientnet_lite0").eval()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((65, 97), (64, 98)):
            x = torch.randn(2, 3, *size)
            assert compiled(x)["out"].equal(model(x)["out"])
    assert graphs.frame_count == 1


ANY_BATCH = {0: Dim("batch", max=64)}
ANY_SIZE = {**ANY_BATCH, 2: Dim("height", min=33, max=2048), 3: Dim("width", min=33, max=2048)}


@pytest.mark.parametrize(
    ("system", "backbone", "dynamic", "options"),
    [
        ("deeplabv3", "resnet18", ANY_BATCH, {}),
        ("deeplabv3", "mobilenetv2", ANY_BATCH, {}),
        ("deeplabv3plus", "mobilenetv2", ANY_BATCH, {}),
        ("deeplabv3plus", "efficientnet_lite0", ANY_BATCH, {}),
        ("pspnet", "resnet18", ANY_BATCH, {}),
        ("fcn", "mobilenetv2", ANY_BATCH, {}),
        ("deeplabv3", "resnet50", ANY_BATCH, LAST),
        ("deeplabv3plus", "xception65", ANY_BATCH, {}),
        ("deeplabv3plus", "resnet18", ANY_SIZE, {}),
        pytest.param("deeplabv3", "efficientnet_lite0", ANY_SIZE, {}, marks=pytest.mark.slow),
    ],
)
def test_export(system, backbone, dynamic, options):
    model = tiny(system, backbone, **options).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 65, 97),), dynamic_shapes=(dynamic,))
    x = torch.randn(3, 3, *((48, 64) if 2 in dynamic else (65, 97)))
    with torch.no_grad():
        expected = model(x)["out"]
        # The same operations; the exported graph may be given other strides, and with them other orders of summation.
        torch.testing.assert_close(
            program.module()(x)["out"], expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
