"""Metrics, losses, schedules, optimiser groups, averaging, inference and pictures, each against a plain computation."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segmodels.config import TrainConfig, load_config
from segmodels.data.transforms import to_tensor
from segmodels.engine.build import build_predictor
from segmodels.engine.inference import Predictor
from segmodels.engine.losses import SegmentationLoss, balanced_weights
from segmodels.engine.metrics import ConfusionMatrix
from segmodels.engine.optim import ModelEma, build_optimizer, parameter_groups
from segmodels.engine.schedules import Schedule
from segmodels.engine.visualize import colorize, legend, overlay, sheet, write_png
from segmodels.refine import CRFRNN, DenseCRF, DomainTransform, unary_from_probabilities


class Pointwise(nn.Module):
    """Logits at half size by a 1x1 convolution: cheap, and what it computes is easy to say."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Conv2d(4, classes, 1)

    def logits(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.classifier(self.norm(self.backbone(x[..., ::2, ::2])))}


def brute_force(predictions: list[np.ndarray], targets: list[np.ndarray], classes: int) -> dict[str, float]:
    pairs = [
        (int(p), int(t))
        for prediction, target in zip(predictions, targets, strict=True)
        for p, t in zip(prediction.ravel(), target.ravel(), strict=True)
        if t != 255
    ]
    ious, accuracies, weighted = [], [], 0.0
    for c in range(classes):
        both = sum(p == c and t == c for p, t in pairs)
        either = sum(c in (p, t) for p, t in pairs)
        truth = sum(t == c for _, t in pairs)
        if either:
            ious.append(both / either)
            weighted += truth / len(pairs) * both / either
        if truth:
            accuracies.append(both / truth)
    return {
        "miou": sum(ious) / len(ious),
        "pixel_accuracy": sum(p == t for p, t in pairs) / len(pairs),
        "mean_accuracy": sum(accuracies) / len(accuracies),
        "fwiou": weighted,
    }


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_a_brute_force_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = 6  # 5 never occurs anywhere, 4 only in the prediction
    matrix, parts = ConfusionMatrix(classes), [ConfusionMatrix(classes), ConfusionMatrix(classes)]
    predictions, targets = [], []
    for index, shape in enumerate([(5, 7), (1, 1), (8, 3)]):
        predictions.append(rng.integers(0, 5, shape).astype(np.uint8))
        targets.append(rng.choice([0, 1, 2, 3, 255], shape).astype(np.uint8))
        tensors = torch.from_numpy(predictions[-1]), torch.from_numpy(targets[-1])
        matrix.update(*tensors)
        parts[index % 2].update(*tensors)
    expected = brute_force(predictions, targets, classes)
    # float64 sums of a handful of terms in another order
    assert matrix.scores() == pytest.approx(expected, rel=1e-12)
    parts[0].merge(parts[1])
    assert torch.equal(parts[0].matrix, matrix.matrix)
    assert matrix.matrix.dtype == torch.int64
    assert math.isnan(matrix.iou()[5])
    assert matrix.iou()[4] == 0
    document = matrix.to_dict(list("abcdef"))
    assert document["iou"]["f"] is None
    assert document["miou"] == matrix.scores()["miou"]


def test_confusion_matrix_refuses_what_it_cannot_count() -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"target holds classes 0 to 7: expected 0 to 2"):
        matrix.update(torch.zeros(2, dtype=torch.long), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="equal shapes"):
        matrix.update(torch.zeros(2), torch.zeros(3))
    matrix.update(torch.zeros(4, dtype=torch.long), torch.full((4,), 255))
    assert matrix.matrix.sum() == 0
    assert matrix.to_dict(["a", "b", "c"])["miou"] is None


