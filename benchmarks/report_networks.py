"""The sections of docs/results.md about whole networks: speed, training, published weights, weak supervision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report_parts import (
    RESULTS,
    Rows,
    best,
    fastest,
    geomean,
    load,
    machine_line,
    milliseconds,
    ratio,
    table,
)


def models_section(result: dict[str, Any]) -> str:
    rows: Rows = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    names = ["torch contiguous", "torch channels_last", "torch.compile frozen", "ONNX Runtime", "OpenVINO"]
    names += ["ours auto contiguous", "ours auto channels_last"]
    cells = []
    for row in rows:
        found = row["candidates"]
        of_all = fastest(row, False)[1] / fastest(row, True)[1]
        speeds = [f"{found[name]['images_per_second']:.2f}" if name in found else "" for name in names]
        cells.append([row["case"], *speeds, f"**{ratio(row):.2f}**", f"**{of_all:.2f}**"])
    return f"""## Whole models on the CPU

{machine_line(result)}

Images per second, the same model and weights, with the same number of threads, in fp32 unless the case says otherwise.

{table(["case", *(name.replace("_", "-") for name in names), "ratio to the framework's best", "ratio to the best of all"], cells)}

{profiles(rows)}"""


def all_models_section() -> str:
    """Every model of the registry, from ``python -m benchmarks.bench_models --all``."""
    result = load("models_all_cpu.json")
    if result is None:
        return ""
    rows: Rows = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    cells = []
    for row in rows:
        peaks = [row["candidates"][f"{name} channels_last"].get("extra_peak_bytes") for name in ("torch", "ours auto")]
        memory = [f"{peak / 2**20:.0f}" if peak is not None else "" for peak in peaks]
        cells.append([row["model"], milliseconds(best(row, "torch")), milliseconds(best(row, "ours auto")),
                      f"**{ratio(row):.2f}**", *memory])  # fmt: skip
    size = rows[0]["case"].rpartition(" ")[2]
    return f"""## Inference of every model on the CPU

{machine_line(result)}

Milliseconds per batch of {size}, the faster layout of each side; the same network and weights in the framework's own modules
beside ours (the domain transform of `deeplabdt` is ours on both sides). Memory: what the first call of this size adds to a fresh
process at its peak, weights that it rearranges and keeps included.

{table(["model", "framework, ms", "ours, ms", "ratio", "framework, MiB", "ours, MiB"], cells)}

Geometric mean of the ratio: **{geomean([ratio(row) for row in rows]):.2f}** over {len(rows)} models.
"""


def profiles(rows: Rows) -> str:
    """Where our channels-last networks spend their time."""
    cells = []
    for row in rows:
        total = sum(row.get("profile", {}).values())
        parts = [f"{op} {spent / total:.0%}" for op, spent in row.get("profile", {}).items() if spent >= 0.02 * total]
        if parts:
            cells.append([row["case"], f"{total:.0f}", ", ".join(parts)])
    if not cells:
        return ""
    return f"""Where the time of ours in channels-last goes: operators by the time spent in themselves, under a profiler that
slows all of them, the smallest ones most.

{table(["case", "ms under the profiler", "operators of 2% and more"], cells)}
"""


def training_section() -> str:
    parts = []
    for path in sorted((RESULTS / "training").glob("*.json")):
        if "." in path.stem:  # an evaluation of the run, NAME.BACKEND.json or NAME.msflip.json
            continue
        run = json.loads(path.read_text())
        swap = {name: load(f"training/{path.stem}.{name}.json") for name in ("auto", "cpu", "torch")}
        scores = ", ".join(f"{name} {found['miou']:.6f}" for name, found in swap.items() if found)
        averaged = load(f"training/{path.stem}.msflip.json")
        if averaged:
            scales = ", ".join(f"{scale:g}" for scale in averaged["config"]["eval"]["scales"])
            scores += f". Averaged over the scales {scales} and their mirror images: mIoU **{averaged['miou']:.4f}**"
        commits = ", ".join(f"`{c['commit'][:10]}` from iteration {c['from_iteration']}" for c in run["commits"])
        classes = run["iou"]
        parts.append(
            f"""### {path.stem}

mIoU **{run["miou"]:.4f}**, pixel accuracy {run["pixel_accuracy"]:.4f} on the {run["images"]} images of `{run["split"]}`; \
{run["iteration"]} iterations of {run["config"]["train"]["batch_size"]} in {run["seconds"] / 60:.0f} minutes on \
{run["machine"]["threads"]} thread(s) of {run["machine"]["cpu"]} beside other work, seed {run["seed"]}; trained under {commits}.

Swap test, the trained weights evaluated on each backend: {scores or "not run"}.

{table(["class", "IoU"], [[name, f"{value:.3f}" if value is not None else "absent"] for name, value in classes.items()])}

