"""The streaming engine: read → GPU → kernel → host → digest and write, all at the same time.

Windows pass through a few slabs. Threads read the next ones while one is converted and the ones
before it are written; every copy and every call that waits lets other threads run. On a CPU the
same path runs in the host's slabs. Rejected: a queue between each two stages, which needs more
slabs for the same overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .backend import Copy, Make, on
from .cuts import Run
from .launch import bound_moves, reducer
from .limits import SLABS, threads
from .slabs import Slabs
from .timings import Timings
from .windows import Window

# Windows that are being read while another one is converted.
_AHEAD = SLABS - 1
# Between looks at what else might have gone wrong.
_GLANCE = 0.2
# Events that are kept before the GPU's times are read off.
_UNSETTLED = 64


@dataclass(frozen=True)
class Filled:
    """A converted window: call `ready` before its bytes on the host are read.

    `lost` is fp64 [cuts, 4] on the host, once it is ready: saturated, non-finite, and if they are
    measured signal and noise, by cut.
    """

    window: Window
    host: torch.Tensor
    ready: Callable[[], object]
    lost: torch.Tensor

    def bytes_of(self, run: Run, place: int) -> torch.Tensor:
        """A run's bytes, uint8."""
        return self.host[place : place + run.nbytes]


@dataclass
class _Twin:
    """A slab where windows are converted; `left` once its last window has been copied out."""

    memory: torch.Tensor
    left: torch.cuda.Event | None = None


class Sink(Protocol):
    """Where converted windows go."""

    def put(self, filled: Filled, done: Callable[[], None]) -> None:
        """Take a window's bytes; call `done` once they are not needed any more."""
        ...

    def check(self) -> None:
        """Raise what went wrong in the background, and report what was done."""
        ...


