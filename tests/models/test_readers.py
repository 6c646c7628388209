"""Files of the peers, fabricated from plain twins under their own keys: they load, and compute what the peers compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peer_twins import SemsegPSPNet, SmpDeepLabV3, SmpDeepLabV3Plus, SmpPSPNet
from torch import nn
from torchvision_twin import TorchvisionDeepLabV3ResNet50, randomise_batch_norm

from segmodels import create_model
from segmodels.backbones import BACKBONES
from segmodels.backbones.weights import load_backbone
from segmodels.readers import read_published


def saved(twin: nn.Module, folder: Path, wrap=lambda state: state) -> Path:
    torch.manual_seed(0)
    randomise_batch_norm(twin)
    path = folder / "peer.pth"
    torch.save(wrap(twin.eval().state_dict()), path)
    return path


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Tens of convolutions in another order of summation, each off by a few float32 ulps of its largest value.
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-4)


def test_semseg_pspnet50(tmp_path):
    """As their training writes it: DataParallel's names, under state_dict, beside other entries."""
    twin = SemsegPSPNet()
    path = saved(twin, tmp_path, lambda s: {"epoch": 100, "state_dict": {f"module.{k}": v for k, v in s.items()}})
    model = create_model("pspnet_resnet50", weights=path, aux_loss=True).eval()
    # facts of the authors' VOC models: 46,782,550 for 150 classes; a class costs 513 in the classifier
    assert sum(p.numel() for k, p in model.named_parameters() if "aux" not in k) == 46_782_550 - (150 - 21) * 513
    x = torch.randn(1, 3, 73, 89)
    with torch.no_grad():
        expected, expected_aux = twin(x)
        assert_same(model(x)["out"], expected)
        aux = model.aux_classifier(model.backbone(x)["aux"])
        assert_same(nn.functional.interpolate(aux, x.shape[2:], mode="bilinear", align_corners=True), expected_aux)


@pytest.mark.parametrize(
    ("twin", "name"),
    [
        (SmpDeepLabV3, "deeplabv3_resnet18"),
        (lambda: SmpDeepLabV3(named=False), "deeplabv3_resnet18"),
        (SmpDeepLabV3Plus, "deeplabv3plus_resnet18"),
        (SmpPSPNet, "pspnet_resnet18"),
    ],
)
def test_segmentation_models_pytorch(tmp_path, twin, name):
    twin = twin()
    path = saved(twin, tmp_path)
    published = read_published(path)
    assert published.model == name
    model = create_model(name, weights=path).eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert_same(model(x)["out"], twin(x))


def test_torchvision_deeplabv3(tmp_path):
    """Values and outputs: test_torchvision_parity; here, that the file brings its options."""
    with torch.device("meta"):
        twin = TorchvisionDeepLabV3ResNet50(num_classes=5)
    twin = twin.to_empty(device="cpu")
    path = saved(twin, tmp_path, lambda s: {"model": s, "epoch": 3})
    model = create_model("deeplabv3_resnet50", 5, weights=path)
    assert (model.output_stride, model.backbone.first_block, model.aux_classifier) == (8, "previous", None)
    assert create_model("deeplabv3_resnet50", 5, 16, weights=path).output_stride == 16
    with pytest.raises(ValueError, match=r"classifier\.4\.weight has shape \[5, 256, 1, 1\], expected \[21, 256, 1, 1\]"):
        create_model("deeplabv3_resnet50", weights=path)


def test_torchvision_fcn(tmp_path):
    source = create_model("fcn_resnet18", 4, aux_loss=True)  # our keys are theirs: test_torchvision_parity
    torch.save(source.state_dict(), tmp_path / "fcn.pt")
    model = create_model("fcn_resnet18", 4, weights=tmp_path / "fcn.pt")
    assert all(value.equal(source.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.output_stride == 8
    keys = {key.rpartition(".")[0] for key in source.state_dict() if "classifier" in key}
    assert keys == {f"{head}.{layer}" for head in ("classifier", "aux_classifier") for layer in (0, 1, 4)}


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(tmp_path, change):
    state = SmpDeepLabV3Plus().state_dict()
    if change == "missing":
        del state["decoder.block2.1.running_mean"]
        message = r"missing classifier\.refine\.0\.2\.running_mean"
    elif change == "extra":
        state["classification_head.3.weight"] = torch.zeros(2, 2)
        message = r"unexpected classification_head\.3\.weight"
    else:
        state["decoder.block1.0.weight"] = torch.zeros(32, 64, 1, 1)
        message = r"classifier\.project_low\.0\.weight has shape \[32, 64, 1, 1\], expected \[48, 64, 1, 1\]"
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=message):
        create_model("deeplabv3plus_resnet18", weights=tmp_path / "changed.pth")


def test_a_resnet_of_unknown_depth_is_refused(tmp_path):
    state = {key: value for key, value in SmpPSPNet().state_dict().items() if "layer3.1" not in key}
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"no ResNet that is known here has \(2, 2, 1, 2\) basic blocks"):
        read_published(tmp_path / "cut.pth")


