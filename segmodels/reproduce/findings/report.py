"""The findings as a section of docs/reproduction.md, as plots and as a page, from the committed rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from segmodels.engine.checkpoints import atomic_write
from segmodels.engine.progress import complain, say
from segmodels.reproduce.findings.arms import ARMS
from segmodels.reproduce.findings.definitions import SEEDS
from segmodels.reproduce.findings.experiment import ROOT, load_rows
from segmodels.reproduce.findings.results import Comparison, Result, Rows, results
from segmodels.reproduce.findings.statistics import CONFIDENCE
from segmodels.reproduce.marks import marked, replaced

DOCUMENT = ROOT / "docs" / "reproduction.md"
OVERVIEW = ROOT / "docs" / "images" / "findings.png"
INTRODUCTION = f"""## Findings of the papers, run again on small networks

What the papers concluded by changing one thing at a time, on networks that train in seconds: a ResNet-18 of a quarter of its
width, from scratch on the synthetic scenes at 96 x 96 pixels, and EfficientNet-Lite0 from ImageNet weights on CamVid at a quarter
of its size. The scores are not comparable with the papers' (another task, another network); the *differences* are what is
compared. Recipes: `segmodels/reproduce/findings/arms.py`; one file per run: `benchmarks/results/findings/`;
`python -m segmodels.reproduce findings run --budget 60m` continues where it stopped, `findings report` writes this section and,
in `runs/findings/report`, a page with learning curves and predictions.

