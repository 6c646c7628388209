"""What the conversions of official archives share: unpacking, reading MATLAB files, writing that leaves no half file.

Everything is written under a temporary name and renamed, and what is there already is left alone: an interrupted conversion
continues where it stopped.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segmodels.data.dataset import voc_colormap
from segmodels.data.files import DataError

Progress = Callable[[str, int, int | None], None]  # what, done, total where known

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError)


def write_file(path: Path, data: bytes) -> None:
    """Writes under a temporary name in the same folder and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_list(path: Path, stems: Iterable[str]) -> None:
    """One stem per line."""
    write_file(path, "".join(f"{stem}\n" for stem in stems).encode())


def write_label(path: Path, label: np.ndarray) -> None:
    """A label map uint8 ``[H, W]`` as :func:`encode_label` says."""
    write_file(path, encode_label(label))


def encode_label(label: np.ndarray) -> bytes:
    """A palette PNG with the colours of VOC: viewers show classes, readers get the indices."""
    picture = Image.fromarray(label)
    picture.putpalette(voc_colormap(256).ravel().tolist())
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def convert(what: str, jobs: list[tuple[Path, Path]], read: Callable[[Path], np.ndarray], progress: Progress) -> int:
    """Writes ``read(source)`` as the label file ``target`` for each (source, target) whose target is not there yet.

    Returns:
        How many were written.
    """
    missing = [job for job in jobs if not job[1].is_file()]
    for done, (source, target) in enumerate(missing):
        progress(what, done, len(missing))
        write_label(target, read(source))
    return len(missing)


def read_mat(path: Path, key: str) -> Any:
    """A variable of a MATLAB file up to version 7.2. Raises DataError for damage, ModuleNotFoundError without SciPy."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: reading MATLAB files needs SciPy: pip install 'atrous-kernels[data]'") from error
    try:
        content = loadmat(path, variable_names=[key])
    except Exception as error:  # SciPy raises whatever the damaged bytes lead it into
        raise DataError(f"{path}: not readable as a MATLAB file ({error}); an interrupted download?") from error
    if key not in content:
        raise DataError(f"{path}: no variable {key!r} in it; expected the publisher's file")
    return content[key]


def label_of(values: Any, path: Path, highest: int) -> np.ndarray:
    """Checks an array to be a label map with values 0 to ``highest``; uint8 ``[H, W]``."""
    label = np.asarray(values)
    if label.ndim != 2 or label.size == 0 or label.dtype.kind not in "uif":
        raise DataError(f"{path}: the labels are {label.dtype} of shape {label.shape}; expected a map of class ids")
    if label.min() < 0 or label.max() > highest:
        raise DataError(f"{path}: labels {label.min()} to {label.max()}; expected 0 to {highest}")
    return label.astype(np.uint8)


def unpack(source: Path, root: Path, members: str, dataset: str, progress: Progress) -> int:
    """Puts the files of an official archive (tar, zip, or an unpacked folder) where the data set wants them.

    Args:
        source: archive or folder.
        root: of the data set.
        members: a regular expression found in member names; its first group is the place below ``root``.
        dataset: its name, for messages.
        progress: told after every file.

    Returns:
        How many files were written; those that are there in the right size are left alone.

    Raises:
        DataError: no archive, damaged or cut off (the files before the damage are kept), or of something else.
    """
    pattern = re.compile(rf"(?:^|/)({members})$")
    written = wanted = 0
    first = ""
    try:
        for name, size, read in _files(source):
            first = first or name
            found = pattern.search(name)
            if not found or ".." in Path(found[1]).parts:
                continue
            wanted += 1
            target = root / found[1]
            if not (target.is_file() and target.stat().st_size == size):
                write_file(target, read())
                written += 1
            progress(f"unpacking {source.name}", wanted, None)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk or missing rights, not the archive
        raise DataError(
            f"{source}: damaged or cut off after {wanted} files of the data set ({error or type(error).__name__}); an "
            "interrupted download? Fetch it again and repeat: what is unpacked is kept"
        ) from error
    if not wanted:
        raise DataError(
            f"{source}: not an archive of the data set {dataset!r}; expected files {members}, found {first or 'none'}"
        )
    return written


def _files(source: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Name, size and reader of each file of an archive or folder."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield path.relative_to(source).as_posix(), path.stat().st_size, path.read_bytes
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, entry.file_size, lambda entry=entry: archive.read(entry)  # type: ignore[misc]
    elif not source.is_file():
        raise DataError(f"{source}: does not exist; expected an archive or folder")
    elif source.suffix.lower() == ".zip":
        raise zipfile.BadZipFile("no directory of files at the end")
    else:
        with tarfile.open(source) as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, member.size, lambda member=member: tar.extractfile(member).read()  # type: ignore
            must_be_complete(tar)


def must_be_complete(tar: tarfile.TarFile) -> None:
    """Raises ReadError where a tar file that was read to its end lacks the end-of-archive mark: tarfile takes such an end for
    the end of the archive."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):
        raise tarfile.ReadError("no end-of-archive mark")
