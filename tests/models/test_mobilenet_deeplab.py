"""The DeepLabv3 on MobileNetV2 of DeepLab's authors: a fabricated file against a plain twin, the real one where it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from segmodels import create_model, evaluate, predict, train
from segmodels.data import create_dataset
from segmodels.engine.build import load_trained
from segmodels.readers import read_published

RECIPE = "deeplabv3_mobilenetv2_os16_voc-subset_513x513_published"
# expansion, width, repeats, stride
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def fabricated(width: float = 0.5, seed: int = 0, classes: int = 21) -> dict[str, Tensor]:
    """The file's keys and shapes, of any width: 110 tensors, every convolution with the bias of its folded BatchNorm."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(name: str, out: int, into: int, kernel: int = 1) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, kernel, kernel, generator=generator) / (into * kernel**2) ** 0.5
        state[f"{name}.bias"] = torch.randn(out, generator=generator) / 10

    channels = int(32 * width)
    add("backbone.features.0.0", channels, 3, 3)
    index = 1
    for expansion, stage_width, repeats, _ in STAGES:
        for _ in range(repeats):
            block, hidden = f"backbone.features.{index}.conv", channels * expansion
            if expansion > 1:
                add(f"{block}.0.0", hidden, channels)
            add(f"{block}.{int(expansion > 1)}.0", hidden, 1, 3)
            channels = int(stage_width * width)
            add(f"{block}.{1 + int(expansion > 1)}", channels, hidden)
            index += 1
    add("aspp.conv1x1", 256, channels)
    add("aspp.image_pool", 256, channels)
    add("aspp.project", 256, 512)
    add("classifier", classes, 256)
    return state


