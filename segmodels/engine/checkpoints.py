"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used here; the message names the file and the reason."""


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces ``path`` by a file with this content: a temporary file beside it, fsync, rename, fsync of the folder.

    Whatever fails on the way (a full disk, a kill), ``path`` keeps its old content.

    Raises:
        OSError: the temporary file could not be written; it is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name per target: a leftover of a kill is overwritten, not piled up
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems cannot open folders; the rename itself has happened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """``content`` as indented JSON, atomically. Raises ValueError for nan and infinity, which JSON does not have."""
    atomic_write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists, dictionaries) atomically.

    Raises:
        CheckpointError: it could not be written; the file that was there before is untouched.
    """
    # Into memory first: the framework's writer on a full disk raises errors that do not say so.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    try:
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        kept = "the previous one is untouched" if Path(path).exists() else "there was none before"
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror or error}; {kept}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`save_checkpoint` wrote, on the CPU. No code of the file is run (``weights_only=True``).

    Raises:
        CheckpointError: missing, truncated, not tensors and plain values, or of another format.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = f"format {state.get('format')!r}" if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"checkpoint {path} holds {found}: expected format {FORMAT} of segmodels.train")
    return state


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether the file was written by :func:`save_checkpoint`. Raises CheckpointError where there is none."""
    try:
        load_checkpoint(path)
    except CheckpointError:
        if not Path(path).is_file():
            raise
        return False
    return True


def rng_state() -> dict[str, Any]:
    """The states of all global generators, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the generators where :func:`rng_state` saw them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
