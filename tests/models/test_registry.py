"""Models by name, and the weights they start from."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from segmodels import create_model, list_models
from segmodels.backbones import BACKBONES
from segmodels.backbones.weights import load_backbone, read_state_dict
from segmodels.models import SYSTEMS, DeepLabDT, PSPNet


def test_list_models():
    assert "deeplabv3_resnet50" in list_models()
    assert list_models("deeplabv3plus_resnet*") == [f"deeplabv3plus_resnet{depth}" for depth in (101, 152, 18, 34, 50)]
    assert list_models("nothing*") == []


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=4)
    assert type(model) is SYSTEMS[name.partition("_")[0]]
    assert model.output_stride == (8 if isinstance(model, (DeepLabDT, PSPNet)) else 16)


def test_both_spellings_build_the_same():
    with torch.device("meta"):
        one = create_model("deeplabv3plus_resnet18", num_classes=4, output_stride=8)
        two = create_model("deeplabv3plus", backbone="resnet18", num_classes=4, output_stride=8)
    assert str(one) == str(two)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (
            ["deeplabv3_resnet51"],
            {},
            ValueError,
            r"unknown model 'deeplabv3_resnet51' \(did you mean deeplabv3_resnet",
        ),
        (["unet"], {}, ValueError, "unknown model 'unet'"),
        (["deeplabv3"], {}, ValueError, "'deeplabv3' needs a backbone"),
        (["deeplabv3"], {"backbone": "resnet5"}, ValueError, r"unknown backbone 'resnet5' \(did you mean .*resnet50"),
        (["deeplabv3_resnet50"], {"backbone": "resnet50"}, ValueError, "the name already has a backbone"),
        (["deeplabv3_resnet18"], {"num_clases": 3}, TypeError, r"no argument 'num_clases'"),
        (["deeplabv3_resnet18"], {"seperable": True}, TypeError, r"'seperable' \(did you mean separable"),
        (["deeplabv3_mobilenetv2"], {"multi_grid": (1, 2, 4)}, TypeError, "no argument 'multi_grid'"),
        (["deeplabv3_resnet18", 0], {}, ValueError, "num_classes=0: expected a positive integer"),
        (["deeplabv3_resnet18", 2.5], {}, ValueError, "num_classes=2.5: expected a positive integer"),
        (["deeplabv3_resnet18", 21, 12], {}, ValueError, "output_stride=12: expected one of 8, 16, 32"),
        (["deeplabv3_resnet18"], {"aux_loss": 0.4}, ValueError, "aux_loss=0.4: expected True or False"),
        (["deeplabv3_resnet18"], {"multi_grid": (1, 2, 4)}, ValueError, "expected 2 factors"),
        (["deeplabv3_resnet18"], {"weights_backbone": "imagenet"}, ValueError, "exists for efficientnet_lite0 only"),
        (["deeplabv3_resnet18"], {"weights_backbone": "no.pth"}, FileNotFoundError, "'no.pth' does not exist"),
    ],
)
def test_mistakes_are_named(args, options, error, message):
    with pytest.raises(error, match=message), torch.device("meta"):
        create_model(*args, **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_weights_from_a_file(tmp_path, suffix):
    source = BACKBONES["mobilenetv2"](width_mult=0.25)
    state = {**source.state_dict(), "classifier.1.weight": torch.zeros(10, 1280), "classifier.1.bias": torch.zeros(10)}
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    model = create_model("deeplabv3_mobilenetv2", width_mult=0.25, weights_backbone=path)
    assert all(value.equal(state[key]) for key, value in model.backbone.state_dict().items())


def test_file_with_code_is_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for name, content in (("code.pth", Payload()), ("module.pt", torch.nn.Linear(1, 1))):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match="cannot be read as plain tensors"):
            read_state_dict(tmp_path / name)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        read_state_dict(tmp_path / "plain.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.bin", b"", r"expected .safetensors, .pth or .pt, not '.bin'"),
        ("weights", b"", "a name without suffix"),
        ("empty.pth", b"", "cannot be read as plain tensors"),
        ("noise.pth", b"\x00noise" * 50, "cannot be read as plain tensors"),
        ("noise.safetensors", b"\x00noise" * 50, "not a readable safetensors file"),
        ("empty.safetensors", b"", "not a readable safetensors file"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("cut", [100, -100])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files(tmp_path, suffix, cut):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.zeros(100), "b": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=path.name):
        read_state_dict(path)


@pytest.mark.parametrize("content", [{"model": {"conv1.weight": torch.zeros(1)}}, [torch.zeros(1)], torch.zeros(1)])
def test_not_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="expected a flat dictionary of named tensors"):
        read_state_dict(tmp_path / "file.pth")


def test_tensors_that_do_not_fit_are_named_and_nothing_is_copied():
    backbone = BACKBONES["resnet18"]()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = {key: torch.ones_like(value) for key, value in before.items()}
    del state["layer3.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 4, 7, 7)
    with pytest.raises(ValueError, match=r"published\.pth does not fit ResNet") as error:
        load_backbone(backbone, state, "published.pth")
    message = str(error.value)
    assert "missing layer3.0.conv1.weight" in message
    assert "unexpected layer9.weight" in message
    assert "conv1.weight has shape [64, 4, 7, 7], expected [64, 3, 7, 7]" in message
    assert all(value.equal(before[key]) for key, value in backbone.state_dict().items())
