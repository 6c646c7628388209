"""A checkpoint file is the old one or the new one, whatever goes wrong while it is written."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from segmodels.engine.checkpoints import (
    CheckpointError,
    atomic_write,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    write_json,
)


@pytest.fixture
def good(tmp_path) -> Path:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"iteration": 3, "model": {"weight": torch.arange(5.0)}})
    return path


def assert_untouched(path: Path) -> None:
    state = load_checkpoint(path)
    assert state["iteration"] == 3
    assert torch.equal(state["model"]["weight"], torch.arange(5.0))
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file is left"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_while_saving_keeps_the_last_good_file(good, monkeypatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match=r"last\.pt: No space left on device; the previous one is untouched"):
        save_checkpoint(good, {"iteration": 4})
    assert_untouched(good)


def test_the_system_refuses_more_bytes_in_the_middle_of_the_file(good) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(CheckpointError, match="File too large"):
            save_checkpoint(good, {"iteration": 4, "model": {"weight": torch.zeros(50_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert_untouched(good)


def test_leftover_of_a_killed_save_is_replaced(good) -> None:
    good.with_name(f".{good.name}.tmp").write_bytes(b"half a checkpoint")
    assert load_checkpoint(good)["iteration"] == 3
    save_checkpoint(good, {"iteration": 4})
    assert load_checkpoint(good)["iteration"] == 4
    assert len(list(good.parent.iterdir())) == 1


def test_unreadable_files_are_named(good, tmp_path) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read"):
        load_checkpoint(good)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"state_dict": {}}, good)
    with pytest.raises(CheckpointError, match="holds format None: expected format 1"):
        load_checkpoint(good)

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"format": 1, "model": Payload()}, good)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(good)
    assert not (tmp_path / "executed").exists(), "code in a checkpoint is never run"


def test_generators_continue_after_a_round_trip_through_a_file(tmp_path) -> None:
    for _ in range(3):
        random.gauss(0, 1), np.random.standard_normal(), torch.rand(1)
    save_checkpoint(tmp_path / "x.pt", {"rng": rng_state()})
    expected = random.gauss(0, 1), np.random.standard_normal(), torch.rand(1)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    set_rng_state(load_checkpoint(tmp_path / "x.pt")["rng"])
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.rand(1)) == expected


def test_json_has_no_nan(tmp_path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    atomic_write(path, b"x")
    assert path.read_bytes() == b"x"
