"""Every name of the registry: the smallest images, a step of training in both precisions, a batch of one.

Narrow networks. That the losses fall, compiled graphs and exports are tested per system and per backbone in the files beside;
with EVERY_MODEL=1 in the environment, graphs and exports of every name here.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from segmodels import create_model, list_models
from segmodels.engine.losses import SegmentationLoss

WIDTHS = {"mobilenetv2": {"width_mult": 0.25}, "xception65": {"width_mult": 1 / 16, "middle_repeats": 1}}
HEADS = {
    "fcn": {}, "deeplabv1": {"fc_channels": 8}, "deeplabv2": {"fc_channels": 8},
    "attentiontoscale": {"fc_channels": 8, "attention_channels": 8},
    **{key: {"head_channels": 8} for key in ("deeplabv3", "deeplabv3plus", "pspnet", "deeplabdt")},
}  # fmt: skip


def narrow(name: str) -> nn.Module:
    torch.manual_seed(0)
    system, _, backbone = name.partition("_")
    width = {} if backbone.startswith("efficientnet") else WIDTHS.get(backbone, {"width_mult": 1 / 16})
    return create_model(name, 3, **width, **HEADS.get(system, {}))


@pytest.mark.parametrize("name", list_models())
def test_sizes_steps_and_a_batch_of_one(name: str) -> None:
    model = narrow(name).eval()
    with torch.no_grad():
        for size in ((1, 1), (3, 10)):
            out = model(torch.randn(1, 3, *size))["out"]
            assert out.shape == (1, 3, *size)
            assert torch.isfinite(out).all()
    model.train()
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    loss_of = SegmentationLoss(align_corners=model.align_corners)
    x, target = torch.randn(2, 3, 33, 35), torch.randint(0, 3, (2, 33, 35))
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            loss = loss_of(model.logits(x), target)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        wrong = [key for key, grad in zip(parameters, gradients, strict=True) if not torch.isfinite(grad).all()]
        assert wrong == [], precision
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= 1e-4 * gradient
    try:
        assert torch.isfinite(model(x[:1])["out"]).all()
    except ValueError as error:  # one image and a pooling over the whole of it: BatchNorm has no statistics
        assert "batch of 1" in str(error) or "one image" in str(error)  # noqa: PT017


@pytest.mark.skipif("EVERY_MODEL" not in os.environ, reason="minutes; set EVERY_MODEL=1. CI has every system and backbone once")
@pytest.mark.parametrize("name", list_models())
def test_compiles_whole_and_exports(name: str) -> None:
    torch._dynamo.reset()
    model = narrow(name).eval()
    x = torch.randn(1, 3, 33, 41)
    with torch.no_grad():
        expected = model(x)["out"]
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)["out"]
        exported = torch.export.export(model, (x,), strict=False).module()(x)["out"]
    # The same operations, on strides that may differ: float32 rounding.
    for actual in (compiled, exported):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + 1e-12)
