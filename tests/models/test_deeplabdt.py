"""DeepLab with EdgeNet and domain transform."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import atrous_kernels as ak
from segmodels import create_model
from segmodels.heads.edge_net import EdgeNet


def _tiny(**options):
    torch.manual_seed(0)
    return create_model("deeplabdt_mobilenetv2", num_classes=3, width_mult=0.25, head_channels=8, **options)


def test_edge_net_is_a_convolution_over_the_concatenation() -> None:
    levels, net = [torch.randn(2, 5, 9, 11), torch.randn(2, 7, 3, 4)], EdgeNet([5, 7])
    joined = torch.cat([F.interpolate(level, (33, 40), mode="bilinear") for level in levels], 1)
    expected = F.relu(F.conv2d(joined, net.predict.weight, net.predict.bias))
    torch.testing.assert_close(net(levels, torch.Size((33, 40))), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="zip"):
        net(levels[:1], torch.Size((33, 40)))


@pytest.mark.parametrize("size", [(1, 1), (33, 47)])
def test_logits_are_filtered_scores(size: tuple[int, int]) -> None:
    model = _tiny(sigma_s=20, edge_levels=("low", "aux", "out")).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = model.backbone(x)
        scores = F.interpolate(model.classifier(features["out"]), size, mode="bilinear")
        edges = model.edges(x)
        assert edges.shape == (2, 1, *size)
        logits = model.logits(x)["out"]
        torch.testing.assert_close(logits, ak.domain_transform(scores, edges, 20.0, 1.0), rtol=0, atol=0)
        assert model(x)["out"].equal(logits)


def test_the_edges_are_trained_by_the_loss_on_the_classes() -> None:
    model = _tiny(sigma_s=20, aux_loss=True, dropout=0.0)
    labels = torch.zeros(2, 48, 48, dtype=torch.int64)
    labels[:, 11:37, 13:41] = 1
    x = labels[:, None] * 2.0 + 0.1 * torch.randn(2, 3, 48, 48)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before, losses = model.edge_net.predict.weight.detach().clone(), []
    for _ in range(25):
        optimizer.zero_grad()
        out = model.logits(x)
        assert list(out) == ["out", "aux"]
        loss = ak.upsample_cross_entropy(out["out"], labels) + 0.4 * ak.upsample_cross_entropy(out["aux"], labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.edge_net.predict.weight, before)


def test_exports_and_strides() -> None:
    model = _tiny().eval()
    x = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        expected = model(x)["out"]
        exported = torch.export.export(model, (x,), strict=False).module()(x)["out"]
        torch.testing.assert_close(exported, expected)
        torch._dynamo.reset()
        assert torch.compile(model, backend="eager", fullgraph=True)(x)["out"].equal(expected)
        model.set_output_stride(16)
        assert model(x)["out"].shape == expected.shape


def test_mistakes_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"edge_levels=\['middle'\]: expected one or more of low, mid, aux, out"):
        _tiny(edge_levels=["middle"])
    with pytest.raises(ValueError, match=r"sigma_s=0, sigma_r=1\.0, iterations=3: expected numbers above 0"):
        _tiny(sigma_s=0)
