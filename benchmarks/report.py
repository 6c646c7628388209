"""``python -m benchmarks.report``: docs/results.md, its plots and the README's figures from the committed results.

No number in those files is typed by hand. ``--check`` writes nothing and fails where the texts have drifted from the results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report_networks import (
    all_models_section,
    families_section,
    models_section,
    published_section,
    refinement_section,
    training_section,
    weak_section,
)
from benchmarks.report_parts import (
    RESULTS,
    ROOT,
    Rows,
    best,
    fastest,
    geomean,
    load,
    machine_line,
    milliseconds,
    ratio,
    table,
    with_blocks,
)

PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
README = ROOT / "README.md"
EXPLAINED = "conv2d --input 1,2048,33,33 --weight 256,2048,3,3 --padding 12 --dilation 12"


def convolution_section(result: dict[str, Any]) -> str:
    rows: Rows = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    cells = []
    for row in rows:
        times = row["candidates"]
        cells.append(
            [
                row["case"],
                *(milliseconds(times[f"torch {layout}"]["p50_ms"]) for layout in ("contiguous", "channels_last")),
                milliseconds(best(row, "torch.compile")),
                *(milliseconds(times[f"ours auto {layout}"]["p50_ms"]) for layout in ("contiguous", "channels_last")),
                f"{times['torch contiguous']['p50_ms'] / times['ours auto contiguous']['p50_ms']:.2f}",
                f"**{ratio(row):.2f}**",
                f"{row['floor_ms'] / best(row, 'ours auto'):.0%}",
                f"{times['ours auto channels_last']['error']:.1e}",
            ]
        )
    header = [
        "case", "torch contiguous", "torch channels-last", "torch.compile", "ours contiguous", "ours channels-last",
        "ratio, both contiguous", "ratio, best to best", "of the floor", "error",
    ]  # fmt: skip
    ratios = [ratio(row) for row in rows]
    losses = [f"{row['case']} ({ratio(row):.2f})" for row in rows if ratio(row) < 1]
    return f"""## conv2d on the CPU

{machine_line(result)}

Milliseconds, medians of interleaved rounds in one process. *Ratio, best to best*: the fastest of the framework's four
settings (contiguous, channels-last, each also under `torch.compile`) over the faster of our two layouts; above 1 we are faster.
*Of the floor*: the roofline time of the valid taps alone (matrix-product rate and copy bandwidth measured in the same run)
over our time; Winograd's algorithm needs fewer multiplications than there are taps, so it can pass 100 %.
*Error*: largest difference from float64 over the root mean square of the float64 result.

{table(header, cells)}

Geometric mean of the ratio, best to best: **{geomean(ratios):.2f}** over {len(rows)} cases (forward \
{geomean([ratio(r) for r in rows if not r["backward"]]):.2f}, forward+backward \
{geomean([ratio(r) for r in rows if r["backward"]]):.2f}). Cases lost: {"; ".join(losses) if losses else "none"}.

