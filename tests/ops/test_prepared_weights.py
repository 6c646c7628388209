"""Weights kept in the form that a CPU kernel reads: never stale, gone with their tensor, bounded."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import atrous_kernels as ak
from atrous_kernels import native
from atrous_kernels.ops import prepared_weights

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))


@pytest.fixture(params=["cpu", "winograd"])
def layer(request: pytest.FixtureRequest) -> ak.nn.Conv2d:
    prepared_weights.forget()
    return ak.nn.Conv2d(160, 64, 3, padding=2, dilation=2, backend=request.param).eval()


def _right(layer: torch.nn.Conv2d, x: Tensor) -> bool:
    with torch.no_grad():
        truth = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), 1, 2, 2)
        return torch.allclose(layer(x).double(), truth, rtol=1e-4, atol=1e-4)


def test_a_weight_used_twice_is_kept_until_it_changes(layer: ak.nn.Conv2d) -> None:
    x = torch.randn(1, 160, 20, 20)
    assert _right(layer, x)
    assert prepared_weights.cached_bytes() == 0
    assert _right(layer, x)
    assert prepared_weights.cached_bytes() > 0
    for change in (
        lambda: layer.weight.data.mul_(3),  # passes the version counter by
        lambda: torch.nn.init.normal_(layer.weight),
        lambda: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
        lambda: setattr(layer.weight, "data", torch.randn(64, 160, 3, 3)),
        lambda: layer.weight.data.numpy().__setitem__((3, 2, 1, 0), 5.0),
    ):
        change()
        assert all(_right(layer, x) for _ in range(3))


def test_the_kept_weights_go_with_the_tensor_and_stay_out_of_copies() -> None:
    prepared_weights.forget()
    layer = ak.nn.Conv2d(160, 64, 3, padding=2, dilation=2, backend="winograd").eval()
    x = torch.randn(1, 160, 20, 20)
    assert all(_right(layer, x) for _ in range(2))
    twin = copy.deepcopy(layer)
    torch.nn.init.normal_(twin.weight)
    assert all(_right(twin, x) for _ in range(3))
    del layer, twin
    gc.collect()
    assert prepared_weights.cached_bytes() == 0


def test_training_keeps_nothing(layer: ak.nn.Conv2d) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(1, 160, 20, 20)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        assert prepared_weights.cached_bytes() == 0


def test_no_more_than_the_limit_is_kept(layer: ak.nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_weights, "CACHE_BYTES", 1000)
    assert all(_right(layer, torch.randn(1, 160, 20, 20)) for _ in range(3))
    assert prepared_weights.cached_bytes() == 0


def test_inference_tensors_are_cached_too() -> None:
    prepared_weights.forget()
    with torch.inference_mode():
        layer = ak.nn.Conv2d(160, 64, 3, padding=2, dilation=2, backend="winograd")
        x = torch.randn(1, 160, 20, 20)
        assert all(_right(layer, x) for _ in range(2))
        assert prepared_weights.cached_bytes() > 0
        layer.weight.mul_(2)
        assert _right(layer, x)
