"""Reading images and masks from disk, with errors that name the file and what was expected of it.

``cv2.imread`` prints a warning and returns ``None`` (in OpenCV 4, half a picture) for a truncated file, and expands palette
masks to colours. Both would spoil a training run silently, so the bytes are checked before they are decoded, and masks are
read as stored indices.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # no JPEG: lossy compression invents class ids along every edge

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class DataError(RuntimeError):
    """A data set on disk is not what it should be; the message names the file and what was expected."""


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file. Raises DataError where it is missing, not a file or not readable."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected an image file") from error


def must_be_whole(data: bytes, where: str | Path) -> None:
    """Raises DataError where the bytes of an image are none, or visibly cut off."""
    if not data:
        raise DataError(f"{where}: the file is empty; expected an image")
    # Entropy-coded data never holds the scan marker: an end marker before the last scan belongs to an embedded thumbnail.
    if data.startswith(_JPEG_START) and data.rfind(_JPEG_END) <= data.rfind(_JPEG_SCAN):
        raise DataError(f"{where}: truncated JPEG, the {len(data)} bytes end without an end-of-image marker (FF D9)")
    if data.startswith(_PNG_START) and _PNG_END not in data:
        raise DataError(f"{where}: truncated PNG, the {len(data)} bytes end without an IEND chunk")


def read_image(path: str | Path, *, exif_orientation: bool = False) -> np.ndarray:
    """Decodes an image file to RGB.

    Args:
        path: a file in any format OpenCV decodes (JPEG, PNG, BMP, TIFF, ...).
        exif_orientation: turn the picture as its EXIF tag says. Off by default, because the masks of a data set are
            drawn on the stored pixel grid and carry no such tag.

    Returns:
        uint8 ``[H, W, 3]``, RGB, contiguous.

    Raises:
        DataError: the file is missing, truncated, or not an image.
    """
    return decode_image(read_bytes(Path(path)), path, exif_orientation=exif_orientation)


def decode_image(data: bytes, where: str | Path, *, exif_orientation: bool = False) -> np.ndarray:
    """As :func:`read_image`, of bytes; ``where`` they are from is for messages."""
    must_be_whole(data, where)
    flags = cv2.IMREAD_COLOR if exif_orientation else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DataError(f"{where}: cannot be decoded as an image ({error.err})") from error
    if image is None:
        raise DataError(f"{where}: cannot be decoded as an image ({len(data)} bytes, starting {data[:4].hex(' ')})")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_mask(path: str | Path) -> np.ndarray:
    """Decodes a mask of class ids: 8-bit grey, or the indices of a palette image (VOC).

    Returns:
        uint8 ``[H, W]``.

    Raises:
        DataError: the file is missing, truncated, not an image, or not one 8-bit channel (a colour picture has lost its
            ids).
    """
    return decode_mask(read_bytes(Path(path)), path)


def decode_mask(data: bytes, where: str | Path) -> np.ndarray:
    """As :func:`read_mask`, of bytes; ``where`` they are from is for messages."""
    must_be_whole(data, where)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in ("L", "P", "1"):
                raise DataError(
                    f"{where}: the mask has pixel mode {picture.mode!r}; expected one 8-bit channel of class ids "
                    "(grey 'L' or palette 'P')"
                )
            return np.array(picture, dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow's for broken PNGs
        raise DataError(f"{where}: cannot be decoded as a mask ({error})") from error


def list_by_stem(folder: Path, suffixes: tuple[str, ...], what: str) -> dict[str, Path]:
    """Files of a folder by stem, sorted. Raises DataError where the folder holds none, or one stem twice."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            both = f"{found[path.stem].name} and {path.name}"
            raise DataError(f"{folder}: two {what} share the stem {path.stem!r}: {both}")
        found[path.stem] = path
    if not found:
        raise DataError(f"{folder}: no {what} here; expected files ending in {', '.join(suffixes)}")
    return found


