"""How a command talks while it works: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()


class Reporter(AbstractContextManager["Reporter"]):
    """A progress bar with free text on a terminal; otherwise at most one plain line per ``seconds``.

    Args:
        title: what is being done.
        total: number of steps.
        start: steps done by an earlier run.
        seconds: between plain lines.
    """

    def __init__(self, title: str, total: int, start: int = 0, seconds: float = 30.0) -> None:
        self.title, self.total, self.start, self.seconds = title, total, start, seconds
        self.began = self.printed = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                       TextColumn("{task.fields[text]}"))  # fmt: skip
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(title, total=total, completed=start, text="")

    def __enter__(self) -> Reporter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, text: str = "") -> None:
        """Shows that ``done`` of the steps are done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self.printed >= self.seconds or done == self.total:
            self.printed = now
            left = (now - self.began) / max(1, done - self.start) * (self.total - done)
            say(f"{self.title} {done}/{self.total}  {text}  left {clock(left)}")


class StopRequest(AbstractContextManager["StopRequest"]):
    """Turns the first SIGINT or SIGTERM into ``signum``, for the loop to look at; a second one acts at once as usual.

    Args:
        patient: a second one is ignored: torchrun, and what started it, may both send one, and torchrun kills who stays.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, patient: bool = False) -> None:
        self.after = signal.SIG_IGN if patient else signal.SIG_DFL
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signum = number
        for other in self.SIGNALS:
            signal.signal(other, self.after)


def say(text: str) -> None:
    """One line to the terminal or the log, at once."""
    if console.quiet:
        return
    if console.is_terminal:
        console.print(text, markup=False, highlight=False)
    else:
        print(text, flush=True)  # without the console's wrapping at 80 columns


def complain(text: str) -> None:
    """One line to the error stream."""
    print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """``h:mm:ss``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