def test_poly_schedule_values() -> None:
    schedule = Schedule(total=100, power=0.9)
    assert schedule.factor(0) == 1
    assert schedule.factor(50) == pytest.approx(0.5**0.9)
    assert schedule.factor(99) == pytest.approx(0.01**0.9)
    warm = Schedule(total=100, power=0.9, warmup=10, warmup_start=0.1)
    assert warm.factor(0) == pytest.approx(0.1)
    assert warm.factor(5) == pytest.approx(0.95**0.9 * 0.55)
    assert warm.factor(10) == schedule.factor(10)
    with pytest.raises(ValueError, match="iteration 100: expected 0 to 99"):
        schedule.factor(100)
    with pytest.raises(ValueError, match="warm-up of 100 iterations"):
        Schedule(total=100, warmup=100)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_weighted_mean_over_labelled_pixels(smoothing: float) -> None:
    weight = torch.tensor([1.0, 2.0, 0.5])
    low, aux = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 2)
    target = torch.randint(0, 3, (2, 8, 9))
    target[0, :3] = 255
    loss = SegmentationLoss(weight, smoothing, aux_weight=0.4)({"out": low, "aux": aux}, target)

    def plain(logits: torch.Tensor) -> torch.Tensor:
        log = F.interpolate(logits.double(), size=(8, 9), mode="bilinear", align_corners=False).log_softmax(1)
        kept = target != 255
        wanted = target.where(kept, 0)
        hard = -(log * weight[:, None, None]).gather(1, wanted[:, None])[:, 0][kept].sum()
        soft = -(log * weight[:, None, None]).sum(1)[kept].sum() / 3
        return ((1 - smoothing) * hard + smoothing * soft) / weight[target[kept]].sum()

    # float32 against float64 over about 100 terms of order one
    assert float(loss) == pytest.approx(float(plain(low) + 0.4 * plain(aux)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_the_upsampled_logits(dtype: torch.dtype) -> None:
    weight = torch.rand(11) + 0.5
    target = torch.randint(0, 11, (2, 90, 75))
    target[torch.rand(target.shape) < 0.2] = 255
    logits = (3 * torch.randn(2, 11, 6, 5)).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    loss = SegmentationLoss(weight, 0.1)({"out": logits}, target)
    plain = F.interpolate(logits.float(), size=(90, 75), mode="bilinear", align_corners=False)
    plain = F.cross_entropy(plain, target, weight, ignore_index=255, label_smoothing=0.1)
    (gradient,), (plain_gradient,) = (torch.autograd.grad(value, logits) for value in (loss, plain))
    assert loss.dtype is torch.float32
    assert gradient.dtype is dtype
    # ten thousand float32 terms of order one in another order; a bf16 gradient is rounded once
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    scale = plain_gradient.abs().max()
    torch.testing.assert_close(gradient / scale, plain_gradient / scale, rtol=0, atol=1e-5 if dtype is torch.float32 else 2**-7)


def test_loss_without_labelled_pixels_is_zero_and_harmless() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = SegmentationLoss()({"out": logits}, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_balanced_weights() -> None:
    label = np.array([[0] * 8 + [1] * 2 + [255] * 6], np.uint8)
    weights = balanced_weights([label], 3, 0.5)
    assert weights[1] / weights[0] == pytest.approx(2.0)  # (0.8 / 0.2) ** 0.5
    assert 0.8 * weights[0] + 0.2 * weights[1] == pytest.approx(1.0)
    assert weights[2] == 0
    with pytest.raises(ValueError, match="the training split has none"):
        balanced_weights([np.full((2, 2), 255, np.uint8)], 3, 0.5)


def test_parameter_groups_separate_backbone_and_decay() -> None:
    model = Pointwise()
    settings = TrainConfig(lr=0.1, weight_decay=0.01, backbone_rate=0.5)
    found = {}
    for group in parameter_groups(model, settings):
        for parameter in group["params"]:
            name = next(name for name, other in model.named_parameters() if other is parameter)
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    assert found == {
        "backbone.weight": (0.05, 0.01), "backbone.bias": (0.05, 0.0), "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0), "classifier.weight": (0.1, 0.01), "classifier.bias": (0.1, 0.0),
    }  # fmt: skip
    everything = parameter_groups(model, TrainConfig(weight_decay=0.01, decay_norm_and_bias=True))
    assert {group["weight_decay"] for group in everything} == {0.01}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_schedule_sets_the_rate_of_each_group(name: str) -> None:
    optimizer = build_optimizer(Pointwise(), TrainConfig(optimizer=name, lr=0.1, backbone_rate=0.5))
    factor = Schedule(10).apply(optimizer, 5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.05 * factor, 0.1 * factor])


def test_ema_follows_its_recurrence() -> None:
    model = Pointwise()
    ema = ModelEma(model, 0.5)
    expected = {key: value.double().clone() for key, value in model.state_dict().items()}
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
            model.norm.running_mean += 1
            model.norm.num_batches_tracked += 1
        ema.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {key: decay * expected[key] + (1 - decay) * value for key, value in model.state_dict().items()}
    for key, value in ema.module.state_dict().items():
        wanted = model.norm.num_batches_tracked if key.endswith("tracked") else expected[key]
        # a dozen float32 roundings of values of order one
        torch.testing.assert_close(value.double(), wanted.double(), rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (6, 8), (17, 5)])
def test_predictor_averages_probabilities_over_scales_and_mirrorings(size: tuple[int, int]) -> None:
    model = Pointwise().train()
    predictor = Predictor(model, scales=(0.5, 1.0, 1.5), flip=True)
    images = torch.randn(1, 3, *size)
    found = predictor.probabilities(images)
    assert model.training, "training mode is restored"
    model.eval()
    parts = []
    with torch.no_grad():
        for scale in (0.5, 1.0, 1.5):
            resized = images
            if scale != 1:
                # Python rounds halves to even, as the predictor does
                shape = [max(1, round(side * scale)) for side in size]
                resized = F.interpolate(images, size=shape, mode="bilinear", align_corners=False)
            for mirrored in (False, True):
                logits = model.logits(resized.flip(3) if mirrored else resized)["out"]
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
                parts.append((logits.flip(3) if mirrored else logits).softmax(1))
    # two layouts of the same float32 sums
    torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(1, *size), rtol=0, atol=1e-5)