def find_root(root: str | Path | None, dataset: str, layout: str) -> Path:
    """Checks that ``root`` is a folder. ``layout`` describes what should be inside, for the message."""
    if root is None:
        raise DataError(f"dataset {dataset!r} needs root=, the folder that holds {layout}")
    path = Path(root).expanduser()
    if not path.is_dir():
        state = "is a file" if path.is_file() else "does not exist"
        raise DataError(f"{path}: the root of dataset {dataset!r} {state}; expected a folder that holds {layout}")
    return path


def first_layout(root: Path, dataset: str, layouts: list[tuple[str, str]]) -> tuple[Path, Path]:
    """The first (images, masks) folders that both exist under ``root``; DataError lists all that were looked for."""
    for images, masks in layouts:
        if (root / images).is_dir() and (root / masks).is_dir():
            return root / images, root / masks
    wanted = "; ".join(f"{images} + {masks}" for images, masks in layouts)
    present = ", ".join(sorted(path.name + "/" * path.is_dir() for path in root.iterdir())[:12]) or "nothing"
    raise DataError(f"{root}: not a {dataset} folder; looked for the image + mask folders {wanted}; found {present}")


def match_masks(images: dict[str, Path], masks: Path, suffix: str = "") -> list[tuple[Path, Path | None]]:
    """Pairs every image with the mask of its stem (+ ``suffix``). DataError names the first missing mask."""
    available = {path.stem: path for path in masks.iterdir() if path.suffix.lower() in MASK_SUFFIXES}
    missing = [stem for stem in images if stem + suffix not in available]
    if missing:
        raise missing_mask(images[missing[0]], masks / f"{missing[0]}{suffix}.png", len(missing), len(images))
    return [(path, available[stem + suffix]) for stem, path in images.items()]


def missing_mask(image: Path, mask: Path, missing: int, total: int) -> DataError:
    """The error for an image without a mask."""
    return DataError(f"{mask}: missing, the mask of {image}; {missing} of {total} images have no mask")


def need_folders(root: Path, dataset: str, names: Sequence[str]) -> None:
    """DataError that says which of the folders are not there, and what is."""
    absent = [name for name in names if not (root / name).is_dir()]
    if absent:
        present = ", ".join(sorted(path.name for path in root.iterdir())[:12]) or "nothing"
        raise DataError(f"{root}: not a {dataset} folder, {' and '.join(absent)} not found in it; found {present}")


def read_list(path: Path) -> list[str]:
    """The image stems of a list, one per line. DataError where it is missing or empty."""
    if not path.is_file():
        present = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise DataError(f"{path}: missing, the list of the split {path.stem!r}; lists found here: {present}")
    stems = path.read_text().split()
    if not stems:
        raise DataError(f"{path}: the list is empty; expected one image stem per line")
    return stems


def pair_listed(
    listed: Path | str, stems: Sequence[str], images: Path, masks: Sequence[Path], image_suffix: str = ".jpg"
) -> list[tuple[Path, Path | None]]:
    """Pairs the images of a list with their masks ``STEM.png``, in the first of the mask folders that has it.

    Args:
        listed: where the stems come from, for messages.
        stems: of the images.
        images, masks: folders; without mask folders every mask is None.

    Raises:
        DataError: an image or a mask is missing; the first by name, and how many.
    """
    found = [images / f"{stem}{image_suffix}" for stem in stems]
    lost = [image for image in found if not image.is_file()]
    if lost:
        raise DataError(f"{lost[0]}: missing, but listed in {listed}; {len(lost)} of {len(found)} images are missing")
    if not masks:
        return [(image, None) for image in found]
    candidates = [[folder / f"{stem}.png" for folder in masks] for stem in stems]
    chosen = [next((path for path in paths if path.is_file()), None) for paths in candidates]
    without = [position for position, mask in enumerate(chosen) if mask is None]
    if without:
        raise missing_mask(found[without[0]], candidates[without[0]][0], len(without), len(found))
    return list(zip(found, chosen, strict=True))
