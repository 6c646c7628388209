"""``python -m segmodels.data list | check | prepare | shard``: the data sets, and what is on the disk of them.

Exit codes: 0 when all is well, 1 for an error or a data set that is not as it should be.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from pathlib import Path

import yaml
from rich.table import Table

from segmodels.config import ConfigError
from segmodels.data import DATASETS, create_dataset, dataset_kind
from segmodels.data.check import check
from segmodels.data.prepare import Progress, unpack
from segmodels.data.shards import write_shards
from segmodels.engine.cli import run_command
from segmodels.engine.progress import complain, console, say


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Errors as the functions it is made of."""
    parser = argparse.ArgumentParser(
        prog="python -m segmodels.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the data sets; with NAME, the layout that one is expected in")
    listing.add_argument("name", metavar="NAME", nargs="?")
    checking = commands.add_parser("check", help="reads every file and compares with the published counts")
    preparing = commands.add_parser("prepare", help="unpacks official archives into ROOT and converts what needs it")
    packing = commands.add_parser("shard", help="packs a split into tar files in the layout of WebDataset")
    for command in (checking, preparing, packing):
        command.add_argument("name", metavar="NAME", help=", ".join(DATASETS))
        command.add_argument("root", metavar="ROOT", nargs="?" if command is not preparing else None, help="its folder")
    preparing.add_argument("archives", metavar="ARCHIVE", nargs="*", type=Path, help="tar or zip files, or folders")
    packing.add_argument("out", metavar="OUT", type=Path, help="the folder to write to")
    packing.add_argument("--split", default="train", help="default: %(default)s")
    packing.add_argument("--items", metavar="N", type=int, default=1000, help="per tar file (%(default)s)")
    checking.add_argument("--split", metavar="SPLIT", action="append", default=[], help="only this one (repeatable)")
    checking.add_argument("--show", metavar="N", type=int, default=10, help="bad files to name (%(default)s)")
    checking.add_argument("--every", metavar="N", type=int, default=1, help="read one file of N")
    for command in (checking, packing):
        command.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], help="arguments of the data set")
    for command in (listing, checking, preparing, packing):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(arguments)
    return {"list": _list, "check": _check, "prepare": _prepare, "shard": _shard}[flags.command](flags)


def _list(flags: argparse.Namespace) -> int:
    if flags.name:
        kind = dataset_kind(flags.name)
        say(f"{kind.TITLE}\n\n{inspect.getdoc(kind)}")
        return 0
    table = Table("name", "classes", "split: images as published", "")
    for name, *row in rows():
        table.add_row(name, *row)
    console.print(table)
    return 0


def rows() -> list[tuple[str, str, str, str]]:
    """Of each data set its name, number of classes, splits and title."""
    found = []
    for name, kind in sorted(DATASETS.items()):
        splits = ", ".join(split + (f": {count}" if count else "") for split, count in (kind.COUNTS or {}).items())
        found.append((name, str(len(kind.CLASSES) or "any"), splits or "any", kind.TITLE))
    return found


def _check(flags: argparse.Namespace) -> int:
    if flags.every < 1:
        raise ConfigError(f"--every {flags.every}: expected 1 or more")
    options = _options(flags.option)
    reports, fine = check(flags.name, flags.root, flags.split, _progress(), flags.show, flags.every, **options)
    for report in reports:
        say(str(report))
    say("as published" if fine else f"not as it should be; python -m segmodels.data list {flags.name} shows the layout")
    return 0 if fine else 1


def _prepare(flags: argparse.Namespace) -> int:
    kind, root = dataset_kind(flags.name), Path(flags.root).expanduser()
    if not kind.MEMBERS:
        raise ConfigError(f"data set {flags.name!r} has nothing to prepare")
    root.mkdir(parents=True, exist_ok=True)
    progress = _progress()
    for archive in flags.archives:
        written = unpack(archive, root, kind.MEMBERS, flags.name, progress)
        say(f"{archive}: {written} files written, what was there is left alone")
    for line in kind.prepare(root, progress):
        say(line)
    say(f"python -m segmodels.data check {flags.name} {flags.root} reads all of it")
    return 0


def _shard(flags: argparse.Namespace) -> int:
    dataset = create_dataset(flags.name, flags.root, flags.split, **_options(flags.option))
    paths = write_shards(dataset, flags.out, flags.items, _progress())
    say(f"wrote {flags.out}: {len(dataset)} items in {len(paths)} tar files; data.name=shards data.root={flags.out}")
    return 0


def _progress() -> Progress:
    """A line on the error stream every ten seconds."""
    last = time.monotonic()

    def tell(what: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            complain(f"{what}: {done}" + (f" of {total}" if total else ""))

    return tell


def _options(given: list[str]) -> dict[str, object]:
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text!r}: expected KEY=VALUE")
        options[key] = yaml.safe_load(value)
    return options


if __name__ == "__main__":
    sys.exit(run_command(main))
