"""How far a command is: a bar in a terminal, and in a log file now and then a line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Seconds between two lines of a log.
PAUSE = 15.0


def size(nbytes: float) -> str:
    """Bytes for people: 17.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


@contextmanager
def progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Count bytes up to `total` while the block runs; yields the function that advances."""
    if console.is_terminal and not console.is_dumb_terminal:
        with _bar(console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda nbytes: bar.advance(task, nbytes)
            # The total is what was to be expected.
            bar.update(task, total=bar.tasks[task].completed)
        return
    lines = Lines(console, label, total)
    yield lines.advance
    lines.end()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@dataclass
class Lines:
    """A plain line at most every `PAUSE` seconds, and one at the end."""

    console: Console
    label: str
    total: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    began: float = field(init=False)
    said: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.said = self.clock()

    def advance(self, nbytes: int) -> None:
        """Count bytes, and say so if nothing has been said for a while."""
        self.done += nbytes
        if self.clock() - self.said >= PAUSE:
            self.say()

    def say(self) -> None:
        """Print how far it is, and how fast."""
        self.said = self.clock()
        share = 100 * self.done // self.total if self.total else 100
        self._print(f"{size(self.done)} of {size(self.total)} ({share}%)")

    def end(self) -> None:
        """Print what was done, which may not be all that was expected, and how fast."""
        self.said = self.clock()
        self._print(f"{size(self.done)} in {self.said - self.began:.1f} s")

    def _print(self, what: str) -> None:
        speed = self.done / max(self.said - self.began, 1e-3)
        self.console.print(f"{self.label}: {what}, {size(speed)}/s", highlight=False)
