"""Submissions, and scores against those of the benchmarks' own tools."""

from __future__ import annotations

import types

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segmodels import create_model, predict
from segmodels.config import load_config
from segmodels.data import class_names, voc_colormap
from segmodels.data.cityscapes import LABEL_IDS
from segmodels.engine.checkpoints import save_checkpoint
from segmodels.engine.metrics import ConfusionMatrix
from segmodels.engine.submission import write_submission


def maps(classes: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Truths with void, and predictions that are right more often than not; the last two classes only in the latter."""
    rng = np.random.default_rng(seed)
    truths = [rng.integers(0, classes - 2, size).astype(np.uint8) for size in ((9, 14), (20, 6))]
    predictions = [np.where(rng.random(t.shape) < 0.6, t, rng.integers(0, classes - 1, t.shape)).astype(np.uint8) for t in truths]
    for truth in truths:
        truth[rng.random(truth.shape) < 0.1] = 255
    return truths, predictions


def scored(truths: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    for truth, prediction in zip(truths, predictions, strict=True):
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    return matrix


def test_predict_writes_a_submission_to_voc(tmp_path) -> None:
    config, raw = load_config({"data": {"name": "voc"}, "model": {
        "name": "fcn_resnet18", "output_stride": 8, "options": {"width_mult": 0.125}}})  # fmt: skip
    classes, colors = class_names("voc")
    model = create_model(config.model.name, len(classes), 8, **config.model.options)
    state = {"config": raw, "classes": classes, "colors": colors.tolist(), "iteration": 0, "model": model.state_dict()}
    save_checkpoint(tmp_path / "model.pt", state)
    image = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "2008_000006.png"), image)
    command = ["--checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "out"), str(tmp_path / "2008_000006.png"),
               "--threads", "1", "--slide", "17", "17"]  # fmt: skip
    assert predict.main([*command, "--submission", "voc"]) == 0
    assert predict.main([*command, "--masks"]) == 0
    written = Image.open(tmp_path / "out" / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls" / "2008_000006.png")
    mask = cv2.imread(str(tmp_path / "out" / "2008_000006_mask.png"), cv2.IMREAD_UNCHANGED)
    assert written.mode == "P"
    assert np.array_equal(np.array(written), mask)
    assert np.array_equal(np.array(written.convert("RGB")), voc_colormap(21)[mask])
    with pytest.raises(ValueError, match="a submission to ade20k has 150 classes: expected a network with as many, not 21"):
        predict.main([*command, "--submission", "ade20k"])
    with pytest.raises(ValueError, match="submission 'coco': expected one of cityscapes, ade20k, voc"):
        predict.main([*command, "--submission", "coco"])


def test_ade20k_counts_from_one(tmp_path) -> None:
    label = np.array([[0, 149], [7, 30]], np.uint8)
    path = write_submission("ade20k", tmp_path, "ADE_val_00000001", label)
    assert path == tmp_path / "ADE_val_00000001.png"
    assert np.array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), label + 1)


def test_scores_are_those_of_cityscapesscripts(tmp_path) -> None:
    """Of files that the submission writer made, found and read by the official evaluation."""
    name = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    official = pytest.importorskip(name, reason="cityscapesscripts is not installed")
    truths, predictions = maps(19, seed=0)
    ids = np.zeros(256, np.uint8)  # void is id 0
    ids[:19] = LABEL_IDS
    pairs = []
    for index, (truth, prediction) in enumerate(zip(truths, predictions, strict=True)):
        stem = f"ulm_00000{index}_000019"
        write_submission("cityscapes", tmp_path / "results", f"{stem}_leftImg8bit", prediction)
        cv2.imwrite(str(tmp_path / f"{stem}_gtFine_labelIds.png"), ids[truth])
        settings = types.SimpleNamespace(predictionPath=str(tmp_path / "results"), predictionWalk=None)
        truth_file = str(tmp_path / f"{stem}_gtFine_labelIds.png")
        pairs.append((official.getPrediction(settings, truth_file), truth_file))
    settings = vars(official.args) | {"quiet": True, "JSONOutput": False, "evalInstLevelScore": False}
    result = official.evaluateImgLists(*map(list, zip(*pairs, strict=True)), types.SimpleNamespace(**settings))
    matrix = scored(truths, predictions, 19)
    names = [label.name for label in official.labels if not label.ignoreInEval]
    # quotients of the same integers
    np.testing.assert_allclose([result["classScores"][name] for name in names], matrix.iou().numpy(), rtol=1e-14)
    assert result["averageScoreClasses"] == pytest.approx(matrix.scores()["miou"], rel=1e-14)


def test_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    truths, predictions = maps(7, seed=1)
    matrix = scored(truths, predictions, 7)
    truth, prediction = (np.concatenate([one.ravel() for one in many]) for many in (truths, predictions))
    kept = truth != 255
    truth, prediction = truth[kept], prediction[kept]
    assert np.array_equal(matrix.matrix.numpy(), metrics.confusion_matrix(truth, prediction, labels=range(7)))
    present = sorted(set(truth) | set(prediction))
    expected = metrics.jaccard_score(truth, prediction, labels=present, average=None)
    # quotients of the same integers
    np.testing.assert_allclose(matrix.iou().numpy()[present], expected, rtol=1e-14)
    scores = matrix.scores()
    assert scores["miou"] == pytest.approx(expected.mean(), rel=1e-14)
    assert scores["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(truth, prediction), rel=1e-14)
    in_truth = sorted(set(truth))
    recall = metrics.recall_score(truth, prediction, labels=in_truth, average=None)
    assert scores["mean_accuracy"] == pytest.approx(recall.mean(), rel=1e-14)
    weights = np.bincount(truth, minlength=7)[in_truth] / truth.size
    assert scores["fwiou"] == pytest.approx(float((weights * matrix.iou().numpy()[in_truth]).sum()), rel=1e-14)