def test_a_file_with_code_is_refused(tmp_path):
    torch.save(SmpPSPNet(), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"cannot be read as plain tensors \(weights_only=True\), so it is refused"):
        create_model("pspnet_resnet18", weights=tmp_path / "module.pth")


def test_timm_resnet_d():
    """timm's ``resnet50d``: a stem of three convolutions, and an average before each projection, which so has another index."""
    options = {"stem": "deep", "stem_width": 32, "avg_down": True}
    with torch.device("meta"):
        full = BACKBONES["resnet50"](**options)
    assert sum(p.numel() for p in full.parameters()) + 2048 * 1000 + 1000 == 25_576_264
    plain = set(BACKBONES["resnet50"](width_mult=1 / 16).state_dict())
    keys = {f"layer{n}.0.downsample.{i}.weight" for n in range(1, 5) for i in (1, 2)}
    assert {key for key in full.state_dict() if "downsample" in key and "weight" in key} == keys
    assert not keys <= plain
    source = BACKBONES["resnet50"](width_mult=1 / 16, **options)
    randomise_batch_norm(source)
    state = source.state_dict() | {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}
    model = BACKBONES["resnet50"](width_mult=1 / 16, **options)
    load_backbone(model, state, "resnet50d.pth")
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"\(a ResNet-d: stem='deep', stem_width=32, avg_down=True\)"):
        load_backbone(BACKBONES["resnet50"](width_mult=1 / 16), state, "resnet50d.pth")
    with pytest.raises(ValueError, match="avg_down=True with stride_placement='last'"):
        BACKBONES["resnet50"](avg_down=True, stride_placement="last")


def test_average_of_a_resnet_d_is_the_frameworks_and_survives_the_loss_of_its_stride():
    torch.manual_seed(0)
    model = BACKBONES["resnet18"](width_mult=1 / 4, avg_down=True)
    randomise_batch_norm(model)
    model.eval()
    shortcut = model.layer2[0].downsample
    x = torch.randn(2, 16, 9, 12)
    with torch.no_grad():
        for size in ((9, 12), (1, 1)):
            part = x[:, :, : size[0], : size[1]]
            pooled = nn.functional.avg_pool2d(part, 2, 2, ceil_mode=True, count_include_pad=False)
            assert_same(shortcut(part), shortcut[1:](pooled))
        image = torch.randn(1, 3, 97, 65)
        found = {}
        for output_stride in (32, 8):
            model.set_output_stride(output_stride)
            found[output_stride] = model(image)["out"]
        assert_same(found[8][..., ::4, ::4], found[32])
        assert model(image[:, :, :1, :1])["out"].shape[2:] == (1, 1)


@pytest.mark.parametrize("names", ["timm", "semseg"])
def test_deep_stems_of_classification_files(names):
    """timm's ``resnet*s`` names the stem conv1.0 to conv1.6; semseg's initial models conv1 to conv3. Both end in ``fc``."""
    source = BACKBONES["resnet18"](stem="deep")
    randomise_batch_norm(source)
    state = source.state_dict()
    theirs = dict(state)
    if names == "semseg":
        stem = {"conv1.0": "conv1", "conv1.1": "bn1", "conv1.3": "conv2", "conv1.4": "bn2", "conv1.6": "conv3", "bn1": "bn3"}
        theirs = {}
        for key, value in state.items():
            prefix = next((p for p in stem if key.startswith(f"{p}.")), None)
            theirs[key if prefix is None else key.replace(prefix, stem[prefix], 1)] = value
    theirs |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    model = BACKBONES["resnet18"](stem="deep")
    load_backbone(model, theirs, names)
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"conv1\.0\.weight|conv1\.weight"):
        load_backbone(BACKBONES["resnet18"](), theirs, names)
