"""Any folder of images with a folder of masks beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segmodels.data.dataset import PairedFiles, voc_colormap
from segmodels.data.files import (
    IMAGE_SUFFIXES,
    DataError,
    find_root,
    first_layout,
    list_by_stem,
    match_masks,
)


class Folder(PairedFiles):
    """Images and masks of class ids, matched by stem. The first of these that exists is taken:

    1. ``<root>/<split>/images`` + ``<root>/<split>/masks``
    2. ``<root>/images/<split>`` + ``<root>/masks/<split>``
    3. ``<root>/images`` + ``<root>/masks``, restricted to the stems in ``<root>/<split>.txt`` (``split="all"``: no list,
       all files)

    Args:
        root: the folder.
        split: any word; it names a folder or a list.
        images, masks: other names for the two folders.
        mask_suffix: what a mask's stem has behind the image's, for example ``"_mask"``.
        classes: class names, in the order of their ids; without it they are the lines of ``<root>/classes.txt``.
        void_ids: ids in the masks to ignore, besides 255.

    Raises:
        DataError: the layout, the class names, a listed image or a mask is missing.
    """

    TITLE = "any folder of images with a folder of masks"

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        images: str = "images",
        masks: str = "masks",
        mask_suffix: str = "",
        classes: Sequence[str] | None = None,
        void_ids: Sequence[int] = (),
    ):
        folder = find_root(root, "folder", f"{images} and {masks}, or {split}/{images} and {split}/{masks}")
        image_folder, mask_folder = first_layout(
            folder,
            "folder",
            [(f"{split}/{images}", f"{split}/{masks}"), (f"{images}/{split}", f"{masks}/{split}"), (images, masks)],
        )
        found = list_by_stem(image_folder, IMAGE_SUFFIXES, "images")
        if image_folder == folder / images and split != "all":
            found = _restrict(found, folder / f"{split}.txt", image_folder)
        names = _class_names(folder) if classes is None else list(classes)
        if not names or len(names) > 255 or len(set(names)) != len(names):
            raise DataError(f"{folder}: the class names are {names}; expected 1 to 255 different names")
        pairs = match_masks(found, mask_folder, mask_suffix)
        super().__init__(pairs, names, voc_colormap(len(names)), split, folder, void_ids=void_ids)


def _restrict(found: dict[str, Path], list_file: Path, image_folder: Path) -> dict[str, Path]:
    if not list_file.is_file():
        raise DataError(
            f"{list_file}: missing; {image_folder} is not divided into splits, so expected a list of image stems here "
            '(or split="all" for every image)'
        )
    stems = [line.strip() for line in list_file.read_text().splitlines() if line.strip()]
    lost = [stem for stem in stems if stem not in found]
    if lost or not stems:
        problem = f"{len(lost)} of {len(stems)} stems not in {image_folder}, first {lost[0]!r}" if lost else "empty list"
        raise DataError(f"{list_file}: {problem}; expected one image stem per line, without suffix")
    return {stem: found[stem] for stem in stems}


def _class_names(folder: Path) -> list[str]:
    path = folder / "classes.txt"
    if not path.is_file():
        raise DataError(f"{path}: missing; expected one class name per line, or the option classes=[...]")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
