"""How long each stage of a conversion was busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .timeline import Timeline

# The stages in the order of the bytes' way.
STAGES = ("check", "read", "to GPU", "kernel", "from GPU", "digest", "write", "fsync")


@dataclass
class Stage:
    """Seconds, summed over threads, and bytes."""

    seconds: float = 0.0
    nbytes: int = 0


@dataclass
class Timings:
    """Busy times by stage; stages overlap, so their sum exceeds the run's time."""

    stages: dict[str, Stage] = field(default_factory=lambda: {name: Stage() for name in STAGES})
    started: float = field(default_factory=time.perf_counter)
    timeline: Timeline = field(default_factory=Timeline)
    stopped: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def elapsed(self) -> float:
        """Seconds since the start, until it was stopped."""
        return (self.stopped or time.perf_counter()) - self.started

    def stop(self) -> None:
        """The run is over."""
        self.stopped = time.perf_counter()

    def add(self, stage: str, seconds: float, nbytes: int) -> None:
        """Count a piece of work that ends now."""
        now = self.elapsed
        with self._lock:
            self.timeline.add(stage, max(0.0, now - seconds), now)
            self.stages[stage].seconds += seconds
            self.stages[stage].nbytes += nbytes

    @contextmanager
    def busy(self, stage: str, nbytes: int = 0) -> Iterator[None]:
        """Count the time that the block takes."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begin, nbytes)
