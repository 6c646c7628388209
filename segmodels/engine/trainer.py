"""The training loop: one for every model, data set and precision.

All state that the next step depends on is in ``last.pt``, so a run that was stopped anywhere continues to the same bits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

import atrous_kernels
from segmodels.config import SECTIONS, Config
from segmodels.data import SegmentationDataset
from segmodels.data.loader import ResumableLoader, build_loader
from segmodels.engine import report
from segmodels.engine.build import build_predictor, build_sampler, build_transforms, normalization
from segmodels.engine.checkpoints import (
    CheckpointError,
    atomic_write,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    write_json,
)
from segmodels.engine.distributed import Processes
from segmodels.engine.inference import evaluate_dataset
from segmodels.engine.losses import build_loss, hard_fraction
from segmodels.engine.optim import ModelEma, build_optimizer
from segmodels.engine.parts import prepare_for_training, training_mode
from segmodels.engine.precision import autocast
from segmodels.engine.progress import Reporter, StopRequest, clock, complain, say
from segmodels.engine.recompute import recompute_blocks
from segmodels.engine.schedules import build_schedule
from segmodels.engine.visualize import sheet, write_png
from segmodels.weak.dataset import WeakDataset
from segmodels.weak.supervision import WeakSupervision

# Settings that may differ when a run is resumed: they say where things are or how fast, not what is computed.
_FREE = {
    "data": {"root", "cache", "workers", "val_split", "on_error", "max_skipped"},
    "model": {"weights", "weights_backbone"},
    "train": set(),
    "weak": {"labels"},
    "distributed": {"mode", "timeout"},
}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which iteration and why."""


