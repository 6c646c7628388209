"""``python -m segmodels.models [PATTERN ...]``: every model with its size, cost, reach and source.

Nothing is computed and no weights are stored. Operations are those of the convolutions for one image; "valid" leaves out the taps
that fall on padding zeros, which is what our kernels execute. A receptive field with ``+`` is completed by pooling over the
whole image.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from segmodels.config import ConfigError
from segmodels.engine.cli import run_command
from segmodels.engine.progress import console
from segmodels.registry import list_models
from segmodels.summary import Summary, summarise


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Raises ConfigError for a pattern without models."""
    parser = argparse.ArgumentParser(
        prog="python -m segmodels.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="as in list_models: 'deeplabv3_*'")
    parser.add_argument("--size", type=int, nargs=2, default=(513, 513), metavar=("H", "W"), help="of the image (513 513)")
    parser.add_argument("--num-classes", type=int, default=21, metavar="N", help="of the logits (21)")
    parser.add_argument("--output-stride", type=int, metavar="N", help="instead of each paper's own")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(arguments)
    if min(flags.size) < 1:
        raise ConfigError(f"--size {flags.size[0]} {flags.size[1]}: expected positive numbers")
    names = [name for pattern in flags.patterns for name in list_models(pattern)]
    if not names:
        raise ConfigError(f"no model matches {' '.join(flags.patterns)}: expected a pattern as 'deeplabv3_*'")
    options = {"num_classes": flags.num_classes}
    if flags.output_stride is not None:
        options["output_stride"] = flags.output_stride
    rows = [summarise(name, tuple(flags.size), **options) for name in dict.fromkeys(names)]
    title = f"one image of {flags.size[0]} x {flags.size[1]}, {flags.num_classes} classes"
    # In a pipe the console takes itself for 80 columns wide and cuts the names.
    wide = Console(width=max(console.width, 120))
    wide.print(table(rows, title))
    for source in dict.fromkeys(row.source for row in rows):
        wide.print(f"- {source}", highlight=False, soft_wrap=True)
    return 0


def table(rows: list[Summary], title: str) -> Table:
    """The summaries as they are printed."""
    found = Table(title=title)
    found.add_column("model", no_wrap=True)
    for column in ("parameters", "receptive field", "output stride", "dense GFLOP", "valid GFLOP", "valid share"):
        found.add_column(column, justify="right")
    for row in rows:
        found.add_row(
            row.name,
            f"{row.parameters:,}",
            f"{row.receptive_field}{'+' if row.global_context else ''}",
            str(row.output_stride),
            f"{row.dense_flops / 1e9:.1f}",
            f"{row.valid_flops / 1e9:.1f}",
            f"{row.valid_flops / row.dense_flops:.0%}",
        )
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
