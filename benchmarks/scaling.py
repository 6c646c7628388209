"""``python -m benchmarks.scaling [--check]``: a model of images per second against processes, into docs/scaling.md.

What a training step costs is measured (results/scaling_cpu.json) or, for GPUs, assumed from peaks; what the processes exchange is
counted; links are measured (gloo) or assumed from data sheets. Nothing here was timed on more than two processes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atrous_kernels.gpus import GPUS
from benchmarks.report import RESULTS
from benchmarks.report_parts import table, with_blocks

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PLOT = DOCS / "scaling.md", DOCS / "images" / "scaling.png"
RANKS = [2**power for power in range(11)]
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # of DistributedDataParallel
SYNC_BN = {1: "", 8: ", sync_bn over 8", RANKS[-1]: ", sync_bn over all"}
LOSS_MESSAGES = 3  # counted pixels, loss, signals: 8 bytes each


@dataclass(frozen=True)
class Link:
    """One direction of one process's link: bytes per second that are reached, seconds per message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """``per_host`` processes behind each other on ``inside``; hosts on ``between``, one link per process."""

    name: str
    per_host: int
    inside: Link
    between: Link
    overlap: bool  # whether gradients travel while the backward pass computes
    loaders: int  # processes per rank that load and augment images


def all_reduce(size: float, ranks: int, cluster: Cluster) -> float:
    """Seconds: a ring in the host; a reduce-scatter in every host, double binary trees of each share between hosts, an all-gather
    in every host."""
    inside, between = cluster.inside, cluster.between
    local, hosts = min(ranks, cluster.per_host), math.ceil(ranks / cluster.per_host)
    seconds = 2 * (local - 1) * inside.latency + 2 * (local - 1) / local * size / inside.bandwidth
    if hosts > 1:
        seconds += 2 * math.log2(hosts) * between.latency + 2 * (hosts - 1) / hosts * size / local / between.bandwidth
    return seconds


def all_gather(size: float, ranks: int, cluster: Cluster) -> float:
    """Seconds for ``size`` bytes of each: a ring through all processes, as slow as its slowest link."""
    link = cluster.inside if ranks <= cluster.per_host else cluster.between
    return (ranks - 1) * (link.latency + size / link.bandwidth)


@dataclass(frozen=True)
class Step:
    """What one process does in a step, alone, in seconds, and what it exchanges."""

    forward: float
    backward: float
    update: float
    gradient_bytes: int
    norm_channels: tuple[int, ...]
    images: int
    loading: float = 0.0  # seconds of one core for one image


@dataclass(frozen=True)
class Parts:
    """A step in seconds."""

    compute: float
    gradients: float  # what is not hidden behind the backward pass
    norms: float
    messages: float
    waiting: float  # for images

    @property
    def seconds(self) -> float:
        return self.compute + self.gradients + self.norms + self.messages + self.waiting


