"""Refinements of one network on the VOC subset: ``python -m benchmarks.refinement_comparison [--seeds 0 1 2]``.

The network is the ladder's rung ``strong`` (``python -m benchmarks.weak_ladder strong`` leaves its checkpoints in ``runs/weak``)
and stays as it is, so that rows differ in the refinement alone. Images and label maps are halved, which is the size that the
network was trained at. Parameters are searched on every second validation image, results are those of the others. The CRF-RNN and
the edges of the domain transform are trained for a few iterations on training crops. Each seed leaves
``results/refinement/strong_seedN.json``, of which :mod:`benchmarks.report` makes a table, and pictures and the trained layers in
``runs/refinement``; one that is kept is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmodels.data import SegmentationDataset
from segmodels.data.loader import build_loader
from segmodels.data.transforms import to_tensor
from segmodels.engine import report
from segmodels.engine.build import (
    build_dataset,
    build_train_set,
    build_transforms,
    load_trained,
    normalization,
    prepare_runtime,
)
from segmodels.engine.checkpoints import write_json
from segmodels.engine.cli import run_command
from segmodels.engine.metrics import ConfusionMatrix
from segmodels.engine.progress import Reporter, say
from segmodels.engine.visualize import sheet, write_png
from segmodels.heads.edge_net import EdgeNet
from segmodels.refine import CRFRNN, DenseCRF, DomainTransform, search, unary_from_scores

RESULTS = Path(__file__).parent / "results" / "refinement"
ITERATIONS, BATCH, CROP = 60, 4, 193
# Widths in pixels of the halved images; DeepLab v1 searches 50 to 100 pixels, 3 to 10 colours and weights 5 and 10 at full size.
CRF = DenseCRF(w2=3, sigma_gamma=1)
CRF_GRID = {"w1": (4, 8), "sigma_alpha": (40, 80), "sigma_beta": (8, 13)}
DT_GRID = {"sigma_s": (20.0, 40.0, 80.0, 160.0), "sigma_r": (50.0, 150.0, 500.0)}
LEVELS = ("low", "aux")  # of the backbone, which EdgeNet reads
METHODS = {  # what the rows of the report are called
    "model": "the network alone",
    "crf": "DenseCRF, parameters searched",
    "crf_default": "DenseCRF, parameters of DeepLab v2",
    "crf_rnn": "CRF-RNN, trained",
    "dt": "domain transform along image gradients, widths searched",
    "dt_edge_net": "domain transform along EdgeNet's edges, trained",
}
Scored = tuple[Tensor, Tensor, Tensor]  # scores [1, C, H, W], image uint8 [1, 3, H, W], labels [1, H, W]
Method = Callable[[Tensor, Tensor], Tensor]  # scores or marginals [N, C, H, W] of scores and image


class Network:
    """Scores of a network that does not learn any more.

    Args:
        model: with ``backbone``.
        mean, std: of its images.
    """

    def __init__(self, model: nn.Module, mean: Any, std: Any) -> None:
        self.model, self.mean, self.std = model.eval().requires_grad_(False), mean, std

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """float32 ``[N, C, H, W]`` of normalised images ``[N, 3, H, W]``."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model.logits(images.contiguous(memory_format=torch.channels_last))["out"]  # type: ignore[operator]
        return F.interpolate(logits.float(), size=images.shape[2:], mode="bilinear", align_corners=False)

    @torch.no_grad()
    def levels(self, images: Tensor) -> list[Tensor]:
        """The features that EdgeNet reads."""
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model.backbone(images.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
        return [features[level].float() for level in LEVELS]

    def normalised(self, colours: Tensor) -> Tensor:
        """Of uint8 ``[1, 3, H, W]``."""
        image = colours[0].permute(1, 2, 0).numpy()
        return to_tensor(image, np.zeros(image.shape[:2], np.uint8), self.mean, self.std)[0][None]

    def colours(self, images: Tensor) -> Tensor:
        """Back to colours from 0 to 255."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((images * std + mean) * 255).clamp(0, 255)


def half_size(dataset: SegmentationDataset, network: Network, indices: list[int]) -> list[Scored]:
    """The images at half their size, with their scores."""
    kept = []
    with Reporter("scores", len(indices)) as reporter:
        for done, index in enumerate(indices):
            image, label = dataset[index]
            height, width = (max(1, side // 2) for side in label.shape)
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
            colours = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
            kept.append((network.scores(network.normalised(colours)), colours, torch.from_numpy(label)[None].long()))
            reporter.update(done + 1, "")
    return kept


def classes_of(scores: Tensor) -> np.ndarray:
    return scores[0].argmax(0).to(torch.uint8).numpy()


def scored(method: Method, examples: list[Scored], classes: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    for scores, image, labels in examples:
        matrix.update(method(scores, image).argmax(1), labels)
    return matrix


def filtered(transform: DomainTransform, scores: Tensor, image: Tensor) -> Tensor:
    return transform(scores.softmax(1), image)


def batches(config: Any, network: Network, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``ITERATIONS`` batches of normalised crops and labels, as the network was trained on."""
    loader = build_loader(
        build_train_set(config), build_transforms(config), batch_size=BATCH, seed=seed, drop_last=True,
        mean=network.mean, std=network.std,
    )  # fmt: skip
    return itertools.islice(iter(loader), ITERATIONS)


def trained(name: str, layer: nn.Module, rate: float, config: Any, network: Network, seed: int, forward: Method) -> list[float]:
    """Trains a layer alone, on ``forward(scores, images)``; returns its losses."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    losses: list[float] = []
    layer.train()
    with Reporter(name, ITERATIONS) as reporter:
        for images, labels in batches(config, network, seed):
            loss = F.cross_entropy(forward(network.scores(images), images), labels, ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for group in optimizer.param_groups:  # linearly to zero
                group["lr"] = rate * (1 - (len(losses) + 1) / ITERATIONS)
            losses.append(loss.item())
            reporter.update(len(losses), f"loss {losses[-1]:.4f}")
    layer.eval()
    return losses


def compare(checkpoint: Path, seed: int, pictures: Path) -> dict[str, Any]:
    """One seed; what is committed."""
    began = time.monotonic()
    model, config, _, origin = load_trained(str(checkpoint), None, [])
    prepare_runtime(config)
    torch.manual_seed(seed)
    network = Network(model, **normalization(model))
    dataset = build_dataset(config, config.data.val_split)
    classes = dataset.num_classes
    searched, held_out = (half_size(dataset, network, list(range(first, len(dataset), 2))) for first in (0, 1))

    crf_rnn = CRFRNN(classes, theta_alpha=80)  # half the usual width, as the images are
    losses = {"crf_rnn": trained(
        "CRF-RNN", crf_rnn, 0.02, config, network, seed, lambda scores, images: crf_rnn(scores, network.colours(images))
    )}  # fmt: skip
    edge_net = EdgeNet([model.backbone.channels[level] for level in LEVELS])  # type: ignore[union-attr, index, misc]
    learnt = DomainTransform(50, 1)  # the paper's 100 and 1 at half size

    def along_learnt_edges(scores: Tensor, images: Tensor, colours: Tensor) -> Tensor:
        return learnt(scores, colours, edge_net(network.levels(images), images.shape[2:]))

    losses["dt_edge_net"] = trained(
        "EdgeNet", edge_net, 0.01, config, network, seed,
        lambda scores, images: along_learnt_edges(scores, images, network.colours(images)),
    )  # fmt: skip

    examples = [lambda one=one: (unary_from_scores(one[0]), *one[1:]) for one in searched]
    found = search(CRF, CRF_GRID, examples, classes)
    transforms = [DomainTransform(*widths) for widths in itertools.product(DT_GRID["sigma_s"], DT_GRID["sigma_r"])]
    dt_mious = [scored(partial(filtered, transform), searched, classes).scores()["miou"] for transform in transforms]
    dt = transforms[int(np.argmax(dt_mious))]
    default = DenseCRF.preset("deeplabv2_resnet101", sigma_alpha=67 / 2)
    methods: dict[str, Method] = {
        "model": lambda scores, image: scores,
        "crf": lambda scores, image: found.best(unary_from_scores(scores), image),
        "crf_default": lambda scores, image: default(unary_from_scores(scores), image),
        "crf_rnn": lambda scores, image: crf_rnn(scores, image),
        "dt": partial(filtered, dt),
        "dt_edge_net": lambda scores, image: along_learnt_edges(scores, network.normalised(image), image),
    }
    results = {}
    pictures.mkdir(parents=True, exist_ok=True)
    shown = [held_out[i] for i in np.linspace(0, len(held_out) - 1, 6).round().astype(int)]
    with torch.no_grad():
        for name, method in methods.items():
            results[name] = scored(method, held_out, classes).to_dict(dataset.classes)
            say(f"seed {seed}: {METHODS[name]}: mIoU {results[name]['miou']:.4f}")
            rows = [
                (image[0].permute(1, 2, 0).numpy(), classes_of(scores), classes_of(method(scores, image)))
                for scores, image, _ in shown
            ]
            if name != "model":
                titles = ("image", "before", f"after: {name}")
                write_png(pictures / f"{name}.png", sheet(rows, dataset.classes, dataset.colors, titles=titles))
    for name, layer in (("crf_rnn", crf_rnn), ("edge_net", edge_net)):
        torch.save(layer.state_dict(), pictures / f"{name}.pt")
    return {
        "seed": seed,
        "checkpoint": checkpoint.parent.name,
        "trained_iterations": origin.iteration,
        "commit": report.current_commit(),
        "machine": report.machine(),
        "versions": report.versions(),
        "split": config.data.val_split,
        "searched_images": len(searched),
        "images": len(held_out),
        "iterations_of_layers": ITERATIONS,
        "batch_size_of_layers": BATCH,
        "losses": losses,
        "crf": {name: getattr(found.best, name) for name in CRF_GRID},
        "crf_trials": [trial._asdict() for trial in found.trials],
        "crf_unrefined_miou": found.unrefined_miou,
        "dt": {name: getattr(dt, name) for name in DT_GRID},
        "dt_trials": [[transform.sigma_s, transform.sigma_r, miou] for transform, miou in zip(transforms, dt_mious, strict=True)],
        "results": results,
        "seconds": round(time.monotonic() - began, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.refinement_comparison", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs/weak"), metavar="FOLDER", help="of strong_seedN/best.pt")
    flags = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in flags.seeds:
        kept = RESULTS / f"strong_seed{seed}.json"
        checkpoint = flags.runs / f"strong_seed{seed}" / "best.pt"
        if kept.is_file():
            continue
        if not checkpoint.is_file():
            raise FileNotFoundError(f"{checkpoint} does not exist: python -m benchmarks.weak_ladder strong --seeds {seed}")
        write_json(kept, compare(checkpoint, seed, Path("runs") / "refinement" / f"strong_seed{seed}"))
        say(f"wrote {kept}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