![Learning curve](images/{path.stem}.png)
"""
        )
    return "## Trained on real images\n\n" + "\n".join(parts) if parts else ""


def families_section() -> str:
    """One short run per family, which differ in the network alone."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "training" / "families").glob("*.json"))}
    if not runs:
        return ""
    cells = [
        [f"`{name}`", f"**{run['miou']:.4f}**", f"{run['pixel_accuracy']:.4f}", f"{run['mean_accuracy']:.4f}",
         f"{run['parameters'] / 1e6:.2f}", f"{run['seconds'] / 60:.1f}", f"`{run['commits'][0]['commit'][:10]}`"]
        for name, run in sorted(runs.items(), key=lambda item: -item[1]["miou"])
    ]  # fmt: skip
    run = next(iter(runs.values()))
    settings, data = run["config"]["train"], run["config"]["data"]
    height, width = data["crop"]
    batch = settings["batch_size"]
    return f"""## One short run per family

Recipes `*_{data["name"]}_{height}x{width}_b{batch}`: {run["iteration"]} iterations of {batch} crops of {height}x{width} from
images at about half their size; the same backbone, ImageNet weights and schedule, seed {run["seed"]}. mIoU on the {run["images"]}
images of `{run["split"]}`, read at {"x".join(map(str, run["config"]["eval"]["canvas"]))} and scored at their own size. Every
family trains; runs this short, once each, do not say which is best.

{table(["recipe", "mIoU", "pixel accuracy", "mean accuracy", "parameters, millions", "minutes", "commit"], cells)}
"""


def published_section() -> str:
    results = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "published").glob("*.json"))}
    if not results:
        return ""
    cells = []
    for name, found in results.items():
        settings = found["config"]["eval"]
        averaged = [f"scales {', '.join(f'{scale:g}' for scale in settings['scales'])}"] if settings["scales"] != [1.0] else []
        averaged += ["mirrored"] if settings["flip"] else []
        averaged += ["DenseCRF"] if settings["refine"] == "crf" else []
        cells.append(
            [
                name.partition(".")[0],
                str(settings["output_stride"] or found["config"]["model"]["output_stride"]),
                found["backend"],
                ", ".join(averaged) or "one pass",
                f"**{100 * found['miou']:.2f} %**",
                f"{100 * found['pixel_accuracy']:.2f} %",
                f"{found['images_per_second']:.2f}",
            ]
        )
    first = next(iter(results.values()))
    machine = first["machine"]
    return f"""## Published weights, reproduced

Networks that others trained, loaded by `segmodels.readers` and evaluated by one command each \
(`python -m segmodels.evaluate --config deeplabv3_mobilenetv2_os16_voc-subset_513x513_published`), on the {first["images"]} \
images of `{first["config"]["data"]["name"]}` `{first["split"]}` in `{Path(first["config"]["data"]["root"]).name}`; one thread \
of {machine["cpu"]} beside other work, so the speeds are only indications.

{table(["network", "output stride", "backend", "averaged over", "mIoU", "pixel accuracy", "images/s"], cells)}
"""


def weak_section() -> str:
    from benchmarks.weak_ladder import RECIPE, RUNGS

    runs = {
        rung: [json.loads(path.read_text()) for path in sorted((RESULTS / "weak").glob(f"{rung}_seed*.json"))] for rung in RUNGS
    }
    cells = [
        [RUNGS[rung][2], ", ".join(f"{run['miou']:.4f} (seed {run['seed']})" for run in found),
         f"**{sum(run['miou'] for run in found) / len(found):.4f}**"]
        for rung, found in runs.items() if found
    ]  # fmt: skip
    if not cells:
        return ""
    run = next(found[0] for found in runs.values() if found)
    settings = run["config"]["train"]
    return f"""## Weak and semi-supervised training

Recipes `{RECIPE}_*`: {run["iteration"]} iterations of {settings["batch_size"]} whatever the rung, images at about half size.
mIoU on the {run["images"]} images of `{run["split"]}`; comparable with nothing but the other rows.

{table(["what the network is told", "mIoU", "mean"], cells)}
"""


def refinement_section() -> str:
    from benchmarks.refinement_comparison import METHODS

    runs = [json.loads(path.read_text()) for path in sorted((RESULTS / "refinement").glob("*_seed*.json"))]
    if not runs:
        return ""
    cells = []
    for method, title in METHODS.items():
        mious = [run["results"][method]["miou"] for run in runs]
        gains = [run["results"][method]["miou"] - run["results"]["model"]["miou"] for run in runs]
        accuracy = sum(run["results"][method]["pixel_accuracy"] for run in runs) / len(runs)
        cells.append(
            [
                title,
                ", ".join(f"{miou:.4f} (seed {run['seed']})" for miou, run in zip(mious, runs, strict=True)),
                f"**{sum(mious) / len(mious):.4f}**",
                f"{100 * sum(gains) / len(gains):+.2f} ({100 * min(gains):+.2f} to {100 * max(gains):+.2f})",
                f"{accuracy:.4f}",
            ]
        )
    found = "; ".join(
        f"seed {run['seed']}: " + ", ".join(f"{name} {value:g}" for part in ("crf", "dt") for name, value in run[part].items())
        for run in runs
    )
    run = runs[0]
    return f"""## Refinement by the image

The network of the ladder's last rung, trained once per seed and then left as it is, images at half size
(`python -m benchmarks.refinement_comparison`). Widths and weights are searched on {run["searched_images"]} images of \
`{run["split"]}`,
mIoU is that of the other {run["images"]}. The two trained layers see {run["iterations_of_layers"]} batches of \
{run["batch_size_of_layers"]} training crops.

{table(["refinement", "mIoU", "mean", "gain in points, mean (least to most)", "pixel accuracy"], cells)}

Found: {found} (pixels of the halved images, colours from 0 to 255).
"""