def test_predictor_takes_the_classes_of_the_upsampled_logits() -> None:
    model = Pointwise(classes=7).eval()
    images = torch.randn(2, 3, 40, 31)
    found = Predictor(model).classes(images)
    with torch.no_grad():
        logits = F.interpolate(model.logits(images)["out"], size=(40, 31), mode="bilinear", align_corners=False)
    short = logits.amax(1) - logits.gather(1, found[:, None])[:, 0]
    assert float(short.max()) < 1e-5  # another class only where float32 cannot tell the two apart


@pytest.mark.parametrize("size", [(9, 12), (12, 16), (18, 24), (40, 10)])
def test_predictor_places_images_on_a_canvas(size: tuple[int, int]) -> None:
    """Top left, zeros behind; larger images are reduced, and their classes have their own size."""
    model = Pointwise(classes=7).eval()
    seen = []
    logits, model.logits = model.logits, lambda x: seen.append(x) or logits(x)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    predictor = Predictor(model, mean=(0.5,) * 3, std=(0.5,) * 3, canvas=(12, 16))
    prediction = predictor(image)
    assert prediction.shape == size
    factor = min(1, 12 / size[0], 16 / size[1])
    height, width = round(size[0] * factor), round(size[1] * factor)
    (placed,) = seen
    assert placed.shape == (1, 3, 12, 16)
    assert not placed[:, :, height:].any()
    assert not placed[..., width:].any()
    if factor == 1:
        expected = torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(placed[0, :, :height, :width], expected, rtol=0, atol=1e-6)  # one float32 rounding


def test_scales_of_a_model_with_aligned_corners_lie_on_its_grid() -> None:
    model = Pointwise().eval()
    model.align_corners = True
    seen = []
    logits, model.logits = model.logits, lambda x: seen.append(x.shape[-1]) or logits(x)
    Predictor(model, scales=(0.5, 0.75, 1.0, 1.75)).probabilities(torch.zeros(1, 3, 65, 65))
    assert seen == [33, 49, 65, 113]


def test_predictor_takes_and_refuses_images() -> None:
    predictor = Predictor(Pointwise())
    prediction = predictor(np.zeros((5, 7, 3), np.uint8))
    assert prediction.shape == (5, 7)
    assert prediction.dtype == np.uint8
    with pytest.raises(ValueError, match=r"\[5, 7\] and type uint8: expected uint8 \[H, W, 3\]"):
        predictor(np.zeros((5, 7), np.uint8))
    with pytest.raises(ValueError, match=r"scales=\[0\]"):
        Predictor(Pointwise(), scales=[0])


@pytest.mark.parametrize("refine", ["crf", "crf_rnn", "crf_rnn, trained", "dt"])
def test_predictor_refines_by_the_image(refine: str, tmp_path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    model = Pointwise().eval()
    layer = CRFRNN(3).eval()
    settings = {"crf": ["eval.crf=[5,20,10,3,3]"], "dt": ["eval.dt=[5,200]"]}.get(refine, [])
    if refine == "crf_rnn, trained":
        with torch.no_grad():
            layer.spatial_weight.mul_(-2)
        torch.save(layer.state_dict(), tmp_path / "layer.pth")
        settings = [f"eval.crf_rnn={tmp_path / 'layer.pth'}"]
    config, _ = load_config(overrides=[f"eval.refine={refine.split(',')[0]}", *settings])
    predictor = build_predictor(config, model, torch.device("cpu"))
    tensor, _ = to_tensor(image, np.zeros((8, 10), np.uint8), predictor.mean, predictor.std)
    probabilities = predictor.probabilities(tensor[None])
    unary, colours = unary_from_probabilities(probabilities), torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        refined = {
            "crf": lambda: DenseCRF(w1=5, sigma_alpha=20, sigma_beta=10, w2=3, sigma_gamma=3)(unary, colours),
            "dt": lambda: DomainTransform(5, 200)(probabilities, colours),
        }.get(refine, lambda: layer(-unary, colours))()
    assert np.array_equal(predictor(image), refined.argmax(1)[0].numpy())


def test_pictures(tmp_path) -> None:
    colors = np.array([[10, 20, 30], [200, 0, 0]], np.uint8)
    label = np.array([[0, 1], [255, 7]], np.uint8)
    assert colorize(label, colors).tolist() == [[[10, 20, 30], [200, 0, 0]], [[255] * 3, [0] * 3]]
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    flat = np.zeros((6, 8), np.uint8)
    assert np.array_equal(overlay(image, flat, colors, alpha=0), image)
    assert np.array_equal(overlay(image, flat, colors, alpha=1), colorize(flat, colors))
    split = flat.copy()
    split[:, 4:] = 1
    lined = overlay(image, split, colors, alpha=0)
    assert np.array_equal(lined[:, 4], image[:, 4] // 2)
    assert np.array_equal(lined[:, 5:], image[:, 5:])
    with pytest.raises(ValueError, match="equal sizes"):
        overlay(image, flat[1:], colors)
    assert legend(["a", "b"], colors, 40).shape[1] == 40
    page = sheet([(image, flat, split)] * 2, ["a", "b"], colors, cell=60)
    assert page.shape[1] == 3 * 60 + 2 * 4
    write_png(tmp_path / "x.png", image)
    assert np.array_equal(cv2.imread(str(tmp_path / "x.png"))[..., ::-1], image)
