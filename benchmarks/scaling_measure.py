"""``python -m benchmarks.scaling_measure``: what the model of scaling needs, measured with two processes of one thread each.

Collectives of gloo over the loopback interface, and training steps: of one process alone, of two that do not exchange anything,
of two that exchange gradients, and statistics of batch norm as well. Writes results/scaling_cpu.json. Takes about a minute; the
two processes share the cores that this command may use, two if possible, and they should be free.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist

from benchmarks.report import RESULTS
from segmodels import create_model
from segmodels.config import load_config
from segmodels.data import create_dataset
from segmodels.data.transforms import IMAGENET_MEAN, IMAGENET_STD, to_tensor
from segmodels.engine import report
from segmodels.engine.build import build_transforms, keep_freed_memory
from segmodels.engine.checkpoints import write_json
from segmodels.engine.distributed import Processes
from segmodels.engine.losses import SegmentationLoss
from segmodels.summary import summarise

PATH = RESULTS / "scaling_cpu.json"
MODEL, BATCH, SIZE, ROUNDS = "deeplabv3_resnet18", 2, (129, 129), 15
BYTES = [8, 1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 25 << 20, 64 << 20]
# Networks of the modelled tables: name, side of the crops, images per process.
NETWORKS = [("deeplabv3_resnet101", 513, 4), ("pspnet_resnet101", 473, 4), ("deeplabv3plus_efficientnet_lite0", 513, 8)]


def quantiles(times: list[float]) -> dict[str, float]:
    """Seconds at the 20th, 50th and 80th percentile, with four digits."""
    return {f"p{q}": float(f"{np.percentile(times, q):.4g}") for q in (20, 50, 80)}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call that all processes begin together."""
    dist.barrier()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def collectives() -> dict[str, Any]:
    """Per kind and number of bytes of one process."""
    found: dict[str, Any] = {"all_reduce": [], "all_gather": []}
    for size in BYTES:
        tensor = torch.zeros(size // 4)
        rounds = 60 if size < 1 << 20 else 12
        times = [timed(lambda tensor=tensor: dist.all_reduce(tensor)) for _ in range(rounds)]
        found["all_reduce"].append({"bytes": size, **quantiles(times[2:])})
        if size <= 1 << 18:
            parts = [torch.empty_like(tensor) for _ in range(2)]
            times = [timed(lambda tensor=tensor, parts=parts: dist.all_gather(parts, tensor)) for _ in range(rounds)]
            found["all_gather"].append({"bytes": size, **quantiles(times[2:])})
    return found


def steps(rank: int) -> dict[str, Any]:
    """Seconds of a training step by what is exchanged; rounds interleaved."""
    torch.manual_seed(0)
    plain = create_model(MODEL, 21).to(memory_format=torch.channels_last).train()
    synchronised = copy.deepcopy(plain)
    images = torch.randn(BATCH, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 21, (BATCH, *SIZE))
    calls = {}
    for name, model in (("ddp", plain), ("ddp_sync_bn", synchronised)):
        processes = Processes(rank, 2, sync_bn=name == "ddp_sync_bn")
        logits = processes.parallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        calls[name] = _step(processes, logits, optimizer, images, labels, True)
        if name == "ddp":
            calls["apart"] = _step(processes, logits, optimizer, images, labels, False)
    variants = {"alone": calls["apart"] if rank == 0 else lambda: None, **calls}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in calls.values():
        call()
        call()
    for _ in range(ROUNDS):
        for name, call in variants.items():
            times[name].append(timed(call))
    sizes = [parameter.numel() * 4 for parameter in plain.parameters()]
    norms = [module.num_features for module in plain.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return {
        "model": MODEL, "images_per_process": BATCH, "size": list(SIZE), "rounds": ROUNDS, "gradient_bytes": sum(sizes),
        "norm_channels": norms, "seconds": {name: quantiles(values) for name, values in times.items()},
    }  # fmt: skip


def _step(
    processes: Processes,
    logits: Any,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    exchange: bool,
) -> Callable[[], None]:
    loss = SegmentationLoss()
    loss.total = processes.total if exchange else None

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with processes.exchange(last=exchange):
            value = loss(logits(images), labels)
            value.backward()
        if exchange:  # what the trainer asks for in every step: the loss, and whether somebody was told to stop
            processes.sum(float(value.detach()))
            processes.largest(None)
        optimizer.step()

    return step


def loading() -> float:
    """Seconds of one core for one sample of 513 x 513, from the bytes of a JPEG and a PNG of 375 x 500 to tensors."""
    cv2.setNumThreads(1)
    dataset = create_dataset("synthetic", None, "train", size=(375, 500))
    transform = build_transforms(load_config(None, ["data.crop=[513,513]"])[0])
    pairs = [dataset[index] for index in range(4)]
    files = [[cv2.imencode(kind, pixels)[1] for kind, pixels in zip((".jpg", ".png"), pair, strict=True)] for pair in pairs]
    times = []
    for seed in range(40):
        began = time.perf_counter()
        image, label = (cv2.imdecode(data, flag) for data, flag in zip(files[seed % 4], (1, 0), strict=True))
        to_tensor(*transform(image, label, np.random.default_rng(seed)), IMAGENET_MEAN, IMAGENET_STD)
        times.append(time.perf_counter() - began)
    return float(f"{statistics.median(times):.4g}")


def networks() -> list[dict[str, Any]]:
    """Counted, not measured."""
    rows = []
    for name, side, batch in NETWORKS:
        counted = summarise(name, (side, side))
        with torch.device("meta"):
            model = create_model(name, 21)
        norms = [module.num_features for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        rows.append(
            {"model": name, "side": side, "images_per_process": batch, "parameters": counted.parameters,
             "valid_gflop_per_image": round(counted.valid_flops / 1e9, 2), "norm_channels": norms}
        )  # fmt: skip
    return rows


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {**collectives(), "step": steps(rank)}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()


def main() -> None:
    with tempfile.TemporaryDirectory() as name, nullcontext(Path(name)) as folder:
        children = []
        for rank in range(2):
            child = os.fork()
            if child:
                children.append(child)
                continue
            code = 1
            try:
                work(rank, folder)
                code = 0
            finally:
                os._exit(code)
        for child in children:
            _, status = os.waitpid(child, 0)
            if status:
                raise SystemExit(f"a process ended with {os.waitstatus_to_exitcode(status)}")
        found = json.loads((folder / "found.json").read_text())
    torch.set_num_threads(1)
    content = {
        "machine": report.machine(), "versions": report.versions(), "commit": report.current_commit(),
        "cores_used": len(os.sched_getaffinity(0)),
        **found, "loading_seconds_per_image": loading(), "networks": networks(),
    }  # fmt: skip
    write_json(PATH, content)
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