![Ratios of conv2d](images/conv2d_cpu.png)
"""


OPS = {
    "conv_bn_relu": "Convolution, batch norm and activation",
    "aspp": "ASPP",
    "pyramid_pool": "Pyramid pooling",
    "upsample_cross_entropy": "Upsampling and cross-entropy",
    "upsample_argmax": "Upsampling and argmax",
    "dense_crf": "Dense CRF",
    "domain_transform": "Domain transform",
}


def op_section(op: str, title: str) -> str:
    """One op beside the fastest of everything it was compared with."""
    result = load(f"{op}_cpu.json")
    if result is None:
        return ""
    cells, ratios = [], []
    rows: Rows = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    for row in (row for row in rows if "candidates" in row):
        (peer, theirs), (own, mine) = fastest(row, False), fastest(row, True)
        ratios.append(theirs / mine)
        candidates = row["candidates"]
        peak = candidates[own].get("extra_peak_bytes")
        least = min(
            (c["extra_peak_bytes"] for n, c in candidates.items() if not n.startswith("ours") and peak is not None), default=0
        )
        cells.append(
            [
                row["case"],
                f"{milliseconds(theirs)} ({peer.replace('_', '-')})",
                milliseconds(mine),
                f"**{theirs / mine:.2f}**",
                f"{row['floor_ms'] / mine:.0%}" if "floor_ms" in row else "",
                f"{candidates[own]['error']:.1e}" if "error" in candidates[own] else "",
                f"{peak / 2**20:.1f} MiB of {least / 2**20:.0f}" if peak is not None else "",
            ]
        )
    header = ["case", "fastest other, ms", "ours, ms", "ratio", "of the floor", "error", "extra peak memory, ours of theirs"]
    keep = [i for i in range(len(header)) if i < 4 or any(line[i] for line in cells)]
    body = table([header[i] for i in keep], [[line[i] for i in keep] for line in cells])
    memory = [
        f"{row['case']}: {row['peak_gib']:.2f} GiB resident at most ({row['before_gib']:.2f} before), "
        f"{row['refine_seconds']:.0f} s."
        for row in rows
        if "peak_gib" in row
    ]
    missing = [
        f"{benchmark['extra_info']['case']}: {name.replace('_', '-')} failed ({reason})"
        for benchmark in result["benchmarks"]
        for name, reason in benchmark["extra_info"].get("failures", {}).items()
    ]
    without = f"\n\nNot compared with: {'; '.join(missing)}." if missing else ""
    return f"""## {title} on the CPU

{machine_line(result)}

{body}

{" ".join([f"Geometric mean of the ratio: **{geomean(ratios):.2f}** over {len(cells)} cases.{without}", *memory])}
"""


def errors_section() -> str:
    """Root mean square and largest rounding error of every algorithm."""
    result = load("errors_cpu.json")
    if result is None:
        return ""
    rows: Rows = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    algorithms = list(rows[0]["errors"]["forward"])
    cells = [
        [f"{row['case']}, {name}", *(f"{found[each]['rms']:.1e}, {found[each]['max']:.1e}" for each in algorithms)]
        for row in rows
        for name, found in row["errors"].items()
    ]
    return f"""## Rounding errors of conv2d on the CPU

{machine_line(result)}

Difference from float64 over the root mean square of the float64 result: its own root mean square, then the largest. One image,
3x3 kernels; the input is what a ReLU leaves of normal numbers, weights and output gradients are normal. bf16 is compared
with float64 on the same bf16 operands. *torch* is the framework's own convolution. Where a phase has two
pixels, as at rate 18, tiles make no difference.

{table(["case, pass", *algorithms], cells)}
"""


def dispatch_section() -> str:
    result = load("dispatch_cpu.json")
    if result is None:
        return ""
    rows: Rows = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    names = ["choice", "ours auto", "ours cpu", "ours torch", "torch"]
    cells = [[row["case"], *(f"{1e3 * row['candidates'][name]['p50_ms']:.1f}" for name in names)] for row in rows]
    return f"""## What a call costs

{machine_line(result)}

Microseconds of a call on a problem of next to no arithmetic, in a loop, and of the choice of an implementation alone.