class Trainer:
    """Trains a model and leaves ``last.pt``, ``best.pt``, ``metrics.json``, ``curves.png``, ``samples.png`` and TensorBoard
    scalars in a folder.

    Args:
        config, raw: from :func:`segmodels.config.load_config`.
        work_dir: the output folder, existing.
        model: with the output contract of :func:`segmodels.create_model`; moved to ``device``.
        train_set, val_set: the splits.
        device: where to compute.
        processes: that share the training; rank 0 writes.

    Raises:
        ValueError: settings that do not fit the data, for example the number of class weights.
    """

    def __init__(
        self,
        config: Config,
        raw: dict[str, Any],
        work_dir: Path,
        model: nn.Module,
        train_set: SegmentationDataset,
        val_set: SegmentationDataset,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.raw, self.work_dir, self.device = config, raw, work_dir, device
        self.train_set, self.val_set = train_set, val_set
        self.processes = processes or Processes()
        settings = config.train
        self.layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.ema = ModelEma(model, settings.ema_decay) if settings.ema_decay else None
        prepare_for_training(model, settings)
        if settings.checkpoint_blocks:
            recompute_blocks(model.backbone)  # type: ignore[arg-type]
        self.dtype = next(model.parameters()).dtype
        self._logits = self.processes.parallel(model)
        if settings.compile:
            self._logits = torch.compile(self._logits)
        self.optimizer = build_optimizer(model, settings)
        self.schedule = build_schedule(settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.loss = build_loss(config, train_set, bool(getattr(model, "align_corners", False))).to(device)
        self.loss.total = self.processes.total if self.processes.world > 1 else None
        self.weak = WeakSupervision(config.weak, train_set, config.run.seed) if isinstance(train_set, WeakDataset) else None
        self.loader: ResumableLoader = build_loader(
            train_set,
            build_transforms(config),
            batch_size=settings.batch_size,
            seed=config.run.seed,
            drop_last=True,
            workers=config.data.workers,
            cache=config.data.cache,
            pin_memory=device.type == "cuda",
            sampler=build_sampler(config, train_set),
            max_skipped=config.data.max_skipped if config.data.on_error == "skip" else 0.0,
            rank=self.processes.rank,
            world=self.processes.world,
            **normalization(model),
        )
        self._batches = iter(self.loader)
        self._reported = 0  # skipped images that were told of
        self.iteration = 0
        self.validated = 0  # iteration of the last validation, so that an interrupted one is made up for
        self.seconds = self.train_seconds = 0.0
        self.window = [0.0, 0]  # sum of the losses since the last point of the curve, and their number
        self.curve: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
        self.best: dict[str, Any] | None = None
        self.scores: dict[str, Any] | None = None
        self.commits: list[dict[str, Any]] = []
        self._recent: deque[float] = deque(maxlen=20)  # seconds of the last steps, for the speed that is shown
        self._saved: tuple[int, int] | None = None  # (iteration, validated) of the newest last.pt
        self._last_time = time.monotonic()
        self._writer: Any = None

    def run(self) -> int | None:
        """Trains to the end, or to the first SIGINT or SIGTERM, after which everything is saved.

        Returns:
            The number of the signal that stopped the run, or None at its end.

        Raises:
            TrainingError: the loss is no longer finite.
            ProcessLost: another process of the training died or did not answer in time.
            CheckpointError: a checkpoint could not be written.
        """
        self._note_commit()
        if self.processes.first:
            atomic_write(self.work_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.raw)).encode())
        total = self.config.train.iterations
        every = self.config.run.checkpoint_every
        self._last_time = time.monotonic()
        with (
            StopRequest(patient=self.processes.world > 1) as stop,
            Reporter("train", total, self.iteration, self.config.run.print_seconds) as reporter,
            atrous_kernels.backend(self.config.run.backend),
            self.processes.watching(lambda: f"iteration {self.iteration}"),
        ):
            self.processes.check_same("iteration", self.iteration)
            training_mode(self.model, self.config.train)
            signum: int | None = None
            try:
                while signum is None:
                    if self._validation_is_due() and not self._validate(stop):
                        signum = self.processes.largest(stop.signum)
                        break
                    if self.iteration == total:
                        break
                    self._step(reporter)
                    signum = self.processes.largest(stop.signum)
                    if every and self.iteration % every == 0:
                        self.save()
            finally:
                if self._writer is not None:
                    self._writer.close()
            self.save()
            self.processes.wait()
        return signum

    def save(self) -> None:
        """Writes ``last.pt`` unless it is up to date. Raises CheckpointError; the previous file is then still there."""
        if self._saved == (self.iteration, self.validated):
            return
        self._count_time()
        weights = self.processes.full(self.model.state_dict())
        moments = self.processes.full(self.optimizer.state_dict())
        self._saved = (self.iteration, self.validated)
        if not self.processes.first:
            return
        save_checkpoint(
            self.work_dir / "last.pt",
            {
                **self._identity(),
                "model": weights,
                "ema": self.ema.state_dict() if self.ema else None,
                "optimizer": moments,
                "scaler": self.scaler.state_dict(),
                "schedule": {"iteration": self.iteration, "total": self.schedule.total},
                "sampler": self.loader.state_dict(),
                "rng": rng_state(),
                "curve": self.curve,
                "window": list(self.window),
                "validated": self.validated,
                "best": self.best,
                "scores": self.scores,
                "commits": self.commits,
                "seconds": self.seconds,
                "train_seconds": self.train_seconds,
            },
        )

    def resume(self, path: Path) -> None:
        """Continues from a ``last.pt``.

        Raises:
            CheckpointError: unreadable, of another configuration (the message lists the keys), or only weights.
        """
        state = load_checkpoint(path)
        if "optimizer" not in state:
            raise CheckpointError(f"checkpoint {path} holds weights only: expected last.pt of a training run")
        self._check_same_config(path, state["config"])
        try:
            self.processes.load(self.model, self.optimizer, state)
            self.loader.load_state_dict(state["sampler"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit this run: {error}") from error
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"])
        self.iteration, self.validated = state["iteration"], state["validated"]
        self._saved = (self.iteration, self.validated)
        self.curve, self.window = state["curve"], state["window"]
        self.best, self.scores, self.commits = state["best"], state["scores"], state["commits"]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self._batches = iter(self.loader)

    def _step(self, reporter: Reporter) -> None:
        began = time.monotonic()
        indices = self.loader.sampler.next_batch()
        images, labels = self._next_batch()
        images = images.to(self.device, self.dtype, non_blocking=True).contiguous(memory_format=self.layout)
        labels = labels.to(self.device, non_blocking=True)
        factor = self.schedule.apply(self.optimizer, self.iteration)
        self.loss.hard_fraction = hard_fraction(self.config.train, self.iteration)
        self.processes.seed(self.config.run.seed, self.iteration)
        names = [self.train_set.name(int(index)) for index in indices]
        self.optimizer.zero_grad(set_to_none=True)
        value = self._backward(images, labels, indices, names)
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = self.processes.full(norm)
        if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:  # else the scale was too large: the step is left out
            self._must_be_finite("norm of the gradient", float(norm), names)
        if self.config.train.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.train.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)
        self.iteration += 1
        elapsed = time.monotonic() - began
        self.train_seconds += elapsed
        self._recent.append(elapsed)
        speed = len(images) * self.processes.world * len(self._recent) / sum(self._recent)
        self._log(value, self.config.train.lr * factor, speed, reporter)

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, indices: np.ndarray, names: list[str]) -> float:
        """Leaves the gradient of a batch, computed in ``accumulate`` parts; returns its loss."""
        parts, total = self.config.train.accumulate, 0.0
        for part, (own_images, own_labels) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), 1):
            with self.processes.exchange(part == parts):
                with autocast(self.device, self.config.train.amp):
                    logits = self._logits(own_images)
                if self.weak is not None:
                    loss = self.weak.loss(self.loss, logits, labels, indices, self.iteration)
                else:
                    loss = self.loss(logits, own_labels, labels if parts > 1 else None)
                value = self.processes.sum(float(loss.detach()))
                self._must_be_finite("loss", value, names)
                total += value
                # The gradients of the processes are averaged; they are to be added.
                self.scaler.scale(loss * self.processes.world).backward()
        return total

    def _must_be_finite(self, what: str, value: float, names: list[str]) -> None:
        if math.isfinite(value):
            return
        saved = f"last.pt holds iteration {self._saved[0]}" if self._saved else "nothing was saved yet"
        raise TrainingError(
            f"iteration {self.iteration}: the {what} is {value} on the images {', '.join(names)}; expected a finite value. "
            f"{saved}; a smaller train.lr, train.warmup_iterations or train.clip_norm may help"
        )

    def _next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            batch = next(self._batches)
        skipped = self.loader.skipped()
        if len(skipped) > self._reported:
            self._reported = len(skipped)
            names = ", ".join(self.train_set.name(index) for index in skipped[:10])
            complain(f"{len(skipped)} training images cannot be read and are skipped: {names} (python -m segmodels.data check)")
        return batch

    def _log(self, loss: float, rate: float, speed: float, reporter: Reporter) -> None:
        self.window[0] += loss
        self.window[1] += 1
        mean = self.window[0] / self.window[1]
        reporter.update(self.iteration, f"loss {mean:.4f}  rate {rate:.2e}  {speed:.2f} images/s")
        if self.iteration % self.config.run.log_every and self.iteration != self.config.train.iterations:
            return
        self.curve["train"].append({"iteration": self.iteration, "loss": mean, "lr": rate})
        self.window = [0.0, 0]
        self._scalars({"train/loss": mean, "train/lr": rate, "train/images_per_second": speed})

    def _validation_is_due(self) -> bool:
        every = self.config.run.validate_every
        due = self.iteration == self.config.train.iterations or (every and self.iteration % every == 0)
        return bool(due) and self.iteration > 0 and self.validated != self.iteration

    def _validate(self, stop: StopRequest) -> bool:
        """False where a signal came in between; the validation is then repeated by the resumed run."""
        model = self.processes.whole(self.ema.module if self.ema is not None else self.model)
        settings = self.config.eval
        trained_stride = self.config.model.output_stride
        if settings.output_stride is not None:
            model.set_output_stride(settings.output_stride)  # type: ignore[operator]
        try:
            found = evaluate_dataset(
                build_predictor(self.config, model, self.device),
                self.val_set,
                limit=settings.limit,
                samples=settings.sheet,
                progress=lambda done, total: stop.signum is None,
                part=(self.processes.rank, self.processes.world),
            )
        finally:
            if settings.output_stride is not None:
                model.set_output_stride(trained_stride)  # type: ignore[operator]
        if self.processes.sum(found is None):
            return False
        assert found is not None
        found.matrix.matrix = self.processes.total(found.matrix.matrix.to(self.device)).cpu()
        self.validated = self.iteration
        self.scores = found.matrix.to_dict(self.val_set.classes)
        point = {key: self.scores[key] for key in ("miou", "pixel_accuracy", "mean_accuracy", "fwiou")}
        self.curve["validation"].append({"iteration": self.iteration, **point})
        self._scalars({f"val/{key}": value for key, value in point.items() if value is not None})
        miou = point["miou"]
        if miou is not None and (self.best is None or miou > self.best["miou"]):
            self.best = {"iteration": self.iteration, "miou": miou}
            if self.processes.first:
                save_checkpoint(
                    self.work_dir / "best.pt", {**self._identity(), "model": model.state_dict(), "scores": self.scores}
                )
        self.save()
        if not self.processes.first:
            return True
        if found.samples:
            write_png(self.work_dir / "samples.png", sheet(found.samples, self.val_set.classes, self.val_set.colors))
        self.write_metrics()
        shown = "undefined" if miou is None else f"{miou:.4f}"
        best = f" (best {self.best['miou']:.4f} at {self.best['iteration']})" if self.best else ""
        say(f"validation at {self.iteration}: mIoU {shown}{best}, {clock(self.seconds)} so far")
        return True

    def write_metrics(self) -> None:
        """Writes ``metrics.json`` and ``curves.png``."""
        self._count_time()
        images = self.iteration * self.config.train.batch_size
        content = {
            "config": self.raw,
            "seed": self.config.run.seed,
            "commits": self.commits,
            "machine": report.machine(),
            "versions": report.versions(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "iteration": self.iteration,
            "finished": self.iteration == self.config.train.iterations,
            "processes": self.processes.world,
            "seconds": round(self.seconds, 1),
            "train_seconds": round(self.train_seconds, 1),
            "images_per_second": round(images / self.train_seconds, 4) if self.train_seconds else None,
            "split": self.config.data.val_split,
            "skipped": [self.train_set.name(index) for index in self.loader.skipped()],
            "images": min(len(self.val_set), self.config.eval.limit or len(self.val_set)),
            **(self.scores or {}),
            "best": self.best,
            "curve": self.curve,
        }
        write_json(self.work_dir / "metrics.json", content)
        report.curves_png(self.work_dir / "curves.png", self.curve["train"], self.curve["validation"])

    def _identity(self) -> dict[str, Any]:
        return {
            "config": self.raw,
            "classes": list(self.train_set.classes),
            "colors": self.train_set.colors.tolist(),
            "iteration": self.iteration,
        }

    def _check_same_config(self, path: Path, before: dict[str, Any]) -> None:
        different = [
            f"{section}.{key}: {then!r} then, {value!r} now"
            for section, free in _FREE.items()
            for key, value in self.raw[section].items()
            if section in before  # weak came later than the first checkpoints, and so did some settings
            if key not in free and (then := before[section].get(key, getattr(SECTIONS[section](), key))) != value
        ]
        if different:
            raise CheckpointError(
                f"checkpoint {path} was trained with other settings: {'; '.join(different)}. Use the same ones, or another "
                "--work-dir"
            )

    def _note_commit(self) -> None:
        commit = report.current_commit()
        if not self.commits or self.commits[-1]["commit"] != commit:
            self.commits.append({"commit": commit, "from_iteration": self.iteration})

    def _count_time(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._last_time
        self._last_time = now

    def _scalars(self, values: dict[str, float]) -> None:
        if not (self.config.run.tensorboard and self.processes.first):
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # points that a killed run wrote after its last checkpoint are taken back
            self._writer = SummaryWriter(str(self.work_dir / "tensorboard"), purge_step=self.iteration)
        for key, value in values.items():
            self._writer.add_scalar(key, value, self.iteration)