Arms of a comparison are paired by seed (initialisation, order, augmentation). The interval is that of Student's t at
{CONFIDENCE:.0%} for the mean difference; it is not corrected for the number of comparisons. A comparison *holds* where the whole
interval has the paper's sign, *does not hold* where it has the other, and is *undecided* otherwise; a finding holds where all its
comparisons do, and does not where one does not. With few seeds only effects far above the noise can be told from chance."""


def main(folder: Path, runs: Path, *, pictures: bool = False, check: bool = False) -> int:
    """Writes the section, its overview plot, and the page in ``runs/report``; with ``check`` only compares the section.

    Returns:
        The exit code: 1 where the document is not what the rows say.
    """
    rows = load_rows(folder)
    text = section(rows)
    before = DOCUMENT.read_text() if DOCUMENT.is_file() else ""
    after = with_section(before, text)
    if check:
        if before != after:
            complain(f"{DOCUMENT} is not what {folder} says: run python -m segmodels.reproduce findings report")
        return int(before != after)
    from segmodels.reproduce.findings import page, plots  # import matplotlib, which --check can do without

    found = results(rows)
    atomic_write(DOCUMENT, after.encode())
    plots.overview(OVERVIEW, found)
    page.write(runs / "report", found, rows, runs if pictures else None)
    say(f"wrote {DOCUMENT}, {OVERVIEW} and {runs / 'report' / 'index.html'}")
    return 0


def with_section(document: str, text: str) -> str:
    """The document with the section between its marks, or at the end where there are none."""
    return replaced(document, "findings", text) or f"{document.rstrip()}\n\n{marked('findings', text)}".lstrip()


def section(rows: Rows) -> str:
    """The whole section as Markdown."""
    found = results(rows)
    parts = [_introduction(rows, found), _summary(found), "![Findings, the papers' scores and ours](images/findings.png)"]
    parts += [_finding(name, result) for name, result in found.items()]
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; all columns but the first are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None, sign: str = "") -> str:
    """One digit behind the point; a dash for what there is not."""
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.1f}"


def interval(comparison: Comparison) -> str:
    """Mean difference with its interval."""
    ours = comparison.ours
    if math.isnan(ours.low):
        return number(ours.mean, "+")
    return f"{number(ours.mean, '+')} [{number(ours.low, '+')}, {number(ours.high, '+')}]"


def explanation(result: Result) -> str:
    """What the differences say, in words, and the reason where a finding does not hold."""
    if result.verdict == "not run":
        return "Not run yet."
    against = [c for c in result.comparisons if c.ours.verdict == "does not hold"]
    open_ = [c for c in result.comparisons if c.ours.pairs and c.ours.verdict == "undecided"]
    missing = [c for c in result.comparisons if not c.ours.pairs]
    parts = [f"Here it **{result.verdict}**." if result.verdict != "undecided" else "Here it is **undecided**."]
    parts += [f"{_first(_name(c.above))} is *below* {_name(c.below)} by {number(-c.ours.mean)} points." for c in against]
    for c in open_:
        above = c.ours.mean > 0
        count = c.ours.above if above else c.ours.pairs - c.ours.above
        parts.append(
            f"{_first(_name(c.above))} is {'above' if above else 'below'} {_name(c.below)} in {count} of {c.ours.pairs} seeds "
            f"and by {number(abs(c.ours.mean))} points on average, within what chance can do."
        )
    parts += [f"{_first(_name(c.above))} against {_name(c.below)} was not run." for c in missing]
    if result.verdict != "holds" and result.finding.why:
        parts.append(result.finding.why)
    return " ".join(parts)


def _introduction(rows: Rows, found: dict[str, Result]) -> str:
    seeds = sorted({seed for _, seed in rows})
    arms = {arm for arm, _ in rows}
    lines = [INTRODUCTION]
    if rows:
        trained = sum(row["evaluates"] is None for row in rows.values())
        seconds = sum(row["seconds"] for row in rows.values())
        machine = next(iter(rows.values()))["machine"]
        commits = sorted({row["commit"][:10] + (" with changes" if row["dirty"] else "") for row in rows.values()})
        lines += ["", f"{trained} trainings and {len(rows) - trained} evaluations of {len(arms)} arms, {len(seeds)} seeds, "
                  f"{seconds / 60:.0f} minutes on one thread, pauses included ({machine['cpu']}, {machine['instruction_set']}), "
                  f"commits {', '.join(f'`{commit}`' for commit in commits)}."]  # fmt: skip
    wanted = {arm for result in found.values() for arm in result.scores}
    for seed in range(SEEDS):
        missing = [f"`{arm}`" for arm in sorted(wanted) if (arm, seed) not in rows]
        if missing:
            lines += ["", f"Missing with seed {seed}: {', '.join(missing) if len(missing) < len(wanted) else 'all arms'}."]
    return "\n".join(lines)


def _summary(found: dict[str, Result]) -> str:
    cells = []
    for name, result in found.items():
        total = len(result.comparisons)
        compared = sum(c.ours.pairs > 0 for c in result.comparisons)
        decided = sum(c.ours.verdict == "holds" for c in result.comparisons)
        seeds = max((c.ours.pairs for c in result.comparisons), default=0)
        finding = result.finding
        cells.append([f"[{finding.title}](#{_anchor(name)})", finding.paper, finding.table, str(seeds),
                      f"{result.in_order} of {compared}", f"{decided} of {total}", result.verdict])  # fmt: skip
    return table(["finding", "paper", "where", "seeds", "paper's sign", "beyond chance", "verdict"], cells)


def _finding(name: str, result: Result) -> str:
    finding = result.finding
    what = "mIoU" if isinstance(finding.metric, str) else f"mean IoU of {' and '.join(finding.metric)}"
    arms = [
        [_name(arm), number(published), number(result.mean(arm)), " ".join(map(number, result.scores[arm].values()))]
        for arm, published in finding.arms.items()
    ]
    pairs = [
        [f"{_name(c.above)} over {_name(c.below)}", number(c.published, "+"), interval(c), _count(c),
         c.ours.verdict if c.ours.pairs else "not run"]
        for c in result.comparisons
    ]  # fmt: skip
    claim = f"{finding.paper}, {finding.table}: {finding.claim}."
    differs = f" Not as there: {finding.differs}." if finding.differs else ""
    return "\n\n".join([
        f'### <a id="{_anchor(name)}"></a>{finding.title}',
        f"{claim}{differs}",
        table(["arm", f"published {what}" if isinstance(finding.metric, str) else "published", f"our {what}", "by seed"], arms),
        table(["difference", "published", "ours", "seeds with the sign", "verdict"], pairs),
        explanation(result),
    ])  # fmt: skip


def _anchor(name: str) -> str:
    return f"finding-{name.replace('_', '-')}"


def _name(arm: str) -> str:
    return ARMS[arm].text


def _first(text: str) -> str:
    """As the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _count(comparison: Comparison) -> str:
    return f"{comparison.ours.above} of {comparison.ours.pairs}"


