"""Training sets as tar files of a thousand images or so, in the layout of WebDataset: ``NAME.jpg`` beside ``NAME.seg.png``.

The tar files are not compressed, so an item is read where it lies and the data set is map-style like the others: workers and
ranks read their own items alone, and a run resumes to the same bits. What differs is the order: :class:`ShardSampler` goes
through shard after shard, so that reading stays local on file systems that are slow at random places.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segmodels.data.dataset import PairedFiles, SegmentationDataset, voc_colormap
from segmodels.data.files import DataError, decode_image, decode_mask, find_root
from segmodels.data.loader import ResumableSampler
from segmodels.data.prepare import Progress, encode_label, must_be_complete, write_file

IMAGES = ("jpg", "jpeg", "png")
LABELS = ("seg.png", "mask.png", "label.png", "png")


class Shards(SegmentationDataset):
    """``<root>/<split>-*.tar`` with ``<root>/<split>.json``, as ``python -m segmodels.data shard`` writes them; or tar files of
    others, without the JSON. Labels are class ids, 255 is void.

    Args:
        root: the folder of the tar files.
        split: the word their names begin with.
        classes: class names where there is no JSON; else they are the lines of ``<root>/classes.txt``.
        shuffle_buffer: items among which training shuffles; the order of the shards is drawn as well.

    Raises:
        DataError: no tar files, one is half-written, cut or of another size than the JSON says, or the class names are missing.
    """

    TITLE = "tar files in the layout of WebDataset"
    CACHEABLE = False

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        classes: Sequence[str] | None = None,
        shuffle_buffer: int = 2000,
    ):
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; expected 1 or more")
        folder = find_root(root, "shards", f"{split}-*.tar")
        index = folder / f"{split}.json"
        self._items: dict[int, list[tuple[str, Item, Item]]] = {}
        if index.is_file():
            meta = _read_index(index)
            names, colors = meta["classes"], np.array(meta["colors"], np.uint8)
            self.paths = [folder / shard["file"] for shard in meta["shards"]]
            for path, shard in zip(self.paths, meta["shards"], strict=True):
                _check_size(path, shard["bytes"], index)
            counts = [shard["items"] for shard in meta["shards"]]
        else:
            self.paths = sorted(folder.glob(f"{split}-*.tar"))
            if not self.paths:
                raise DataError(f"{folder}: neither {split}.json nor {split}-*.tar here; expected the output of shard")
            names = list(classes) if classes is not None else _class_names(folder)
            colors = voc_colormap(len(names))
            self._items = {k: scan(path) for k, path in enumerate(self.paths)}
            counts = [len(items) for items in self._items.values()]
        self.root, self.shuffle_buffer = folder, shuffle_buffer
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self._files: dict[int, int] = {}
        super().__init__(names, colors, split, int(self.starts[-1]))

    def name(self, index: int) -> str:
        return self._find(self._check(index))[1][0]

    def load_image(self, index: int) -> np.ndarray:
        shard, (name, image, _) = self._find(self._check(index))
        return decode_image(self._read(shard, image), f"{self.paths[shard]}:{name}")

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As the base class. Raises DataError, with shard and item, for damaged bytes, other sizes and other labels."""
        shard, (name, _, place) = self._find(index)
        image, where = self.load_image(index), f"{self.paths[shard]}:{name}"
        label = decode_mask(self._read(shard, place), where)
        if image.shape[:2] != label.shape:
            raise DataError(f"{where}: the image is {image.shape[:2]} and the label {label.shape}; expected equal sizes")
        highest = int(label[label != self.ignore_index].max(initial=0))
        if highest >= self.num_classes:
            raise DataError(f"{where}: label {highest}; expected 0..{self.num_classes - 1} or void (255)")
        return image, label

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a spawned worker opens its own

    def _find(self, index: int) -> tuple[int, tuple[str, Item, Item]]:
        shard = int(np.searchsorted(self.starts, index, "right")) - 1
        if shard not in self._items:
            items = scan(self.paths[shard])
            expected = self.starts[shard + 1] - self.starts[shard]
            if len(items) != expected:
                raise DataError(f"{self.paths[shard]}: {len(items)} items, but {self.split}.json says {expected}")
            self._items[shard] = items
        return shard, self._items[shard][index - int(self.starts[shard])]

    def _read(self, shard: int, place: Item) -> bytes:
        if shard not in self._files:
            if len(self._files) >= 64:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], place[1], place[0])  # no position: forked workers share the descriptor
        if len(data) != place[1]:
            raise DataError(f"{self.paths[shard]}: ends within an item; the shard was cut since it was opened")
        return data

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, shards={len(self.paths)}, root={str(self.root)!r})"


Item = tuple[int, int]  # where a file lies in its tar: offset and size in bytes


