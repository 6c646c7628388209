"""``python -m segmodels.weak NAME ROOT --out FILE``: reduces the label maps of a data set to image tags and boxes.

``segmodels.train`` takes the file as ``weak.labels``. Every connected component of a class has a box, or every object where
``--instances`` names a folder of maps that tell objects apart (PASCAL VOC: SegmentationObject).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from segmodels.config import ConfigError
from segmodels.data import create_dataset
from segmodels.engine.cli import run_command
from segmodels.engine.progress import Reporter, say
from segmodels.weak.annotations import derive


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Errors as the functions it is made of."""
    parser = argparse.ArgumentParser(
        prog="python -m segmodels.weak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="data set, see python -m segmodels.data list")
    parser.add_argument("root", metavar="ROOT", nargs="?", help="its folder")
    parser.add_argument("--out", metavar="FILE", required=True, help="the JSON to write")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], help="further arguments of the data set")
    parser.add_argument("--background", metavar="CLASS", help='class without tags and boxes; by default "background", if any')
    parser.add_argument("--instances", metavar="DIR", type=Path, help="folder of maps NAME.png that tell objects apart")
    parser.add_argument("--min-area", metavar="N", type=int, default=16, help="pixels of a piece with a box (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(arguments)
    dataset = create_dataset(flags.name, flags.root, flags.split, **dict(map(_option, flags.option)))
    background = flags.background or "background"
    if flags.background and background not in dataset.classes:
        raise ConfigError(f"--background {background!r}: expected one of {', '.join(dataset.classes)}")
    with Reporter("weak labels", len(dataset)) as reporter:
        labels = derive(
            dataset,
            flags.name,
            background=dataset.classes.index(background) if background in dataset.classes else None,
            instances=flags.instances,
            min_area=flags.min_area,
            progress=lambda done, total: reporter.update(done, ""),
        )
    Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    labels.save(flags.out)
    tags, boxes = (sum(len(getattr(found, what)) for found in labels.images.values()) for what in ("tags", "boxes"))
    say(f"wrote {flags.out}: {len(labels.images)} images, {tags} tags, {boxes} boxes")
    return 0


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--option {text!r}: expected KEY=VALUE")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    sys.exit(run_command(main))