def buckets(size: int) -> list[int]:
    """Bytes per all-reduce of the gradients, in the order of the backward pass."""
    rest = max(size - FIRST_BUCKET, 0)
    return [min(size, FIRST_BUCKET)] + [BUCKET] * (rest // BUCKET) + ([rest % BUCKET] if rest % BUCKET else [])


def model(step: Step, ranks: int, cluster: Cluster, sync_bn: int = 1) -> Parts:
    """One step of ``ranks`` processes, each with ``step.images`` images; ``sync_bn`` of them share statistics."""
    compute = step.forward + step.backward + step.update
    gradients = norms = messages = 0.0
    if ranks > 1:
        times = [all_reduce(size, ranks, cluster) for size in buckets(step.gradient_bytes)]
        if cluster.overlap:
            done = 0.0
            for index, seconds in enumerate(times, 1):  # bucket by bucket, as the backward pass fills them evenly
                done = max(done, step.backward * index / len(times)) + seconds
            gradients = done - step.backward
        else:
            gradients = sum(times)
        group = min(ranks, sync_bn)
        if group > 1:  # forward: mean, moment and count in float64; backward: two sums in float32
            norms = sum(
                all_gather(8 * (2 * channels + 1), group, cluster) + all_reduce(8 * channels, group, cluster)
                for channels in step.norm_channels
            )
        messages = LOSS_MESSAGES * all_reduce(8, ranks, cluster)
    busy = compute + gradients + norms + messages
    return Parts(compute, gradients, norms, messages, max(0.0, step.images * step.loading / cluster.loaders - busy))


# Measured and assumed ---------------------------------------------------------------------------------------------------


def measured() -> dict[str, Any]:
    return json.loads((RESULTS / "scaling_cpu.json").read_text())


def gloo(result: dict[str, Any]) -> Cluster:
    """One process per host, on the link that two processes of one machine measure: from the smallest message and the largest."""
    rows = result["all_reduce"]
    latency, largest = rows[0]["p50"] / 2, rows[-1]
    between = Link(largest["bytes"] / (largest["p50"] - 2 * latency), latency)
    return Cluster("CPU, gloo", 1, between, between, overlap=False, loaders=1)


def cpu_step(result: dict[str, Any]) -> Step:
    """The measured step while another process computes beside it; how it divides does not matter without overlap."""
    row = result["step"]
    images, channels = row["images_per_process"], tuple(row["norm_channels"])
    return Step(0.0, row["seconds"]["apart"]["p50"], 0.0, row["gradient_bytes"], channels, images)


# Assumed, from data sheets; nothing of it was measured here.
REACHED = 0.8  # of a link
TRAINING_SHARE = 0.4  # of the matrix peak of atrous_kernels.gpus, in a whole training step
LOADERS = 12  # cores per GPU
CLUSTERS = {
    # NVLink 4 has 900 GB/s in both directions, ConnectX-7 400 Gb/s per GPU; NVLink 3 600 GB/s, ConnectX-6 200 Gb/s.
    "h200": Cluster("H200, 8 per host", 8, Link(450e9 * REACHED, 4e-6), Link(50e9 * REACHED, 12e-6), True, LOADERS),
    "a100": Cluster("A100, 8 per host", 8, Link(300e9 * REACHED, 4e-6), Link(25e9 * REACHED, 12e-6), True, LOADERS),
}


def gpu_step(row: dict[str, Any], gpu: str, loading: float) -> Step:
    """Forward as many operations as counted, backward twice as many; gradients of four bytes."""
    forward = row["images_per_process"] * row["valid_gflop_per_image"] * 1e9 / (GPUS[gpu].matrix_flops * TRAINING_SHARE)
    update = 20 * row["parameters"] / GPUS[gpu].bytes_per_second  # SGD with momentum reads 12 bytes and writes 8
    channels = tuple(row["norm_channels"])
    return Step(forward, 2 * forward, update, 4 * row["parameters"], channels, row["images_per_process"], loading)


def validation(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, modelled seconds, measured seconds) of two processes; the smallest and the largest message are input."""
    cluster, step, seconds = gloo(result), cpu_step(result), result["step"]["seconds"]
    rows = [(f"all-reduce of {_bytes(row['bytes'])}", all_reduce(row["bytes"], 2, cluster), row["p50"])
            for row in result["all_reduce"][1:-1]]  # fmt: skip
    for name, what in (("ddp", "step, gradients exchanged"), ("ddp_sync_bn", "step, statistics of batch norm as well")):
        rows.append((what, model(step, 2, cluster, 2 if name == "ddp_sync_bn" else 1).seconds, seconds[name]["p50"]))
    return rows


# The page ---------------------------------------------------------------------------------------------------------------


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or unit == "MiB":
            return f"{size} {unit}"
        size //= 1024
    raise AssertionError


def _speeds(step: Step, cluster: Cluster, sync_bn: int = 1) -> list[float]:
    return [count * step.images / model(step, count, cluster, sync_bn).seconds for count in RANKS]


def measured_block() -> str:
    result = measured()
    step, seconds, machine = result["step"], result["step"]["seconds"], result["machine"]
    names = {"alone": "one process, the other idle", "apart": "two, nothing exchanged", "ddp": "two, gradients exchanged",
             "ddp_sync_bn": "two, statistics of batch norm as well"}  # fmt: skip
    steps = [[names[name], f"{1e3 * row['p50']:.0f} ({1e3 * row['p20']:.0f} to {1e3 * row['p80']:.0f})"]
             for name, row in seconds.items()]  # fmt: skip
    checks = [[what, f"{1e3 * modelled:.3g}", f"{1e3 * real:.3g}", f"{modelled / real - 1:+.0%}"]
              for what, modelled, real in validation(result)]  # fmt: skip
    link = gloo(result).between
    where = f"{machine['cpu']}, torch {result['versions']['torch']}, commit `{result['commit'][:10]}`"
    cores = {1: "one core", 2: "two cores"}[result["cores_used"]]
    images = f"{step['images_per_process']} images of {step['size'][0]} x {step['size'][1]} per process"
    exchanged = f"{step['gradient_bytes'] / 1e6:.0f} MB of gradients, {len(step['norm_channels'])} batch norms"
    return f"""{where}; two processes of one thread each on {cores}, gloo over the loopback interface.
{step["model"]}, {images}, {exchanged}; milliseconds of a step, median of {step["rounds"]} interleaved rounds (20th to 80th
percentile):

{table(["step", "ms"], steps)}

The link of the model comes from the smallest and the largest message: {1e6 * link.latency:.0f} microseconds per message and
{link.bandwidth / 1e9:.2f} GB/s. The other rows are predictions, in milliseconds, of what was measured:

{table(["two processes", "modelled", "measured", "error"], checks)}

A small all-reduce took {_spread(result)} here (20th to 80th percentile): presumably the transport waits for the two cores,
which are both computing. A step with common statistics has two small messages per batch norm, one after the other. The model
has one latency for all messages and no such wait, so it is too fast there; hosts with cores to spare should be nearer to it."""


def _spread(result: dict[str, Any]) -> str:
    small = result["all_reduce"][1]
    return f"{1e3 * small['p20']:.2f} to {1e3 * small['p80']:.2f} ms"


def model_block() -> str:
    result = measured()
    cpu = (cpu_step(result), gloo(result))
    loading = result["loading_seconds_per_image"]
    header = ["processes", *map(str, RANKS)]
    rows = [[f"{result['step']['model']}, CPU, gloo", *(f"{speed:.1f}" for speed in _speeds(*cpu))]]
    breakdown = []
    for key, cluster in CLUSTERS.items():
        for row in result["networks"]:
            step = gpu_step(row, key, loading)
            name = f"{row['model']} {row['side']}x{row['side']}, {row['images_per_process']} per GPU, {cluster.name}"
            for sync_bn, what in SYNC_BN.items():
                speeds = _speeds(step, cluster, sync_bn)
                label = name + what
                cells = [f"{speed:.3g}" if speed < 1000 else f"{speed:,.0f}" for speed in speeds]
                rows.append([label, *cells])
                parts = model(step, RANKS[-1], cluster, sync_bn)
                each = (parts.compute, parts.gradients, parts.norms, parts.messages, parts.waiting)
                efficiency = speeds[-1] / speeds[0] / RANKS[-1]
                breakdown.append([label, *(f"{1e3 * seconds:.2f}" for seconds in each), f"{efficiency:.0%}"])
    most = f"{RANKS[-1]:,}"
    columns = ["network", "compute", "gradients, not hidden", "batch norm", "small messages", "waiting for images", "efficiency"]
    return f"""**A model, not a measurement**, but for the step of the first row. Images per second against processes; the batch
grows with their number:

{table(header, rows)}

![Images per second, modelled](images/scaling.png)

Milliseconds of a step of {most} processes, and what is left of {most} times one process:

{table(columns, breakdown)}

Assumed for GPUs: a training step reaches {TRAINING_SHARE:.0%} of the matrix peak in `atrous_kernels/gpus.py`; links reach
{REACHED:.0%} of their data sheets ({_links()}); {LOADERS} loading cores per GPU, at the
{1e3 * loading:.1f} ms that one core took here from a JPEG and a PNG of 375 x 500 to tensors of 513 x 513."""


def _links() -> str:
    lines = []
    for cluster in CLUSTERS.values():
        inside, between = (
            f"{link.bandwidth / REACHED / 1e9:.0f} GB/s and {1e6 * link.latency:.0f} us per message"
            for link in (cluster.inside, cluster.between)
        )
        lines.append(f"{cluster.name}: {inside} inside, {between} per GPU between hosts")
    return "; ".join(lines)


def page() -> str:
    """docs/scaling.md with its blocks made anew."""
    return with_blocks(PAGE, "benchmarks.scaling", {"measured": measured_block(), "model": model_block()})


def plot() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    result = measured()
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (key, cluster) in zip(figure.subplots(1, 2, sharey=True), CLUSTERS.items(), strict=True):
        for row, color in zip(result["networks"], ("tab:blue", "tab:orange", "tab:green"), strict=True):
            step = gpu_step(row, key, result["loading_seconds_per_image"])
            single = step.images / model(step, 1, cluster).seconds
            axes.plot(RANKS, [single * count for count in RANKS], ":", color=color, linewidth=1)
            axes.plot(RANKS, _speeds(step, cluster), "-o", color=color, markersize=3, label=row["model"])
            axes.plot(RANKS, _speeds(step, cluster, RANKS[-1]), "--", color=color, linewidth=1, label="with sync_bn over all")
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=f"{cluster.name} (modelled)")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("images/s; dotted: linear")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.canvas = FigureCanvasAgg(figure)
    figure.savefig(PLOT, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs from the results")
    if parser.parse_args(arguments).check:
        if PAGE.read_text() == page():
            return 0
        print(f"{PAGE.name} differs from the committed results; run python -m benchmarks.scaling", file=sys.stderr)
        return 1
    PAGE.write_text(page())
    plot()
    return 0


if __name__ == "__main__":
    sys.exit(main())
