"""Trainings in one to four processes, forked from one that has imported everything: ``replicas.py FOLDER CASE...``.

Under torchrun (``replicas.py FOLDER``) one of the processes kills itself in the middle of its first try.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tiny import write_camvid

from segmodels import evaluate, train
from segmodels.engine.cli import run_command
from segmodels.engine.trainer import Trainer

SETTINGS = [
    "data.name=camvid", "data.crop=[33,33]", "data.scale=[0.75,1.25]", "model.name=deeplabv3_resnet18",
    "model.options.width_mult=0.125", "model.options.head_channels=8", "model.options.dropout=0", "train.iterations=4",
    "train.batch_size=8", "train.lr=0.05", "train.balance=0.3", "train.clip_norm=5", "run.log_every=1", "run.checkpoint_every=2",
    "run.tensorboard=false", "run.threads=1", "eval.sheet=0", "distributed.timeout=60",
]  # fmt: skip


def nothing(rank: int) -> None:
    pass


def at_iteration(number: int, act: Callable[[Trainer], None]) -> None:
    """Acts in the middle of a step."""
    step = Trainer._must_be_finite

    def acting(self: Trainer, what: str, *values: object) -> None:
        if self.iteration == number and what == "loss":
            act(self)
        step(self, what, *values)  # type: ignore[arg-type]

    Trainer._must_be_finite = acting  # type: ignore[method-assign, assignment]


def keep_half(rank: int) -> None:
    save = Trainer.save

    def saving(self: Trainer) -> None:
        save(self)
        if self.iteration == 2:
            shutil.copy(self.work_dir / "last.pt", self.work_dir / "half.pt")

    Trainer.save = saving  # type: ignore[method-assign]


def stall(rank: int) -> None:
    if rank == 1:
        at_iteration(1, lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def run(folder: Path, name: str, world: int, more: list[str], prepare: Callable[[int], None]) -> None:
    """Forks the processes of a training and waits for them; what they print is in ``NAME.RANK.txt``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        output = os.open(folder / f"{name}.{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if world > 1:
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            os.environ.update({key: str(value) for key, value in where.items()})
        code = 1
        try:
            prepare(rank)
            if name == "evaluate2":
                arguments = ["--checkpoint", str(folder / "sync1" / "last.pt"), "--output", str(folder / f"{name}.json")]
                code = run_command(evaluate.main, arguments)
            else:
                arguments = [*SETTINGS, f"data.root={folder / 'camvid'}", "--work-dir", str(folder / name), *more]
                code = run_command(train.main, arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    began, (_, status) = time.monotonic(), os.waitpid(children[0], 0)
    (folder / f"{name}.code").write_text(f"{os.waitstatus_to_exitcode(status)} {time.monotonic() - began}")
    for child in children[1:]:
        if prepare is stall:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


CASES: dict[str, tuple[int, list[str], Callable[[int], None]]] = {
    **{f"sync{world}": (world, ["distributed.sync_bn=true"], keep_half if world == 1 else nothing) for world in (1, 2, 4)},
    "halves1": (1, ["train.accumulate=2"], nothing),
    "quarters1": (1, ["train.accumulate=4"], nothing),
    "quarters2": (2, ["train.accumulate=2"], nothing),
    "pairs4": (4, ["distributed.sync_bn=true", "distributed.sync_bn_processes=2"], nothing),
    "fsdp2": (2, ["distributed.sync_bn=true", "distributed.mode=fsdp", "--resume"], nothing),
    "evaluate2": (2, [], nothing),
    "stall": (2, ["distributed.timeout=2"], stall),
}


def main() -> None:
    folder, *cases = sys.argv[1:]
    root = Path(folder)
    build = train.build_model
    train.build_model = lambda *arguments: build(*arguments).double()
    if not cases:
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            at_iteration(3, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        arguments = [*SETTINGS, f"data.root={root / 'camvid'}", "--work-dir", str(root / "elastic"), *CASES["sync2"][1]]
        sys.exit(run_command(train.main, arguments))
    write_camvid(root / "camvid", train=10, val=3)
    for name in cases:
        if name == "fsdp2":
            (root / name).mkdir()
            shutil.copy(root / "sync1" / "half.pt", root / name / "last.pt")
        run(root, name, *CASES[name])


if __name__ == "__main__":
    main()