def scan(path: Path) -> list[tuple[str, Item, Item]]:
    """The items of a tar file: name, place of the image, place of the label.

    Raises:
        DataError: unreadable, compressed, without its end (half-written), an item without image or label.
    """
    found: dict[str, dict[str, Item]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    name, _, suffix = Path(member.name).name.partition(".")
                    key = str(Path(member.name).with_name(name))
                    found.setdefault(key, {})[suffix.lower()] = member.offset_data, member.size
            must_be_complete(tar)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path}: a half-written or damaged shard, {len(found)} items before the damage ({error}); expected an uncompressed "
            "tar file with its end"
        ) from error
    items = []
    for key, files in found.items():
        image = next((suffix for suffix in IMAGES if suffix in files), None)
        label = next((suffix for suffix in LABELS if suffix in files and suffix != image), None)
        if image is None or label is None:
            raise DataError(f"{path}: item {key!r} has {', '.join(files)}; expected an image and a label such as jpg and seg.png")
        items.append((key, files[image], files[label]))
    return items


class ShardSampler(ResumableSampler):
    """Each epoch draws an order of the shards, and shuffles within windows of ``shuffle_buffer`` items of that sequence. It is
    one order for all workers and ranks.

    Args:
        dataset: its shards and its ``shuffle_buffer``.
        seed, batch_size, drop_last: as in the base class.
    """

    def __init__(self, dataset: Shards, seed: int = 0, batch_size: int = 1, drop_last: bool = True):
        super().__init__(len(dataset), seed, True, batch_size, drop_last)
        self.starts, self.buffer = dataset.starts, dataset.shuffle_buffer

    def order(self, epoch: int) -> np.ndarray:
        # The last number keeps this stream apart from those of the other samplers and of the augmentation.
        rng = np.random.default_rng([self.seed, epoch, self.length, 4])
        shards = rng.permutation(len(self.starts) - 1)
        sequence = np.concatenate([np.arange(self.starts[k], self.starts[k + 1]) for k in shards])
        for start in range(0, self.length, self.buffer):
            rng.shuffle(sequence[start : start + self.buffer])
        return sequence[: self.epoch_size]

    def _order_settings(self) -> dict[str, Any]:
        return {**super()._order_settings(), "shards": self.starts.tolist(), "shuffle_buffer": self.buffer}


def write_shards(dataset: SegmentationDataset, out: Path, items_per_shard: int, progress: Progress) -> list[Path]:
    """Packs a data set: ``<out>/<split>-000000.tar`` and on, then ``<split>.json``. Equal data give equal bytes.

    Images that are JPEG or PNG files are copied, not encoded again. A shard appears under its name when it is whole; shards that
    are there are left alone, so an interrupted call continues.

    Raises:
        DataError: two items of one name, a shard that holds other items, or what ``dataset`` raises.
    """
    if items_per_shard < 1:
        raise ValueError(f"items per shard is {items_per_shard}; expected 1 or more")
    out.mkdir(parents=True, exist_ok=True)
    keys = [dataset.name(index).replace(".", "_") for index in range(len(dataset))]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{dataset!r}: two items are named {twice!r}; expected different names")
    paths, described = [], []
    for start in range(0, len(dataset), items_per_shard):
        path = out / f"{dataset.split}-{start // items_per_shard:06d}.tar"
        mine = range(start, min(start + items_per_shard, len(dataset)))
        if not path.is_file():
            _write_shard(dataset, mine, keys, path, lambda done: progress("packing", done, len(dataset)))
        elif [key for key, _, _ in scan(path)] != [keys[index] for index in mine]:
            raise DataError(f"{path}: holds other items than this data set; expected an empty folder or the same call")
        paths.append(path)
        described.append({"file": path.name, "items": len(mine), "bytes": path.stat().st_size})
    index = {"classes": dataset.classes, "colors": dataset.colors.tolist(), "shards": described}
    write_file(out / f"{dataset.split}.json", json.dumps(index, indent=1).encode())
    return paths


def _write_shard(dataset: SegmentationDataset, items: range, keys: list[str], path: Path, progress: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with tarfile.open(partial, "w") as tar:
            for index in items:
                progress(index)
                image, label = dataset[index]
                for suffix, data in (_image_bytes(dataset, index, image), ("seg.png", encode_label(label))):
                    _add(tar, f"{keys[index]}.{suffix}", data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _image_bytes(dataset: SegmentationDataset, index: int, image: np.ndarray) -> tuple[str, bytes]:
    if isinstance(dataset, PairedFiles) and type(dataset).load_image is PairedFiles.load_image:
        path = dataset.pairs[index][0]
        if path.suffix.lower()[1:] in IMAGES:
            return path.suffix.lower()[1:], path.read_bytes()
    return "png", cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def _read_index(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        for shard in meta["shards"]:
            shard["file"], shard["items"], shard["bytes"]
        meta["classes"], meta["colors"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an index of shards ({error!r}); expected what shard writes") from error
    return meta


def _check_size(path: Path, expected: int, index: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing, but listed in {index}")
    if path.stat().st_size != expected:
        raise DataError(f"{path}: {path.stat().st_size} bytes, but {index} says {expected}; a half-written or cut shard")


def _class_names(folder: Path) -> list[str]:
    path = folder / "classes.txt"
    if not path.is_file():
        raise DataError(
            f"{path}: missing; tar files without JSON need one class name per line there, or the option classes=[...]"
        )
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
