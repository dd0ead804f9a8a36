"""Work for threads, in lanes: of one lane only so much runs at a time, and in its order."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

Task = Callable[[], object]


class Lanes:
    """`threads` threads; of each lane at most `width` tasks run at the same time.

    Lanes take turns. Rejected: one pool for all, whose threads would wait for one file's lock
    together while nobody writes the others.
    """

    def __init__(self, threads: int, width: int, name: str) -> None:
        self.width = width
        self._pool = ThreadPoolExecutor(threads, name)
        self._lock = threading.Lock()
        self._running: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[Task]] = {}

    def submit(self, lane: Hashable, task: Task) -> None:
        """Run a task that raises nothing, after those that the lane was given before."""
        with self._lock:
            if self._running[lane] == self.width:
                self._waiting.setdefault(lane, deque()).append(task)
                return
            self._running[lane] += 1
            self._pool.submit(self._run, lane, task)

    def _run(self, lane: Hashable, task: Task) -> None:
        task()
        with self._lock:
            if waiting := self._waiting.get(lane):
                # At the end of the pool's queue, so that the other lanes have their turn.
                self._pool.submit(self._run, lane, waiting.popleft())
                return
            self._waiting.pop(lane, None)
            self._running[lane] -= 1
            if not self._running[lane]:
                del self._running[lane]

    def close(self) -> None:
        """End the threads; what was not begun is left out."""
        with self._lock:
            self._waiting.clear()
        self._pool.shutdown(cancel_futures=True)