{table(["case", *names], cells)}
"""


def fuzz_section() -> str:
    result = load("fuzz.json")
    if result is None:
        return ""
    header = ["op", "instruction set", "problems", "mismatches", "commit"]
    rows = []
    for run in result["runs"]:
        rows.append([run["op"], run["isa"], f"{run['problems']:,}", str(run["mismatches"]), f"`{run['commit'][:10]}`"])
    return f"## Random problems against exact answers\n\n`python -m tests.fuzz`.\n\n{table(header, rows)}\n"


def kernels_section() -> str:
    lines = []
    triton = load("triton_resources.json")
    if triton:
        rows = triton["rows"]
        matrix = [row for row in rows if row["mma"] or row["wgmma"] or row["tcgen05"]]
        targets = sorted({row["target"] for row in rows}, key=lambda name: int(name.removeprefix("sm_")))
        lines.append(
            f"- Triton {triton['triton']}: {len(rows)} specialisations compiled ahead of time for "
            f"{', '.join(targets)}; {len(matrix)} of them with matrix instructions; "
            f"{sum(row['spill_bytes'] for row in rows)} bytes spilled in all, at most {max(row['registers'] for row in rows)} "
            f"registers and {max(row['shared_bytes'] for row in rows) / 1024:.0f} KiB of shared memory."
        )
    cuda = load("cuda_resources.json")
    if cuda:
        kernels = [kernel for file in cuda["files"].values() for kernel in file.values()]
        builds = [b for kernel in kernels for b in kernel.values()]
        spills = sum(b["spill_store_bytes"] + b["spill_load_bytes"] for b in builds)
        lines.append(
            f"- CUDA C++ (nvcc {cuda['nvcc']}): {len(builds)} kernel builds for {', '.join(kernels[0])}; {spills} bytes spilled "
            f"in all, at most {max(b['registers'] for b in builds)} registers."
        )
    if not lines:
        return ""
    text = "\n".join(lines)
    return f"""## GPU kernels, as compiled

Nothing here was timed on a GPU. The kernels are executed in the tests by Triton's interpreter and by the host emulation.

{text}
"""


def plan_section() -> str:
    result = load("plan_model.json")
    if result is None:
        return ""
    names = result["gpus"]
    cells = []
    for row in result["rows"]:
        h200 = row["gpus"]["h200"]
        modelled = row["programs"] > 0
        cells.append(
            [
                row["case"],
                row["op"],
                row["kernel"].partition(".")[0],
                "x".join(map(str, row["blocks"])),
                f"{row['programs']} ({h200['waves']:.2f})" if modelled else "",
                f"{row['valid_gflop'] / row['executed_gflop']:.1%}" if modelled else "",
                f"{h200['balance']:.0%}" if modelled else "",
                f"{h200['longest_first_us']:.0f}" if modelled else "",
                *(f"{row['gpus'][gpu]['modelled_us']:.0f} / {row['gpus'][gpu]['floor_us']:.0f}" for gpu in names),
            ]
        )
    header = ["case", "op", "kernels", "blocks", "programs (waves)", "valid", "balance", "longest first"]
    header += [f"{gpu} / floor" for gpu in names]
    return f"""## Launch plans on GPUs, modelled

**A model, not a measurement**: nothing here ran on a GPU. `python -m benchmarks.plan` deals the programs that the launchers of
Triton and of the CUDA kernels for tensor cores would launch to the multiprocessors of {", ".join(names.values())}, each as slow
as its arithmetic at the peak or its L2 traffic; `python -m atrous_kernels plan` does it for any problem. Microseconds; waves,
balance (average over longest-working multiprocessor) and *longest first* (were the programs sorted) are those of
{names["h200"]}. *Valid*: share of real input in the arithmetic of whole blocks. The floor is that of the valid taps. What is left
out is told in `atrous_kernels/gpu_model.py`.

