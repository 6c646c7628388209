"""Yu & Koltun: the front end's margins, the context module's fields of view, and its start as the identity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segmodels import create_model
from segmodels.heads.context import LARGE_WIDTHS, ContextModule
from segmodels.models.dilation import MARGIN, reflected


def narrow(name: str, num_classes: int = 3, **options):
    torch.manual_seed(0)
    return create_model(name, num_classes, width_mult=1 / 64, **options).eval()


def test_front_end_consumes_the_margin():
    """``out = (in - 372) / 8``; the deploy inputs of the authors give whole maps."""
    backbone = narrow("frontend_vgg16").backbone
    with torch.no_grad():
        for side in (380, 500):
            assert backbone(torch.zeros(1, 3, side, 372 + 16))["out"].shape[2:] == ((side - 2 * MARGIN) // 8, 2)
    assert [(side - 2 * MARGIN) / 8 for side in (900, 1100, 852, 1396)] == [66, 91, 60, 128]
    # Score i is centred between the pixels 8 i + 3 and 8 i + 4 of the image.
    assert backbone.centers()["out"] - MARGIN == 3.5
    assert all(layer.padding == (0, 0) for layer in backbone.modules() if isinstance(layer, torch.nn.Conv2d))
    assert sum(isinstance(layer, torch.nn.MaxPool2d) for layer in backbone.modules()) == 3


@pytest.mark.parametrize("size", [1, 2, 5, 187, 300])
def test_reflection(size):
    expected = np.pad(np.arange(size), (MARGIN, MARGIN + 3), mode="reflect")
    assert reflected(size, MARGIN, MARGIN + 3, torch.device("cpu")).tolist() == expected.tolist()


def test_scores_are_those_of_the_reflected_image():
    model = narrow("frontend_vgg16")
    x = torch.randn(1, 3, 200, 192)
    with torch.no_grad():
        expected = model.classifier(model.backbone(F.pad(x, [MARGIN] * 4, mode="reflect"))["out"])
        assert model.scores(x).equal(expected)
        assert expected.shape[2:] == (25, 24)
        # The authors' upsampling: row p of the image is at row p / 8 of the scores.
        out = model(x)["out"]
        torch.testing.assert_close(out[:, :, ::8, ::8], expected, rtol=1e-5, atol=1e-7)
        between = (expected[:, :, :12] + expected[:, :, 1:13]) / 2
        torch.testing.assert_close(out[:, :, 4:100:8, ::8], between, rtol=1e-4, atol=1e-7)
        assert out[:, :, -8:, :8:8].unique().numel() == 3  # beyond the last score: the last score


def test_tiles_are_what_the_context_module_sees():
    model = narrow("dilation8_vgg16", noise=0.3, tile=(2, 3))
    x = torch.randn(1, 3, 25, 33)
    with torch.no_grad():
        scores = model.scores(x)
        assert scores.shape[2:] == (4, 6)  # whole tiles of the reflected image
        model.tile = None
        front = narrow("frontend_vgg16")
        front.load_state_dict({k: v for k, v in model.state_dict().items() if ".context." not in k})
        for dim, after in ((2, MARGIN + 7), (3, MARGIN + 15)):
            x = x.index_select(dim, reflected(x.shape[dim], MARGIN, after, x.device))
        maps = front.classifier(front.backbone(x)["out"])
        torch.testing.assert_close(scores[:, :, 2:, :3], model.classifier.context(maps[:, :, 2:, :3]))
    with pytest.raises(ValueError, match=r"tile=\(2,\): expected two positive integers"):
        narrow("dilation8_vgg16", tile=(2,))


def test_dilation10_upsamples_with_its_transposed_convolution():
    model = narrow("dilation10_vgg16")
    scores = torch.randn(1, 3, 4, 5)
    weight = torch.zeros(3, 1, 16, 16)
    tent = 1 - (torch.arange(16) - 7.5).abs() / 8
    weight[:] = tent[:, None] * tent
    expected = F.conv_transpose2d(scores, weight, stride=8, padding=4, groups=3)
    torch.testing.assert_close(model._upsample(scores, torch.Size((32, 40))), expected)


@pytest.mark.parametrize("large", [False, True], ids=["basic", "large"])
def test_fields_of_view_of_table_1(large):
    context = ContextModule(2, widths=LARGE_WIDTHS if large else None)
    assert [layer.out_channels for layer in context.layers] == [2 * width for width in (LARGE_WIDTHS if large else [1] * 7)]
    x = torch.ones(1, 2, 81, 81, dtype=torch.float64, requires_grad=True)
    y, fields = x, []
    for layer in [*context.layers, context.final]:
        torch.nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
        y = layer.double()(y)
        (gradient,) = torch.autograd.grad(y[0, 0, 40, 40], x, retain_graph=True)
        rows, columns = gradient[0, 0].nonzero().unbind(1)
        fields.append(int(rows.max() - rows.min() + 1))
        assert columns.max() - columns.min() + 1 == fields[-1]
    assert fields == [3, 5, 9, 17, 33, 65, 67, 67]


@pytest.mark.parametrize(
    "module",
    [
        ContextModule(5, noise=0),
        ContextModule(5, widths=LARGE_WIDTHS, noise=0),
        ContextModule(5, widths=LARGE_WIDTHS, pad_first=True, noise=0),
        ContextModule(5, (1, 1, 2, 4, 8, 1), noise=0),
        ContextModule(5, (1, 1, 2, 4, 8, 16, 32, 64, 1), noise=0),
    ],
    ids=["basic", "large", "large-pad-first", "7", "10"],
)
def test_context_starts_as_the_identity(module):
    # Small integers: shares of 1 / 64 add up without rounding. float64: Winograd's transforms would round.
    x = torch.randint(0, 100, (2, 5, 9, 7)).double()
    with torch.no_grad():
        assert module.double()(x).equal(x)


def test_noise_beside_the_identity():
    torch.manual_seed(0)
    module = ContextModule(21)
    weight = module.layers[0].weight
    assert weight[range(21), range(21), 1, 1].eq(1).all()
    assert 0.009 < weight[:, :, 0].std() < 0.011
    with pytest.raises(ValueError, match="expected one for each of the dilations"):
        ContextModule(21, (1, 2), widths=(1,))


def test_zeros_around_the_first_layer_are_not_those_of_every_layer():
    """VOC's large module pads once; inside, both compute the same."""
    torch.manual_seed(0)
    every, once = (ContextModule(2, pad_first=first, noise=0.1).double() for first in (False, True))
    once.load_state_dict(every.state_dict())
    x = torch.rand(1, 2, 81, 81, dtype=torch.float64)
    with torch.no_grad():
        a, b = every(x), once(x)
    assert a.shape == b.shape == x.shape
    torch.testing.assert_close(a[:, :, 33:-33, 33:-33], b[:, :, 33:-33, 33:-33])
    assert not torch.allclose(a, b)
