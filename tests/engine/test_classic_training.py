"""The commands with a system before DeepLabv3: several losses, one output stride, attention maps as pictures."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import SETTINGS, write_camvid
from torch import nn

from segmodels import predict, train
from segmodels.engine.inference import Predictor
from segmodels.engine.losses import SegmentationLoss


def test_attention_to_scale_trains_and_draws_its_maps(tmp_path) -> None:
    camvid = write_camvid(tmp_path / "camvid")
    settings = [setting for setting in SETTINGS if not setting.startswith("model.")]
    settings += [
        "model.name=attentiontoscale_vgg16", "model.output_stride=8", "model.options.width_mult=0.0625",
        "model.options.attention_channels=8", "train.iterations=2", "train.warmup_iterations=0",
        "train.labels_at=scores", f"data.root={camvid}",
    ]  # fmt: skip
    assert train.main(["--work-dir", str(tmp_path / "run"), *settings]) == 0
    image = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), image)
    command = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--output", str(tmp_path / "out"), str(tmp_path / "image.png")]
    assert predict.main([*command, "--attention"]) == 0
    maps = [cv2.imread(str(tmp_path / "out" / f"image_attention_{s}.png"), cv2.IMREAD_UNCHANGED) for s in ("1", "0.75", "0.5")]
    assert [weights.shape for weights in maps] == [(20, 31)] * 3
    total = np.sum(maps, axis=0, dtype=int)
    assert abs(total - 255).max() <= 1  # each of the three is rounded
    for refine, settings in (("crf", "eval.crf=[5,20,60,3,3]"), ("dt", "eval.dt=[20,500]"), ("crf_rnn", "eval.flip=true")):
        assert predict.main([*command, settings, "--masks", "--refine", refine, "--scales", "0.5", "1.25"]) == 0
        mask = cv2.imread(str(tmp_path / "out" / "image_mask.png"), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (20, 31)
        assert mask.max() < 11
    with pytest.raises(ValueError, match="Conv2d has no attention maps"):
        Predictor(nn.Conv2d(3, 2, 1)).attention(image)


def test_loss_on_the_grid_of_the_scores() -> None:
    """DeepLab v1 and v2 shrink the labels: with 8 k + 1 pixels, every eighth label."""
    scores, labels = torch.randn(2, 3, 5, 3), torch.randint(0, 3, (2, 33, 17))
    labels[:, :9] = 255
    expected = F.cross_entropy(scores, labels[:, ::8, ::8], ignore_index=255)
    torch.testing.assert_close(SegmentationLoss(labels_at="scores")({"out": scores}, labels), expected)
    one = SegmentationLoss(labels_at="scores")({"out": scores[:, :, :1, :1]}, labels[:, 20:])
    torch.testing.assert_close(one, F.cross_entropy(scores[:, :, 0, 0], labels[:, 20, 0]))
