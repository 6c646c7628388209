"""``python -m segmodels.predict --checkpoint FILE --output DIR IMAGE_OR_FOLDER_OR_LIST ...`` (or ``--config RECIPE``).

Writes a colour overlay as PNG for every image, of any size. A folder stands for all images in it and below, a ``.txt`` file
for the paths in it, one per line (relative ones are looked for beside the list). A file that cannot be read is named and
skipped; exit code 1 says that some were. With ``--submission``, writes what an evaluation server takes instead of pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import atrous_kernels
from segmodels.config import ConfigError
from segmodels.data import DataError, read_image
from segmodels.data.files import IMAGE_SUFFIXES
from segmodels.engine.build import build_predictor, load_trained, prepare_runtime
from segmodels.engine.cli import add_inference_flags, build_parser, flag_overrides, run_command, split_overrides
from segmodels.engine.progress import Reporter, complain, say
from segmodels.engine.submission import IDS, check_classes, write_submission
from segmodels.engine.visualize import legend, overlay, write_png


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code. Errors as the functions it is made of."""
    parser = build_parser("predict", (__doc__ or "").strip())
    add_inference_flags(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the pictures, made where missing")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the class colours in the overlay (0.5)")
    parser.add_argument("--masks", action="store_true", help="write the class ids as well, as STEM_mask.png")
    parser.add_argument("--submission", metavar="NAME", help=f"label maps for a server instead: {', '.join(IDS)}")
    parser.add_argument("--attention", action="store_true", help="write how much each scale counts, as STEM_attention_SCALE.png")
    parser.add_argument("--stop-on-error", action="store_true", help="stop at the first file that cannot be read")
    parser.add_argument("inputs", nargs="+", metavar="INPUT or section.key=value", help="images, folders, lists, settings")
    flags = parser.parse_intermixed_args(arguments)
    overrides, inputs = split_overrides(flags.inputs)
    if not 0 <= flags.alpha <= 1:
        raise ConfigError(f"--alpha {flags.alpha}: expected 0 to 1")
    files = collect_images(inputs)
    model, config, _, origin = load_trained(flags.checkpoint, flags.config, overrides + flag_overrides(flags))
    device = prepare_runtime(config)
    predictor = build_predictor(config, model.to(device), device)
    if flags.submission is not None:
        check_classes(flags.submission, len(origin.classes))
    colors = np.array(origin.colors, np.uint8)
    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)

    skipped = 0
    reporter = Reporter("predict", len(files), seconds=config.run.print_seconds)
    with reporter, atrous_kernels.backend(config.run.backend):
        for done, (file, name) in enumerate(files, 1):
            try:
                image = read_image(file, exif_orientation=flags.submission is None)  # servers compare with the file as it lies
            except (DataError, OSError) as error:
                if flags.stop_on_error:
                    raise
                complain(f"skipped: {error}")
                skipped += 1
                continue
            label = predictor(image)
            reporter.update(done)
            if flags.submission is not None:
                write_submission(flags.submission, output, name, label)
                continue
            write_png(output / f"{name}_overlay.png", overlay(image, label, colors, flags.alpha))
            if flags.masks:
                write_png(output / f"{name}_mask.png", label)
            if flags.attention:
                for scale, weight in zip(model.scales, predictor.attention(image), strict=True):  # type: ignore[arg-type]
                    write_png(output / f"{name}_attention_{scale:g}.png", (255 * weight).round().astype(np.uint8))
    written = f"label maps for {flags.submission}"
    if flags.submission is None:
        write_png(output / "legend.png", legend(origin.classes, colors, 480))
        written = "overlays and legend.png"
    say(f"wrote {len(files) - skipped} {written} to {output}" + (f"; skipped {skipped}" if skipped else ""))
    return 1 if skipped else 0


def collect_images(inputs: list[str]) -> list[tuple[Path, str]]:
    """Files with the names of their pictures, without suffix.

    Stems name the pictures; where two files share one, the folders between them and what was given are joined in front.

    Raises:
        ConfigError: nothing given, a path that does not exist, or a folder or list without images.
    """
    if not inputs:
        raise ConfigError("no input: expected images, folders or .txt lists")
    found: list[tuple[Path, Path]] = []  # file, and what it is called relative to the input it came from
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
            if not images:
                raise ConfigError(f"{path}: no images in this folder; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
            found += [(file, file.relative_to(path)) for file in images]
        elif path.suffix == ".txt" and path.is_file():
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
            if not lines:
                raise ConfigError(f"{path}: the list is empty; expected one path per line")
            found += [(path.parent / line, Path(line)) for line in lines]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise ConfigError(f"{path} does not exist: expected an image, a folder or a .txt list")
    stems = [relative.stem for _, relative in found]
    named, used = [], set()
    for (file, relative), stem in zip(found, stems, strict=True):
        parts = [part for part in relative.with_suffix("").parts if part not in ("..", "/")]
        name = base = stem if stems.count(stem) == 1 else "_".join(parts)
        number = 2
        while name in used:  # the same file given twice, or a.png beside a.jpg
            name, number = f"{base}_{number}", number + 1
        used.add(name)
        named.append((file, name))
    return named


if __name__ == "__main__":
    sys.exit(run_command(main))