{table(header, cells)}
"""


def page() -> str:
    sections = ["# Results\n\nMade by `python -m benchmarks.report` from `benchmarks/results/`; do not edit.\n"]
    convolution, models = load("conv2d_cpu.json"), load("models_cpu.json")
    if convolution:
        sections.append(convolution_section(convolution))
    if models:
        sections.append(models_section(models))
    sections.append(all_models_section())
    sections += [op_section(op, title) for op, title in OPS.items()]
    sections += [dispatch_section(), errors_section(), fuzz_section()]
    sections += [training_section(), families_section(), published_section(), weak_section()]
    sections += [refinement_section(), kernels_section(), plan_section()]
    return "\n".join(section for section in sections if section)


def readme_block() -> str:
    """The few figures that the README shows, losses included."""
    lines = []
    convolution, models = load("conv2d_cpu.json"), load("models_cpu.json")
    if convolution:
        rows: Rows = [benchmark["extra_info"] for benchmark in convolution["benchmarks"]]
        groups: dict[str, Rows] = {}
        for row in rows:
            groups.setdefault(
                f"{row['name']}, {row['dtype']}, {'forward+backward' if row['backward'] else 'forward'}", []
            ).append(row)
        cells = [
            [
                name,
                f"{min(map(ratio, group)):.2f} to {max(map(ratio, group)):.2f}",
                f"{geomean(list(map(ratio, group))):.2f}",
            ]
            for name, group in groups.items()
        ]
        lines.append(
            "`conv2d` against the best of PyTorch's contiguous, channels-last and `torch.compile` "
            f"({convolution['machine_info']['cpu']['brand_raw']}, {convolution['machine_info']['threads']} threads; above 1 "
            "we are faster):\n\n" + table(["cases", "ratio", "geometric mean"], cells)
        )
    if models:
        lines += [
            f"- {row['case']}: **{best_speed(row, 'ours'):.2f}** images/s, {best_speed(row, 'torch'):.2f} on the framework's "
            f"convolution (ratio {ratio(row):.2f})"
            for row in (benchmark["extra_info"] for benchmark in models["benchmarks"])
        ]
    for path in sorted((RESULTS / "training").glob("*.json")):
        if "." not in path.stem:
            run = json.loads(path.read_text())
            lines.append(
                f"- `{path.stem}`: **{run['miou']:.3f}** mIoU on {run['images']} validation images after "
                f"{run['seconds'] / 60:.0f} minutes on {run['machine']['threads']} CPU thread(s)"
            )
    listed = "\n".join(line for line in lines if line.startswith("- "))
    return "\n\n".join([*(line for line in lines if not line.startswith("- ")), listed]).strip()


def best_speed(row: dict[str, Any], prefix: str) -> float:
    return max(c["images_per_second"] for name, c in row["candidates"].items() if name.startswith(prefix))


def explain_block() -> str:
    """What the explain command prints; the same on every machine with the compiled library and Triton."""
    out = subprocess.run(
        [sys.executable, "-m", "atrous_kernels", "explain", *EXPLAINED.split()], capture_output=True, text=True, check=True
    )
    return f"```\n$ python -m atrous_kernels explain {EXPLAINED}\n{out.stdout.rstrip()}\n```"


def readme_text() -> str:
    return with_blocks(README, "benchmarks.report", {"explain": explain_block(), "results": readme_block()})


def plots() -> None:
    """The pictures of docs/results.md."""
    from segmodels.engine.report import curves_png

    IMAGES.mkdir(parents=True, exist_ok=True)
    convolution = load("conv2d_cpu.json")
    if convolution:
        _ratio_plot([benchmark["extra_info"] for benchmark in convolution["benchmarks"]], IMAGES / "conv2d_cpu.png")
    for path in sorted((RESULTS / "training").glob("*.json")):
        run = json.loads(path.read_text())
        if "." not in path.stem:
            curves_png(IMAGES / f"{path.stem}.png", run["curve"]["train"], run["curve"]["validation"])


def _ratio_plot(rows: Rows, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.27 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    values = [ratio(row) for row in rows][::-1]
    bars = axes.barh([row["case"] for row in rows][::-1], values, color=["tab:blue" if v >= 1 else "tab:red" for v in values])
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *values), max(values) * 1.25)
    axes.set_xlabel("framework's best setting / ours (above 1: ours is faster)", fontsize=8)
    axes.tick_params(labelsize=7)
    figure.canvas = FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the texts differ from the results")
    check = parser.parse_args(arguments).check
    drifted = []
    for path, text in ((PAGE, page()), (README, readme_text())):
        if check:
            if not path.exists() or path.read_text() != text:
                drifted.append(path.name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if drifted:
        print(f"differ from the committed results: {', '.join(drifted)}; run python -m benchmarks.report", file=sys.stderr)
    if not check:
        plots()
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
