"""Published weights of the systems before DeepLabv3: fabricated files with the peers' own names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from caffemodel_writer import blob, message, network, number
from torch import Tensor, nn

from segmodels import create_model
from segmodels.backbones import VGG16, AlexNet, GoogLeNet
from segmodels.backbones.caffemodel import read_caffemodel
from segmodels.backbones.googlenet import INCEPTIONS
from segmodels.backbones.surgery import subsampled
from segmodels.backbones.weights import load_backbone, read_state_dict

VGG = [f"conv{stage}_{i}" for stage, count in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3)) for i in range(1, count + 1)]
CONTEXT = ["conv1_1", "conv1_2", "conv2_1", "conv3_1", "conv4_1", "conv5_1", "conv6_1", "conv7_1"]
MSC = [f"{level}_{part}" for level in ("data", "pool1", "pool2", "pool3", "pool4") for part in ("conv", "fc", "ms")]
BRANCHES = [name for i in range(1, 5) for name in (f"fc6_{i}", f"fc7_{i}", f"fc8_voc12_{i}")]
SCORES = ["score_fr", "score_pool4", "score_pool3"]


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.1)
    return model


# The wire format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True], ids=["layer", "layers"])
@pytest.mark.parametrize("form", ["packed", "single", "double"])
def test_caffemodel_round_trip(tmp_path, old, form):
    layers = {"conv1": [torch.randn(3, 2, 3, 3), torch.randn(3)], "inception/3x3": [torch.randn(4, 5)]}
    path = tmp_path / "net.caffemodel"
    path.write_bytes(network(layers, old=old, form=form))
    state = read_state_dict(path)
    assert list(state) == ["conv1.0", "conv1.1", "inception/3x3.0"]
    assert state["conv1.0"].equal(layers["conv1"][0])
    assert state["conv1.1"].flatten().equal(layers["conv1"][1])
    assert list(state["conv1.1"].shape) == ([1, 1, 1, 3] if old else [3])
    assert state["inception/3x3.0"].equal(layers["inception/3x3"][0].reshape(state["inception/3x3.0"].shape))


def test_caffemodel_cut_anywhere_is_refused_or_shorter(tmp_path):
    content = network({"a": [torch.randn(2, 3)], "b": [torch.randn(2)]})
    path = tmp_path / "net.caffemodel"
    for end in range(len(content)):
        path.write_bytes(content[:end])
        try:
            assert list(read_caffemodel(path)) == ["a.0"]  # the end of a layer is a message too
        except ValueError as error:
            assert "net.caffemodel' is not a readable .caffemodel" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no layer with weights"),
        (b"\x80\x02}q\x00.", "not a protobuf message"),
        (b"\x00" * 40, "not a protobuf message|no layer"),
        (b"\xff" * 40, "not a protobuf message"),
        (network({"a": [torch.zeros(1)]}) * 2, "two layers are called 'a'"),
        (message(100, message(1, b"a") + message(7, number(1, 3) + message(5, bytes(8)))), r"a\.0 of shape .* 2 values"),
        (message(100, message(1, b"a") + message(7, message(5, bytes(7)))), "multiple of element size"),
        (message(100, message(7, blob(torch.zeros(1)))), "a layer with weights has no name"),
        (b"\x0b", "unknown wire type 3"),
    ],
)
def test_what_is_not_a_caffemodel_is_refused(tmp_path, content, reason):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"net.caffemodel' is not a readable .caffemodel: .*({reason})"):
        read_state_dict(path)


# Whole networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("fcn32s_vgg16", [*VGG, "fc6", "fc7", *SCORES[:1]], {}),
        ("fcn16s_vgg16", [*VGG, "fc6", "fc7", *SCORES[:2]], {}),
        ("fcn8s_vgg16", [*VGG, "fc6", "fc7", *SCORES], {}),
        ("fcn32s_alexnet", ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "score_fr"], {}),
        ("fcn16s_vgg16", [*VGG, "fc6", "fc7", "score_fr_sem", "score_pool4_sem", "score_fr_geo", "score_pool4_geo"],
         {"geometric_classes": 3}),
        ("fcn32s_vgg16", [*(f"{c}color" for c in (*VGG, "fc6", "fc7")), "score_frcolor", "score_frhha",
                          *(f"{c}hha" for c in (*VGG, "fc6", "fc7"))], {"late_fusion": True}),
        ("frontend_vgg16", [*VGG, "fc6", "fc7", "final"], {}),
        ("dilation7_vgg16", [*VGG, "fc6", "fc7", "final", *(f"ctx_{c}" for c in CONTEXT[:5]), "ctx_fc1", "ctx_final"], {}),
        ("dilation8_vgg16", [*VGG, "fc6", "fc7", "final", *(f"ctx_{c}" for c in CONTEXT[:6]), "ctx_fc1", "ctx_final"],
         {"context": "basic"}),
        ("dilation8_vgg16", [*VGG, "fc6", "fc7", "fc-final", *(f"ct_{c}" for c in CONTEXT[:6]), "ct_fc1", "ct_final"],
         {"context": "large"}),
        ("dilation10_vgg16", [*VGG, "fc6", "fc7", "final", *(f"ctx_{c}" for c in CONTEXT), "ctx_fc1", "ctx_final"], {}),
        ("deeplabv1_vgg16", [*VGG, "fc6", "fc7", "fc8_pascal"], {}),
        ("deeplabv1_vgg16", [*VGG, "fc6", "fc7", "fc8_voc12", *MSC], {"msc": True}),
        ("deeplabv1_vgg16", [*VGG, "fc6", "fc7", "fc8_voc12"], {"fc6": "4x4"}),
        ("deeplabv2_vgg16", [*VGG, *BRANCHES], {}),
    ],
)  # fmt: skip
def test_caffe_networks(tmp_path, name, layers, options):
    narrow = {"width_mult": 1 / 16}
    if "deeplabv2" in name:
        narrow["fc_channels"] = 4
    if "msc" in options:
        narrow["branch_channels"] = 4
    source = randomise(create_model(name, 5, **narrow, **options))
    ours = convolutions(source)
    assert len(ours) == len(layers)
    blobs = {}
    for index, (layer, convolution) in enumerate(zip(layers, ours, strict=True)):
        weight = convolution.weight.detach()
        blobs[layer] = [weight.flip(1) if index == 0 or layer == "data_conv" else weight, convolution.bias.detach()]
    if "fcn" in name:
        blobs["upscore"] = [torch.zeros(5, 1, 4, 4)]
    path = tmp_path / "net.caffemodel"
    path.write_bytes(network(blobs, old="alexnet" in name))
    loaded = create_model(name, 5, weights=path, **narrow)
    expected, actual = source.state_dict(), loaded.state_dict()
    assert {key: value.shape for key, value in actual.items()} == {key: value.shape for key, value in expected.items()}
    assert [key for key, value in actual.items() if not value.equal(expected[key])] == []
    assert loaded.backbone.input_std == (1 / 255,) * 3
    mean = [255 * value for value in loaded.backbone.input_mean]
    assert all(70 < value < 125 for value in mean)
    # What Caffe's first convolution sees, blue first and from 0 to 255 less the mean, is what ours sees.
    image = torch.rand(1, 3, 13, 13)
    caffe = 255 * image.flip(1) - torch.tensor(mean[::-1])[:, None, None]
    given = (image - torch.tensor(loaded.backbone.input_mean)[:, None, None]) * 255
    first = convolutions(loaded)[0]
    torch.testing.assert_close(
        F.conv2d(given, first.weight, first.bias), F.conv2d(caffe, *blobs[layers[0]]), rtol=1e-4, atol=1e-3
    )


def test_caffe_network_of_colour_and_depth(tmp_path):
    """NYUDv2, early fusion: blue, green, red and depth in, 40 classes out."""
    narrow = {"width_mult": 1 / 16}
    source = randomise(create_model("fcn32s_vgg16", 40, in_channels=4, **narrow))
    layers = ["conv1_1_bgrd", *VGG[1:], "fc6", "fc7", "score_fr"]
    blobs = {layer: [c.weight.detach(), c.bias.detach()] for layer, c in zip(layers, convolutions(source), strict=True)}
    weight = blobs["conv1_1_bgrd"][0]
    blobs["conv1_1_bgrd"][0] = torch.cat([weight[:, :3].flip(1), weight[:, 3:]], 1)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(network(blobs))
    loaded = create_model("fcn32s_vgg16", 40, weights=path, **narrow)
    assert [key for key, value in loaded.state_dict().items() if not value.equal(source.state_dict()[key])] == []
    assert [round(255 * value, 3) for value in loaded.backbone.input_mean] == [92.318, 97.203, 116.190]


def test_caffe_network_that_does_not_fit_is_named(tmp_path):
    source = randomise(create_model("fcn32s_vgg16", 5, width_mult=1 / 16))
    layers = dict(zip([*VGG, "fc6", "fc7", "score_fr"], convolutions(source), strict=True))
    blobs = {layer: [c.weight.detach(), c.bias.detach()] for layer, c in layers.items()}
    blobs["fc9"] = blobs.pop("fc7")
    blobs["score_fr"] = [torch.zeros(7, 256, 1, 1), torch.zeros(7)]
    path = tmp_path / "net.caffemodel"
    path.write_bytes(network(blobs))
    with pytest.raises(ValueError, match="does not fit FCN32s") as error:
        create_model("fcn32s_vgg16", 5, weights=path, width_mult=1 / 16)
    shapes = "score.out.weight has shape [7, 256, 1, 1], expected [5, 256, 1, 1]"
    for text in ("missing backbone.fc7.weight", "unexpected fc9.0", shapes):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="are of 'fcn32s_vgg16', not of 'fcn8s_vgg16'"):
        create_model("fcn8s_vgg16", 5, weights=path)


def test_caffe_deeplab_resnet(tmp_path):
    """DeepLab v2 on ResNet-101: BatchNorm as sums with a weight, gain and bias in a layer of their own, shared copies."""
    narrow = {"width_mult": 1 / 64}
    source = randomise(create_model("deeplabv2_resnet101", 5, **narrow))
    body, blobs = source.backbone, {}

    def add(unit: str, convolution: nn.Conv2d, norm: nn.BatchNorm2d, conv_name: str, first: bool = False) -> None:
        weight = convolution.weight.detach()
        blobs[conv_name] = [weight.flip(1) if first else weight]
        blobs[f"bn{unit}"] = [norm.running_mean * 4, norm.running_var * 4, torch.tensor([4.0])]
        blobs[f"scale{unit}"] = [norm.weight.detach(), norm.bias.detach()]

    add("_conv1", body.conv1, body.bn1, "conv1", first=True)
    for stage, count in zip(range(2, 6), (3, 4, 23, 3), strict=True):
        few = ["a", "b", "c"]
        letters = few if count == 3 else ["a", *(f"b{i}" for i in range(1, count))]
        for block, letter in zip(getattr(body, f"layer{stage - 1}"), letters, strict=True):
            name = f"{stage}{letter}_branch"
            if block.downsample is not None:
                add(f"{name}1", block.downsample[0], block.downsample[1], f"res{name}1")
            pairs = ((block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3))
            for part, pair in zip("abc", pairs, strict=True):
                add(f"{name}2{part}", *pair, f"res{name}2{part}")
    for index, branch in enumerate(source.classifier.branches):
        blobs[f"fc1_voc12_c{index}"] = [branch.weight.detach(), branch.bias.detach()]
    blobs["conv1_res05"] = blobs["conv1"]
    path = tmp_path / "net.caffemodel"
    path.write_bytes(network(blobs))
    loaded = create_model("deeplabv2_resnet101", 5, weights=path, **narrow)
    assert loaded.scales == (1, 0.75, 0.5)
    assert [b.conv1.stride[0] for b in (loaded.backbone.layer2[0], loaded.backbone.layer3[0])] == [2, 1]
    assert [b.conv2.dilation[0] for b in (loaded.backbone.layer3[0], loaded.backbone.layer4[0])] == [2, 4]
    for key, value in loaded.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, source.state_dict()[key])


@pytest.mark.parametrize(("depth", "blocks", "stride_placement"), [(50, (3, 4, 6, 3), "1x1"), (101, (3, 4, 23, 3), "3x3")])
def test_caffe_pspnet(tmp_path, depth, blocks, stride_placement):
    """The authors' layer names; BatchNorm as scale, shift, mean and variance of ``[1, C, 1, 1]`` in one layer."""
    narrow = {"width_mult": 1 / 32, "head_channels": 4}
    source = create_model(f"pspnet_resnet{depth}", 5, stem="deep", bins=(6, 3, 2, 1), **narrow)
    randomise(source)
    body, blobs = source.backbone, {}

    def add(name: str, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        blobs[name] = [convolution.weight.detach()]
        values = (norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var)
        blobs[f"{name}/bn"] = [value[None, :, None, None] for value in values]

    for name, i, norm in (("conv1_1_3x3_s2", 0, body.conv1[1]), ("conv1_2_3x3", 3, body.conv1[4]), ("conv1_3_3x3", 6, body.bn1)):
        add(name, body.conv1[i], norm)
    blobs["conv1_1_3x3_s2"][0] = blobs["conv1_1_3x3_s2"][0].flip(1)
    for stage, count in enumerate(blocks, 2):
        for i, block in enumerate(getattr(body, f"layer{stage - 1}")):
            add(f"conv{stage}_{i + 1}_1x1_reduce", block.conv1, block.bn1)
            add(f"conv{stage}_{i + 1}_3x3", block.conv2, block.bn2)
            add(f"conv{stage}_{i + 1}_1x1_increase", block.conv3, block.bn3)
            if i == 0:
                add(f"conv{stage}_1_1x1_proj", *block.downsample)
        assert i + 1 == count
    for bins, level in zip((6, 3, 2, 1), source.classifier.ppm.features, strict=True):
        add(f"conv5_3_pool{bins}_conv", level[1], level[2])
    add("conv5_4", *source.classifier.cls[:2])
    blobs["conv6"] = [source.classifier.cls[4].weight.detach(), source.classifier.cls[4].bias.detach()]
    path = tmp_path / "net.caffemodel"
    path.write_bytes(network(blobs))
    loaded = create_model(f"pspnet_resnet{depth}", 5, weights=path, **narrow)
    expected = source.state_dict()
    assert [key for key, value in loaded.state_dict().items() if not value.equal(expected[key])] == []
    assert loaded.backbone.stride_placement == stride_placement
    assert (loaded.output_stride, loaded.align_corners, loaded.classifier.ppm.bins) == (8, True, (6, 3, 2, 1))
    assert [round(255 * value, 3) for value in loaded.backbone.input_mean] == [123.68, 116.779, 103.939]
    blobs["conv7"] = [torch.zeros(1, 1, 1, 1)]
    path.write_bytes(network(blobs))
    with pytest.raises(ValueError, match=r"unexpected conv7\.0"):
        create_model(f"pspnet_resnet{depth}", 5, weights=path, **narrow)


class PeerBlock(nn.Module):
    """kazuto1011's names and order: the stride in the first 1x1 convolution."""

    def __init__(self, inputs: int, width: int, stride: int, rate: int, project: bool) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, rate: int = 1) -> nn.Sequential:
            layers = nn.Sequential()
            layers.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, rate * (kernel // 2), rate, bias=False))
            layers.add_module("bn", nn.BatchNorm2d(outputs))
            return layers

        self.reduce = unit(inputs, width, 1, stride)
        self.conv3x3 = unit(width, width, 3, 1, rate)
        self.increase = unit(width, 4 * width)
        if project:
            self.shortcut = unit(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.increase(self.conv3x3(self.reduce(x).relu()).relu())
        return (y + (self.shortcut(x) if hasattr(self, "shortcut") else x)).relu()


class PeerDeepLab(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Module()
        self.layer1.conv1 = nn.Module()
        self.layer1.conv1.conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.layer1.conv1.bn = nn.BatchNorm2d(width)
        inputs = width
        for index, (count, stride, rate) in enumerate(((3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4))):
            stage = nn.Sequential()
            for i in range(count):
                stage.add_module(f"block{i + 1}", PeerBlock(inputs, width << index, stride if i == 0 else 1, rate, i == 0))
                inputs = 4 * (width << index)
            setattr(self, f"layer{index + 2}", stage)
        self.aspp = nn.Module()
        for i, rate in enumerate((6, 12, 18, 24)):
            setattr(self.aspp, f"c{i}", nn.Conv2d(inputs, classes, 3, 1, rate, rate))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.layer1.conv1.bn(self.layer1.conv1.conv(x)).relu(), 3, 2, 1, ceil_mode=True)
        x = self.layer5(self.layer4(self.layer3(self.layer2(x))))
        return sum(getattr(self.aspp, f"c{i}")(x) for i in range(4))


def test_kazuto_deeplabv2_computes_the_same(tmp_path):
    torch.manual_seed(0)
    peer = nn.Module()
    peer.base = PeerDeepLab(5, 4).eval()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    model = create_model("deeplabv2_resnet50", 5, weights=tmp_path / "peer.pth", width_mult=1 / 16).eval()
    image = torch.rand(1, 3, 70, 87)
    caffe = 255 * image.flip(1) - torch.tensor((104.008, 116.669, 122.675))[:, None, None]
    with torch.no_grad():
        one = peer.base(caffe)
        small = [peer.base(F.interpolate(caffe, scale_factor=s, mode="bilinear", align_corners=False)) for s in (0.5, 0.75)]
        grown = [F.interpolate(part, size=one.shape[2:], mode="bilinear", align_corners=False) for part in small]
        expected = torch.stack([one, *grown]).amax(0)
        given = (image - torch.tensor(model.backbone.input_mean)[:, None, None]) / torch.tensor(1 / 255)
        actual = model.logits(given)["out"]
    assert actual.shape == expected.shape
    # The same sums in other orders through 50 layers of float32.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# Classification networks ------------------------------------------------------------------------------------------------


def torchvision_vgg16(mult: float) -> dict[str, Tensor]:
    widths = [round(w * mult) for w in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)]
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    state, inputs = {}, 3
    for index, width in zip(indices, widths, strict=True):
        state |= {f"features.{index}.weight": torch.randn(width, inputs, 3, 3), f"features.{index}.bias": torch.randn(width)}
        inputs = width
    fc = round(4096 * mult)
    for index, shape in {0: (fc, inputs * 49), 3: (fc, fc), 6: (1000, fc)}.items():
        state |= {f"classifier.{index}.weight": torch.randn(shape), f"classifier.{index}.bias": torch.randn(shape[0])}
    return state


@pytest.mark.parametrize(("fc6", "taps"), [("fcn", range(7)), ("4x4", (0, 2, 4, 6)), ("largefov", (0, 3, 6)), (None, None)])
def test_torchvision_vgg16(fc6, taps):
    state = torchvision_vgg16(1 / 16)
    backbone = VGG16(fc6=fc6, width_mult=1 / 16, in_channels=4)
    load_backbone(backbone, state, "vgg16.pth")
    assert backbone.features[0].weight[:, :3].equal(state["features.0.weight"])
    torch.testing.assert_close(backbone.features[0].weight[:, 3], state["features.0.weight"].mean(1))
    assert backbone.features[28].weight.equal(state["features.28.weight"])
    if fc6 is None:
        return
    fc = state["classifier.0.weight"].reshape(256, 32, 7, 7)
    assert backbone.fc6.weight.shape[0] == (64 if fc6 == "largefov" else 256)
    # Each filter is one of the published ones, at every second or third tap; fc7 reads the same filters.
    taps = torch.tensor(list(taps))
    thinned = fc[:, :, taps][:, :, :, taps]
    kept = [int((thinned == filter).flatten(1).all(1).nonzero()) for filter in backbone.fc6.weight]
    assert kept == sorted(set(kept))
    assert backbone.fc6.bias.equal(state["classifier.0.bias"][kept])
    columns = state["classifier.3.weight"][:, kept]
    rows = [int((columns == row.flatten()).all(1).nonzero()) for row in backbone.fc7.weight]
    assert backbone.fc7.bias.equal(state["classifier.3.bias"][rows])
    assert len(set(rows)) == len(rows)


def test_branches_of_deeplab_v2_start_with_fc6_and_fc7(tmp_path):
    state = torchvision_vgg16(1 / 16)
    torch.save(state, tmp_path / "vgg16.pth")
    model = create_model("deeplabv2_vgg16", 5, weights_backbone=tmp_path / "vgg16.pth", width_mult=1 / 16, fc_channels=64)
    largefov = VGG16(fc6="largefov", width_mult=1 / 16)
    load_backbone(largefov, state, "vgg16.pth")
    for branch in model.classifier.branches:
        for ours, theirs in ((branch[0], largefov.fc6), (branch[3], largefov.fc7)):
            assert ours.weight.equal(theirs.weight)
            assert ours.bias.equal(theirs.bias)
    assert model.backbone.features[28].weight.equal(state["features.28.weight"])


def test_subsampling_is_repeatable():
    parts = [(torch.randn(8, 2, 7, 7), torch.randn(8)), (torch.randn(8, 8, 1, 1), torch.randn(8))]
    first, second = subsampled(*parts, 4, 3), subsampled(*parts, 4, 3)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert [list(part.shape) for part in first] == [[4, 2, 3, 3], [4], [4, 4, 1, 1], [4]]


def test_misfits_of_a_classification_file_are_named():
    state = torchvision_vgg16(1 / 16)
    state["features.30.weight"] = state.pop("features.28.weight")
    state["features.5.bias"] = torch.zeros(3)
    state["classifier.0.weight"] = state["classifier.0.weight"][:, :-1]
    with pytest.raises(ValueError, match=r"vgg16\.pth does not fit VGG16") as error:
        load_backbone(VGG16(fc6="fcn", width_mult=1 / 16), state, "vgg16.pth")
    for text in ("missing features.28.weight", "unexpected features.30.weight", "features.5.bias has shape [3], expected [8]",
                 "fc6.weight has shape [256, 1567], expected [256, 32, 7, 7]"):  # fmt: skip
        assert text in str(error.value)


def test_caffe_classification_networks_take_our_normalisation(tmp_path):
    """conv1 of RGB that is normalised our way is Caffe's conv1 of its own input, away from the border."""
    vgg = VGG16(fc6="fcn", width_mult=1 / 16)
    alexnet, googlenet = AlexNet(width_mult=1 / 16), GoogLeNet(width_mult=1 / 16)
    inception = [f"inception_{i}/{part}" for i in INCEPTIONS
                 for part in ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj")]  # fmt: skip
    layers = {
        vgg: [*VGG, "fc6", "fc7"],
        alexnet: ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"],
        googlenet: ["conv1/7x7_s2", "conv2/3x3_reduce", "conv2/3x3", *inception],
    }
    image = torch.rand(2, 3, 20, 20)
    caffe = 255 * image.flip(1) - torch.tensor((104.00699, 116.66877, 122.67892))[:, None, None]
    given = (image - torch.tensor(vgg.input_mean)[:, None, None]) / torch.tensor(vgg.input_std)[:, None, None]
    for backbone, names in layers.items():
        modules = convolutions(backbone)
        blobs = {name: [torch.randn_like(c.weight), torch.randn_like(c.bias)] for name, c in zip(names, modules, strict=True)}
        flat = {name: [b.flatten(1)[None, None] if name in ("fc6", "fc7") and i == 0 else b for i, b in enumerate(both)]
                for name, both in blobs.items()}  # fmt: skip
        for extra in ("loss1/conv", "loss3/classifier") if backbone is googlenet else ("fc8",):
            flat[extra] = [torch.zeros(10, 3), torch.zeros(10)]
        path = tmp_path / "net.caffemodel"
        path.write_bytes(network(flat))
        load_backbone(backbone, read_state_dict(path), "net")
        with torch.no_grad():
            expected = F.conv2d(caffe, *blobs[names[0]])
            actual = F.conv2d(given, modules[0].weight, modules[0].bias)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        for name, module in list(zip(names, modules, strict=True))[1:]:
            assert module.weight.equal(blobs[name][0]), name
            assert module.bias.equal(blobs[name][1]), name


def test_torchvision_alexnet_and_googlenet():
    backbone = AlexNet(form="torchvision", width_mult=1 / 16)
    names = {"conv1": "features.0", "conv2": "features.3", "conv3": "features.6", "conv4": "features.8", "conv5": "features.10",
             "fc6": "classifier.1", "fc7": "classifier.4"}  # fmt: skip
    state = {}
    for ours, theirs in names.items():
        module = backbone.get_submodule(ours)
        weight = torch.randn_like(module.weight)
        state[f"{theirs}.weight"] = weight.flatten(1) if ours.startswith("fc") else weight
        state[f"{theirs}.bias"] = torch.randn_like(module.bias)
    load_backbone(backbone, state | {"classifier.6.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(2)}, "alexnet")
    assert backbone.fc6.weight.flatten(1).equal(state["classifier.1.weight"])
    assert backbone.conv5.weight.equal(state["features.10.weight"])

    googlenet = GoogLeNet(form="torchvision", width_mult=1 / 16)
    units = ["conv1", "conv2", "conv3"]
    units += [f"inception{i}.{branch}" for i in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
              for branch in ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")]  # fmt: skip
    published = {}
    for unit in units:
        norm = googlenet.get_submodule(f"{unit}.bn")
        published[f"{unit}.conv.weight"] = torch.randn_like(googlenet.get_submodule(f"{unit}.conv").weight)
        published |= {f"{unit}.bn.{k}": torch.rand(norm.num_features) for k in ("weight", "bias", "running_mean", "running_var")}
    assert {key for key in googlenet.state_dict() if "num_batches" not in key} == set(published)
    load_backbone(googlenet, published | {"fc.weight": torch.zeros(1), "aux1.conv.conv.weight": torch.zeros(1)}, "googlenet")
    assert all(googlenet.state_dict()[key].equal(value) for key, value in published.items())
    assert googlenet.input_mean == (0.5, 0.5, 0.5)
