"""PSPNet: the published size, and the head against its plain form."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from segmodels import create_model


def test_parameters_are_the_published_ones():
    # facts of the paper's code: 46,782,550 parameters for 150 classes, of which 123,776 are its deep stem, which this ResNet
    # does not have; the auxiliary head adds 2,398,358.
    with torch.device("meta"):
        plain, with_aux = (create_model("pspnet_resnet50", num_classes=150, aux_loss=aux) for aux in (False, True))
    count = [sum(p.numel() for p in model.parameters()) for model in (plain, with_aux)]
    assert count[1] - count[0] == 2_398_358
    assert count[0] == 46_782_550 - 123_776


def test_logits_are_those_of_the_plain_form():
    torch.manual_seed(0)
    model = create_model("pspnet_resnet18", num_classes=5, width_mult=0.25, head_channels=16).eval()
    x = torch.randn(2, 3, 65, 73)
    with torch.no_grad():
        features = model.backbone(x)["out"]
        head = model.classifier
        levels = [
            F.interpolate(level(features), features.shape[2:], mode="bilinear", align_corners=True)
            for level in head.ppm.features
        ]
        expected = head.cls(torch.cat([features, *levels], 1))
        # The same sums in another order.
        torch.testing.assert_close(model.logits(x)["out"], expected, rtol=1e-4, atol=1e-5)
    assert model.set_output_stride(16) is None
    assert model(x)["out"].shape == (2, 5, 65, 73)