@dataclass
class Engine:
    """Carries windows of at most `size` bytes to a sink, through `count` slabs on the host.

    `make` makes moves on `device` ready; `measure` says if quantisation's errors are summed.
    """

    device: torch.device
    make: Make
    size: int
    count: int
    sink: Sink
    timings: Timings = field(default_factory=Timings)
    measure: bool = False

    def __post_init__(self) -> None:
        self.slabs = Slabs(self.count, self.size, self.device)
        self.readers = ThreadPoolExecutor(threads(), "read")
        self.twins = self._twins() if self.device.type == "cuda" else deque()
        self.streams = self._copy_streams() if self.device.type == "cuda" else []
        self._timed: deque[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def fill(self, windows: Iterable[Window]) -> None:
        """Carry every window to the sink; they may still be on their way when this returns.

        Raises:
            FuseportError: a source cannot be read, or the sink failed.
        """
        ahead: deque[tuple[Window, torch.Tensor, list[Future[int]]]] = deque()
        for window in windows:
            ahead.append(self._start(window))
            if len(ahead) == _AHEAD:
                self._convert(*ahead.popleft())
        while ahead:
            self._convert(*ahead.popleft())

    def close(self) -> None:
        """End the threads; what was not begun is left out."""
        self.readers.shutdown(cancel_futures=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._settle()
        self.slabs.release()

    def _twins(self) -> deque[_Twin]:
        """The GPU's own slabs, which windows take in turn."""
        memory = torch.empty(SLABS, self.size, dtype=torch.uint8, device=self.device)
        return deque(_Twin(part) for part in memory)

    def _copy_streams(self) -> list[torch.cuda.Stream]:
        """For the way in and the way out.

        The slabs' memory on the GPU may have been another tensor's a moment ago: what the caller's
        stream still does with that comes first.
        """
        streams = [torch.cuda.Stream(self.device) for _ in range(2)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        return streams

    def _start(self, window: Window) -> tuple[Window, torch.Tensor, list[Future[int]]]:
        slab = None
        while slab is None:
            self.sink.check()
            slab = self.slabs.take(_GLANCE)
        tasks = (task for load in window.loads.loads for task in load.tasks(slab))
        return window, slab, [self.readers.submit(self._read, task) for task in tasks]

    def _read(self, task: Callable[[], int]) -> int:
        with self.timings.busy("read"):
            nbytes = task()
        self.timings.add("read", 0.0, nbytes)
        return nbytes

    def _convert(self, window: Window, slab: torch.Tensor, reads: list[Future[int]]) -> None:
        for read in reads:
            read.result()
        twin = self._bring(slab, window.loads.nbytes) if self.streams else _Twin(slab)
        moves, owners = bound_moves(window, twin.memory, self.device)
        # Tables go to the GPU here, and do not wait for the window's own bytes.
        copy = self.make(moves)
        if self.streams:
            counts, ready = self._on_gpu(window, slab, twin, copy, owners)
        else:
            counts, ready = self._on_cpu(window, copy, owners), _nothing
        if window.measures:
            ready()
            self.slabs.give(slab)
            return
        filled = Filled(window, slab, ready, counts)
        self.sink.put(filled, lambda: self.slabs.give(slab))

    def _launch(self, window: Window, copy: Copy, owners: torch.Tensor) -> torch.Tensor:
        """Run the moves; what was lost, by cut."""
        power = torch.zeros(len(owners), 2, dtype=torch.float64, device=self.device)
        counts = copy.run(
            count=True, power=power if self.measure else None,
            reduce=reducer(window, self.device),
        )  # fmt: skip
        assert counts is not None
        own = torch.cat([counts.to(power), power], 1)
        total = torch.zeros(len(window.cuts), 4, dtype=power.dtype, device=self.device)
        return total.index_add_(0, owners.to(self.device, non_blocking=True), own)

    def _on_cpu(self, window: Window, copy: Copy, owners: torch.Tensor) -> torch.Tensor:
        with self.timings.busy("kernel", window.nbytes):
            return self._launch(window, copy, owners)

    def _bring(self, slab: torch.Tensor, nbytes: int) -> _Twin:
        """Start a window's copy to a twin on the GPU, once that one's last window has left it."""
        twin, (inward, _) = self.twins.popleft(), self.streams
        self.twins.append(twin)
        if twin.left is not None:
            inward.wait_event(twin.left)
        with self._timed_on(inward, "to GPU", nbytes):
            twin.memory[:nbytes].copy_(slab[:nbytes], non_blocking=True)
        return twin

    def _on_gpu(
        self, window: Window, slab: torch.Tensor, twin: _Twin, copy: Copy, owners: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[], object]]:
        """The launches, and one copy out; nothing waits for the GPU here."""
        current, (inward, outward) = torch.cuda.current_stream(self.device), self.streams
        split, end = window.loads.nbytes, window.nbytes
        current.wait_stream(inward)
        with self._timed_on(current, "kernel", end):
            counts = self._launch(window, copy, owners)
        outward.wait_stream(current)
        with self._timed_on(outward, "from GPU", end - split):
            slab[split:end].copy_(twin.memory[split:end], non_blocking=True)
            host = counts.to("cpu", non_blocking=True)
        counts.record_stream(outward)
        # A thread of the sink waits for it, and must not take a processor up meanwhile.
        landed = torch.cuda.Event(blocking=True)
        landed.record(outward)
        twin.left = landed

        def ready() -> None:
            with on(self.device):
                landed.synchronize()

        return host, ready

    @contextmanager
    def _timed_on(self, stream: torch.cuda.Stream, stage: str, nbytes: int) -> Iterator[None]:
        """Run the block on a stream, and let the GPU take its time."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begin.record(stream)
            yield
            end.record(stream)
        self._timed.append((stage, nbytes, begin, end))
        while len(self._timed) > _UNSETTLED and self._timed[0][3].query():
            self._settle(1)

    def _settle(self, most: int | None = None) -> None:
        """Add what the GPU's clock measured to the timings."""
        for _ in range(len(self._timed) if most is None else most):
            stage, nbytes, begin, end = self._timed.popleft()
            self.timings.add(stage, begin.elapsed_time(end) / 1000, nbytes)


def _nothing() -> None:
    """A CPU's results are ready at once."""