def twin(state: dict[str, Tensor], x: Tensor, output_stride: int) -> Tensor:
    """The published graph, written down again: TensorFlow's SAME zeros, folded BatchNorm, the head without atrous branches."""

    def conv(name: str, x: Tensor, stride: int = 1, rate: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        pad: list[int] = []
        for n in (x.shape[3], x.shape[2]):
            total = max((-(-n // stride) - 1) * stride + (weight.shape[-1] - 1) * rate + 1 - n, 0)
            pad += [total // 2, total - total // 2]
        groups = weight.shape[0] if weight.shape[1] == 1 and weight.shape[-1] == 3 else 1
        return F.conv2d(F.pad(x, pad), weight, state[f"{name}.bias"], stride, 0, rate, groups)

    size = x.shape[2:]
    x = F.relu6(conv("backbone.features.0.0", x, stride=2))
    index, reached, rate = 1, 2, 1
    for expansion, _, repeats, stage_stride in STAGES:
        for repeat in range(repeats):
            block, stride, block_rate = f"backbone.features.{index}.conv", stage_stride if repeat == 0 else 1, rate
            if stride == 2 and reached == output_stride:
                stride, rate = 1, 2 * rate
            elif stride == 2:
                reached *= 2
            y = F.relu6(conv(f"{block}.0.0", x)) if expansion > 1 else x
            y = F.relu6(conv(f"{block}.{int(expansion > 1)}.0", y, stride, block_rate))
            y = conv(f"{block}.{1 + int(expansion > 1)}", y)
            x = x + y if repeat > 0 else y
            index += 1
    pooled = F.relu(conv("aspp.image_pool", x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[2:])
    x = F.relu(conv("aspp.project", torch.cat([pooled, F.relu(conv("aspp.conv1x1", x))], 1)))
    return F.interpolate(conv("classifier", x), size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize(("output_stride", "size"), [(16, (65, 65)), (8, (64, 47))])
def test_logits_are_those_of_the_published_graph(tmp_path, output_stride, size):
    state = fabricated()
    assert len(state) == 110
    assert sum(value.numel() for value in state.values()) == 688_357  # the published half-width file
    path = tmp_path / "half.safetensors"
    save_file(state, path)
    model = create_model("deeplabv3_mobilenetv2", output_stride=output_stride, weights=path).eval()
    assert (model.backbone.input_mean, model.backbone.input_std) == ((0.5,) * 3, (0.5,) * 3)
    x = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        expected = twin(state, x, output_stride)
        # BatchNorm's division by sqrt(1 - eps + eps) rounds every weight once; 55 layers of float32 sums in another order.
        torch.testing.assert_close(model(x)["out"], expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    state = fabricated(0.25)
    del state["aspp.conv1x1.bias"], state["backbone.features.3.conv.0.0.weight"]
    state["classifier.weight"] = torch.zeros(20, 256, 1, 1)
    state["decoder.weight"] = torch.zeros(1)
    path = tmp_path / "changed.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match=r"changed\.safetensors does not fit DeepLabV3") as error:
        create_model("deeplabv3_mobilenetv2", weights=path)
    message = str(error.value)
    assert "missing backbone.features.3.conv.0.0.weight" in message
    assert "missing classifier.0.convs.0.1.bias" in message
    assert "unexpected decoder.weight" in message
    assert "classifier.1.weight has shape [20, 256, 1, 1], expected [21, 256, 1, 1]" in message


def test_another_model_and_unknown_files_are_refused(tmp_path):
    path = tmp_path / "published.safetensors"
    save_file(fabricated(0.25), path)
    with pytest.raises(ValueError, match="are of 'deeplabv3_mobilenetv2', not of 'deeplabv3_resnet18'"):
        create_model("deeplabv3_resnet18", weights=path)
    save_file({"encoder.stage.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"no segmentation network that is known here: its keys begin encoder\.stage"):
        read_published(path)


def test_training_from_published_weights_keeps_their_options(tmp_path):
    """A checkpoint says what its network was: the file that it started from may be gone."""
    dataset = create_dataset("synthetic", split="val", length=2)
    path = tmp_path / "published.safetensors"
    save_file(fabricated(0.25, classes=dataset.num_classes), path)
    settings = [
        "data.name=synthetic", "data.options.length=4", "data.options.size=64", "data.crop=[33,33]",
        "model.name=deeplabv3_mobilenetv2", f"model.weights={path}", "train.lr=1e-12", "train.iterations=1",
        "train.batch_size=2", "run.threads=1", "run.tensorboard=false", "eval.sheet=0",
    ]  # fmt: skip
    assert train.main(["--work-dir", str(tmp_path / "run"), *settings]) == 0
    published = create_model("deeplabv3_mobilenetv2", dataset.num_classes, weights=path)
    path.unlink()
    model, config, _, origin = load_trained(str(tmp_path / "run" / "last.pt"), None, [])
    assert (model.align_corners, model.backbone.input_mean, origin.iteration) == (True, (0.5,) * 3, 1)
    assert config.model.options["padding"] == "same"
    trained = model.state_dict()
    for name, value in published.state_dict().items():
        if name.endswith("weight"):  # a rate near zero, one step
            torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)


def test_predict_with_published_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("ATROUS_SHARED", str(tmp_path))
    path = tmp_path / "published.safetensors"
    save_file(fabricated(0.25), path)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    command = ["--config", RECIPE, f"model.weights={path}", "eval.canvas=[33,33]", "--masks", "--output", str(tmp_path / "out")]
    assert predict.main([*command, str(tmp_path / "photo.png")]) == 0
    mask = cv2.imread(str(tmp_path / "out" / "photo_mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (20, 30)
    x = torch.zeros(1, 3, 33, 33)
    x[:, :, :20, :30] = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) / 127.5 - 1
    expected = twin(fabricated(0.25), x, 16)[0, :, :20, :30].argmax(0)
    assert (torch.from_numpy(mask) == expected).float().mean() > 0.99  # float32 may decide ties of two classes differently


@pytest.fixture(scope="module")
def shared() -> Path:
    folder = Path(os.environ.get("ATROUS_SHARED") or Path(__file__).resolve().parents[2].parent / "shared")
    for needed in ("weights/deeplabv3_mobilenet_v2_voc.safetensors", "data/voc2012_subset"):
        if not (folder / needed).exists():
            pytest.skip(f"no published weights: {folder / needed} does not exist (set ATROUS_SHARED)")
    return folder


@pytest.mark.real_data
def test_the_published_weights_segment_photographs(shared, monkeypatch, tmp_path):
    """The first eight images only: that the file is read and the protocol is the right one; the score is a committed result."""
    monkeypatch.setenv("ATROUS_SHARED", str(shared))
    settings = ["--config", RECIPE, "eval.limit=8", "eval.sheet=0", "run.threads=1"]
    for stride, backend in ((16, "auto"), (16, "torch"), (8, "cpu")):
        output = tmp_path / f"{stride}_{backend}.json"
        assert evaluate.main([*settings, f"eval.output_stride={stride}", "--backend", backend, "--output", str(output)]) == 0
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert all(result["pixel_accuracy"] > 0.9 for result in found.values())
    # Two implementations may decide a tie of two classes differently.
    assert found["16_auto"]["miou"] == pytest.approx(found["16_torch"]["miou"], abs=1e-3)
    assert found["16_auto"]["config"]["model"]["options"]["align_corners"] is True


# What a plain rebuild of the same graph in PyTorch scores on the same images under the same protocol, in percent.
@pytest.mark.parametrize(
    ("network", "output_stride", "miou", "accuracy"),
    [("mobilenetv2", 16, 72.64, 93.59), ("mobilenetv2", 8, 73.13, 93.77),
     ("mobilenetv2-half", 16, 67.96, 92.27), ("mobilenetv2-half", 8, 69.01, 92.44)],
)  # fmt: skip
def test_committed_results_reproduce_the_score(network, output_stride, miou, accuracy):
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "published"
    stem = f"deeplabv3_{network}_voc-subset_513x513_os{output_stride}"
    found = {path.suffixes[0][1:]: json.loads(path.read_text()) for path in folder.glob(f"{stem}.*.json")}
    backends = {name: found[name] for name in ("auto", "cpu", "torch", "reference") if name in found}
    assert set(backends) >= ({"auto", "cpu", "torch", "reference"} if network == "mobilenetv2" else {"auto"})
    for result in backends.values():
        assert result["images"] == 160
        assert 100 * result["miou"] == pytest.approx(miou, abs=0.1)
        assert 100 * result["pixel_accuracy"] == pytest.approx(accuracy, abs=0.1)
        # Implementations round in their own order: a pixel in a million may decide a tie differently.
        assert result["miou"] == pytest.approx(backends["auto"]["miou"], abs=2e-5)
    for name, result in found.items():
        if name not in backends:  # averaged or refined
            assert result["miou"] > backends["auto"]["miou"]
