"""ASPP and the heads built on it."""

from __future__ import annotations

import pytest
import torch

from segmodels.heads.aspp import ASPP, DeepLabHead


def rates_of(aspp: ASPP) -> list[int]:
    return [branch[0].dilation[0] for branch in aspp.convs if getattr(branch[0], "kernel_size", None) == (3, 3)]


@pytest.mark.parametrize(("output_stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])])
@pytest.mark.parametrize("separable", [False, True])
def test_rates_follow_the_output_stride(output_stride, rates, separable):
    aspp = ASPP(8, 4, separable=separable)
    aspp.set_output_stride(output_stride)
    assert rates_of(aspp) == rates
    assert aspp.eval()(torch.randn(1, 8, 5, 7)).shape == (1, 4, 5, 7)


def test_branches_are_the_papers():
    """1x1, 3x3 per rate, image pooling, in the order of torchvision; concatenated and projected."""
    torch.manual_seed(0)
    aspp = ASPP(8, 4, dropout=0.0).eval()
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        branches = [branch(x) for branch in aspp.convs]
        # The same products, summed branch by branch: fp32 sums of 20 terms in another order.
        torch.testing.assert_close(aspp(x), aspp.project(torch.cat(branches, dim=1)), rtol=1e-5, atol=1e-6)
    assert [tuple(branch.shape) for branch in branches] == [(2, 4, 9, 9)] * 5
    pooled = branches[-1]
    assert pooled.equal(pooled[:, :, :1, :1].expand_as(pooled))
    assert not pooled[0].equal(pooled[1])


def test_without_rates_nothing_looks_around():
    """``rates=()`` without image pooling is a 1x1 network: one changed input pixel changes one output pixel."""
    aspp = ASPP(8, 4, rates=(), image_pooling=False).eval()
    assert len(aspp.convs) == 1
    x = torch.randn(1, 8, 9, 9)
    y = x.clone()
    y[:, :, 4, 5] += 1
    with torch.no_grad():
        changed = (aspp(x) != aspp(y)).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[4, 5]]


def test_receptive_field_of_one_rate():
    aspp = ASPP(8, 4, rates=(3,), image_pooling=False).eval()
    x = torch.randn(1, 8, 9, 9)
    y = x.clone()
    y[:, :, 4, 4] += 10
    with torch.no_grad():
        changed = (aspp(x) != aspp(y)).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[i, j] for i in (1, 4, 7) for j in (1, 4, 7)]


def test_separable_branch_is_depthwise_then_pointwise():
    branch = ASPP(8, 4, separable=True).convs[1]
    depthwise, pointwise = branch[0], branch[3]
    assert (depthwise.groups, depthwise.weight.shape) == (8, (8, 1, 3, 3))
    assert pointwise.weight.shape == (4, 8, 1, 1)


def test_one_image_in_training_says_what_to_do():
    aspp = ASPP(8, 4)
    x = torch.randn(1, 8, 9, 9)
    with pytest.raises(ValueError, match=r"batch of 1.*at least 2.*image_pooling=False"):
        aspp(x)
    assert torch.isfinite(aspp(x.expand(2, -1, -1, -1))).all()
    assert torch.isfinite(ASPP(8, 4, image_pooling=False)(x)).all()
    for module in aspp.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert torch.isfinite(aspp(x)).all()


@pytest.mark.parametrize("rates", [(0,), (6, -1), (1.5,)])
def test_bad_rates(rates):
    with pytest.raises(ValueError, match="expected positive integers"):
        ASPP(8, 4, rates)


def test_head_keys_are_torchvisions():
    heads = {flag: DeepLabHead(8, 3, channels=4, head_conv=flag) for flag in (True, False)}
    keys = {key for key in heads[True].state_dict() if not key.startswith("0.")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert keys == {"1.weight", "4.weight", "4.bias"} | {f"2.{name}" for name in norm}
    assert {key for key in heads[False].state_dict() if not key.startswith("0.")} == {"1.weight", "1.bias"}
