"""What papers do beyond plain training: rates, frozen parts, accumulation, hard pixels and images, stages, precision, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import SETTINGS, write_camvid
from torch import nn

from segmodels import train
from segmodels.backbones import BACKBONES, CLASSIC_BACKBONES
from segmodels.config import ConfigError, TrainConfig, load_config, load_stages
from segmodels.data import SegmentationDataset, create_dataset
from segmodels.data.hard_classes import HardClasses
from segmodels.engine.checkpoints import load_checkpoint
from segmodels.engine.losses import SegmentationLoss, hard_fraction
from segmodels.engine.optim import parameter_groups
from segmodels.engine.parts import prepare_for_training, training_mode
from segmodels.engine.recompute import recompute_blocks
from segmodels.engine.schedules import Schedule
from segmodels.engine.trainer import Trainer, TrainingError


class Toy(nn.Module):
    """Logits at two resolutions; batch norm and dropout only where asked for."""

    def __init__(self, norm: bool = False, classes: int = 11) -> None:
        super().__init__()
        between = [nn.BatchNorm2d(4), nn.Dropout(0.5)] if norm else []
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *between, nn.Tanh())
        self.classifier = nn.Conv2d(4, classes, 1)
        self.aux_classifier = nn.Conv2d(4, classes, 1)

    def logits(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.backbone(x)
        return {"out": self.classifier(features[..., ::2, ::2]), "aux": self.aux_classifier(features[..., ::4, ::4])}


@pytest.fixture(scope="module")
def camvid(tmp_path_factory) -> Path:
    return write_camvid(tmp_path_factory.mktemp("camvid"))


@pytest.fixture
def trainer_of(camvid, tmp_path) -> Callable[..., Trainer]:
    def build(model: nn.Module, *overrides: str) -> Trainer:
        common = [f"data.root={camvid}", "data.name=camvid", "data.crop=[16,16]", "train.batch_size=4", "run.tensorboard=false"]
        config, raw = load_config(None, [*common, *overrides])
        train_set, val_set = (create_dataset("camvid", camvid, split) for split in ("train", "val"))
        return Trainer(config, raw, tmp_path, model, train_set, val_set, torch.device("cpu"))

    return build


# Rates ----------------------------------------------------------------------------------------------------------------


def test_step_and_constant_schedules() -> None:
    step = Schedule(6000, kind="step", steps=(2000, 4000))
    assert [step.factor(i) for i in (0, 1999, 2000, 3999, 4000, 5999)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert Schedule(10, kind="constant").factor(9) == 1
    slow = Schedule(10, kind="constant", warmup=4, warmup_start=0.25, warmup_kind="constant")
    assert [slow.factor(i) for i in (0, 3, 4)] == [0.25, 0.25, 1]
    rising = Schedule(10, kind="constant", warmup=4, warmup_start=0.5)
    assert [rising.factor(i) for i in (0, 2, 4)] == [0.5, 0.75, 1]
    with pytest.raises(ValueError, match=r"steps=\[2000, 6000\]: expected iterations before the last of 6000"):
        Schedule(6000, kind="step", steps=(2000, 6000))


def test_rates_of_heads_biases_and_named_parts() -> None:
    model = Toy(norm=True)
    named = {"aux_classifier": 4, "backbone.0": 3, "backbone.0.weight": 0}
    settings = TrainConfig(lr=0.5, head_rate=10, bias_rate=2, rates=named)
    groups = parameter_groups(model, settings)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    decay = settings.weight_decay
    assert found == {
        "backbone.0.weight": (0, decay), "backbone.0.bias": (3.0, 0),
        "backbone.1.weight": (0.5, 0), "backbone.1.bias": (0.5, 0),  # a shift of batch norm is no bias
        "classifier.weight": (5.0, decay), "classifier.bias": (10.0, 0),
        "aux_classifier.weight": (2.0, decay), "aux_classifier.bias": (4.0, 0),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"train\.rates: Toy has no part 'head'; expected a module or parameter: backbone"):
        parameter_groups(model, TrainConfig(rates={"head": 10}))


def test_frozen_parts_do_not_move_and_compute_as_in_evaluation() -> None:
    model = Toy(norm=True)
    settings = TrainConfig(freeze=["backbone.0", "backbone.2"], freeze_norm=True, norm_decay=0.9997)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepare_for_training(model, settings)
    training_mode(model, settings)
    assert model.backbone[1].momentum == pytest.approx(0.0003)
    assert [module.training for module in model.backbone] == [False, False, False, True]
    optimizer = torch.optim.SGD(parameter_groups(model, settings), lr=1)
    images = torch.randn(2, 3, 8, 8)
    logits = model.logits(images)
    assert torch.equal(logits["out"], model.eval().logits(images)["out"])
    (logits["out"].sum() + logits["aux"].sum()).backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"classifier.weight", "classifier.bias", "aux_classifier.weight", "aux_classifier.bias"}
    with pytest.raises(ValueError, match=r"leaves no parameter to train"):
        prepare_for_training(model, TrainConfig(freeze=["backbone", "classifier", "aux_classifier"]))
    with pytest.raises(ValueError, match=r"train\.freeze: Toy has no part 'backbone\.9'"):
        prepare_for_training(model, TrainConfig(freeze=["backbone.9"]))


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ("train.label_smoothing=0.1", "train.class_weights=[1,2,3,1,1,2,1,1,0.5,1,1]"),
        ("train.labels_at=scores",),
        ("train.reduction=sum",),
    ],
)
def test_accumulated_gradient_is_that_of_the_large_batch(trainer_of, settings: tuple[str, ...]) -> None:
    """The parts differ in how many pixels are labelled: one has none at all."""
    model = Toy().double()
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randint(0, 11, (4, 16, 16))
    labels[0, :11] = labels[3, 5] = 255
    labels[1] = 255
    found = []
    for parts in (1, 2, 4):
        trainer = trainer_of(model, *settings, f"train.accumulate={parts}")
        model.zero_grad()
        loss = trainer._backward(images, labels, np.arange(4), ["a"] * 4)
        found.append((loss, [parameter.grad.clone() for parameter in model.parameters()]))
    for loss, gradients in found[1:]:
        # float64 sums of a thousand terms of order one, in another order
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-10, atol=1e-12)


def test_summed_loss_and_hard_pixels() -> None:
    logits, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 16, 16))
    labels[0, :4] = 255
    each = F.cross_entropy(F.interpolate(logits, size=(16, 16), mode="bilinear"), labels, ignore_index=255, reduction="none")
    each = each[labels != 255]
    torch.testing.assert_close(SegmentationLoss(reduction="sum")({"out": logits}, labels), each.sum())
    hardest = each.sort(descending=True).values[: -(-each.numel() // 4)]
    torch.testing.assert_close(SegmentationLoss(hard_fraction=0.25)({"out": logits}, labels), hardest.mean())
    settings = TrainConfig(hard_fraction=0.25, hard_fraction_iterations=100)
    assert [hard_fraction(settings, i) for i in (0, 50, 100, 1000)] == [1, 0.625, 0.25, 0.25]
    assert hard_fraction(TrainConfig(hard_fraction=0.25), 0) == 0.25


def test_images_of_hard_classes_come_more_often() -> None:
    class Numbers(SegmentationDataset):
        def __init__(self) -> None:
            super().__init__(["a", "b", "c"], np.zeros((3, 3)), "train", 4)

        def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            label = np.full((2, 2), [0, 1, 2, 255][index], np.uint8)
            return np.full((2, 2, 3), index, np.uint8), label

        def name(self, index: int) -> str:
            return str(index)

    hard = HardClasses(Numbers(), ["b", "c"], copies=3)
    assert [hard.name(index) for index in range(len(hard))] == list("0123") + list("1212")
    assert hard[6][0].max() == 1
    with pytest.raises(ValueError, match=r"hard class 'sofa': expected a class of Numbers.*, a, b, c"):
        HardClasses(Numbers(), ["sofa"])


# Precision and memory -------------------------------------------------------------------------------------------------


def test_fp16_leaves_out_a_step_whose_scale_was_too_large(trainer_of) -> None:
    trainer = trainer_of(Toy(), "train.amp=fp16", "train.iterations=3", "train.lr=0.1")
    assert trainer.run() is None
    assert load_checkpoint(trainer.work_dir / "last.pt")["scaler"]["scale"] == 2.0**16

    trainer.iteration = 0
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    reporter = type("Silent", (), {"update": lambda *_: None})()
    trainer._step(reporter)
    assert trainer.scaler.get_scale() == 2.0**59
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))

    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.model.classifier.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="iteration 1: the norm of the gradient is nan"):
        trainer._step(reporter)


def test_compiled_network_has_the_same_gradient(trainer_of, monkeypatch) -> None:
    # What is compiled is our business; how, the framework's: its fastest backend to build.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = Toy()
    images, labels = torch.randn(4, 3, 16, 16), torch.randint(0, 11, (4, 16, 16))
    found = []
    for compiled in ("false", "true"):
        trainer = trainer_of(model, f"train.compile={compiled}")
        model.zero_grad()
        trainer._backward(images, labels, np.arange(4), ["a"] * 4)
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        assert (trainer._logits == model.logits) is (compiled == "false")
    torch.testing.assert_close(found[0], found[1])  # the framework's tolerances for equal operations in fp32


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"width_mult": 0.125}),
        ("mobilenetv2", {"width_mult": 0.25}),
        ("xception65", {"width_mult": 0.05, "middle_repeats": 2}),
        ("googlenet", {"width_mult": 0.125, "form": "torchvision"}),
    ],
)
def test_recomputed_blocks_change_nothing_but_memory(name: str, options: dict) -> None:
    def run(recompute: bool) -> tuple[int, dict[str, torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        backbone = (BACKBONES | CLASSIC_BACKBONES)[name](**options)
        keys = list(backbone.state_dict())
        if recompute:
            recompute_blocks(backbone)
        assert list(backbone.state_dict()) == keys
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        images = torch.randn(2, 3, 65, 65)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = backbone(images)
        sum(value.square().mean() for value in features.values()).backward()
        return kept, backbone.state_dict(), [parameter.grad for parameter in backbone.parameters()]

    kept, state, gradients = run(False)
    less, state_again, gradients_again = run(True)
    assert less < kept / 2
    assert all(torch.equal(state[key], state_again[key]) for key in state), "running statistics count every batch once"
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


def test_a_backbone_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint_blocks=True: VGG16 is no chain of blocks"):
        recompute_blocks(CLASSIC_BACKBONES["vgg16"](width_mult=0.05))


# Settings and stages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.accumulate=3"], r"train\.accumulate=3: expected a divisor of train\.batch_size=16"),
        (["train.schedule=step"], r"train\.steps=\[\] with train\.schedule=step"),
        (["train.steps=[5]"], r"train\.steps=\[5\] with train\.schedule=poly"),
        (["train.schedule=step", "train.steps=[5,2]"], r"train\.steps=\[5, 2\]: expected iterations in ascending order"),
        (["train.rates={classifier: fast}"], r"train\.rates=\{classifier: 'fast'\}: expected a factor, >= 0"),
        (["train.compile=true", "train.checkpoint_blocks=true"], r"train\.checkpoint_blocks=True with train\.compile=True"),
        (["eval.mode=slide"], r"eval\.window=None with eval\.mode=slide"),
        (["eval.mode=tile", "eval.window=[8,8]", "eval.margin=4"], r"eval\.margin=4: expected less than half of eval\.window"),
        (["eval.margin=4"], r"eval\.margin=4 with eval\.mode=whole"),
        (["eval.canvas=[9,9]", "eval.long_side=9"], r"eval\.canvas=\[9, 9\]: expected eval\.mode=whole and no eval\.long_side"),
        (["weak.method=em_fixed", "weak.labels=x", "train.accumulate=2"], r"train\.accumulate=2 with weak\.method=em_fixed"),
    ],
)
def test_settings_that_do_not_fit_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_stages_build_on_each_other() -> None:
    recipe = {
        "train": {"lr": 1.0},
        "stages": [
            {"model": {"weights": "coco.pt", "weights_skip": ["classifier"]}},
            {"train": {"lr": 2.0}, "data": {"name": "voc"}},
            {},
        ],
    }
    stages = [config for config, _ in load_stages(recipe, ["train.power=1"])]
    assert [(c.train.lr, c.train.power, c.data.name) for c in stages] == [(1, 1, "synthetic"), (2, 1, "voc"), (2, 1, "voc")]
    assert [c.model.weights_skip for c in stages] == [["classifier"], [], []]
    assert load_config(recipe)[0].train.lr == 2
    with pytest.raises(ConfigError, match=r"stages=\[\] in the configuration: expected a list of sections"):
        load_stages({"stages": []})
    with pytest.raises(ConfigError, match=r"unknown key train\.lrr \(value 1\) in stage 2 of the configuration"):
        load_stages({"stages": [{}, {"train": {"lrr": 1}}]})


def test_train_runs_the_stages_of_a_recipe(camvid, tmp_path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stages:\n- train: {iterations: 2}\n- model: {output_stride: 8, weights_skip: [classifier.predict]}\n"
        "  train: {iterations: 1, lr: 1.0e-12, warmup_iterations: 0, freeze_norm: true}\n"
        "  data: {rotation: 10, blur: 0.5, hard_classes: [road], scale_step: 0.25}\n"
    )  # fmt: skip
    settings = [s for s in SETTINGS if not s.startswith(("train.iterations", "train.lr", "train.warmup"))]
    command = ["--config", str(recipe), "--work-dir", str(tmp_path / "run"), f"data.root={camvid}", *settings]
    assert train.main(command) == 0
    first, second = (load_checkpoint(tmp_path / "run" / f"stage{number}" / "last.pt") for number in (1, 2))
    assert second["config"]["model"]["output_stride"] == 8
    weights, skipped = first["ema"]["model"], 0
    for key, value in second["model"].items():
        if key.startswith("classifier.predict."):
            skipped += int(not torch.equal(value, weights[key]))
        elif value.is_floating_point():
            # A rate near zero: fp32 values around 1 stay, and frozen statistics are the first stage's.
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-6)
    assert skipped, "this part keeps its initialisation"
    capsys.readouterr()
    assert train.main([*command, "--resume"]) == 0, "nothing is left to do"
    assert "iteration" not in capsys.readouterr().out
