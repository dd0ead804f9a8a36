"""Results in one block of host memory, filled through two small windows on the GPU.

Allocating host memory is what a naive export waits for: one pinned buffer for each tensor costs
seconds. Here all tensors of a converter share one block. The first time it is ordinary memory, and
a ring of a few pinned buffers feeds it; once it has been touched it is cheap to register with the
driver, so the next conversion copies straight into it at the speed of the bus.

The GPU needs two windows and no more, whatever the size of the model: moves are cut along their
first axis where they are larger than a window.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Event

import torch

from fuseport.kernels.move import Move

from .backend import Copy, Make
from .plan import Planned, bind

ALIGNMENT = 256
WINDOW = 96 << 20
# First-touched memory comes at 1 to 2 GB/s a thread, so many threads share the copying.
THREADS = min(16, os.cpu_count() or 1)
RING, CHUNK = 2 * THREADS, 4 << 20
# What a thread populates at once; whoever maps memory waits as long.
POPULATED = 16 << 20
# Linux 5.14's advice to hand out pages now, as if each were written; mmap does not name it.
MADV_POPULATE_WRITE = 23


@dataclass(frozen=True)
class Span:
    """A move into bytes [start, start + nbytes) of the block; its `dst` is a meta view."""

    start: int
    move: Move

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.start + self.move.dst.nbytes


def spans(plan: Sequence[Planned], places: Sequence[int], limit: int) -> Iterator[Span]:
    """The plan's moves at their places in the block, none of more than `limit` bytes.

    Every move fills a contiguous run of its tensor, since layouts concatenate along axis 0.
    """
    for planned, place in zip(plan, places, strict=True):
        for move in planned.moves:
            if move.dst.numel():
                start = place + int(move.dst.storage_offset()) * move.dst.element_size()
                yield from _cut(Span(start, move), limit)


def _cut(span: Span, limit: int) -> Iterator[Span]:
    move = span.move
    rows = move.dst.shape[0] if move.dst.ndim else 1
    if move.dst.nbytes <= limit or rows == 1:
        yield span
        return
    row = move.dst.nbytes // rows
    step = max(1, limit // row)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        dst, src = move.dst.narrow(0, first, count), move.src.narrow(0, first, count)
        yield Span(span.start + first * row, Move(dst, src, move.shift, move.quant))


def windows(all_spans: Iterable[Span], limit: int) -> Iterator[list[Span]]:
    """Consecutive spans that lie within `limit` bytes of the block together."""
    window: list[Span] = []
    for span in all_spans:
        if window and span.stop - window[0].start > limit:
            yield window
            window = []
        window.append(span)
    if window:
        yield window


def places_of(plan: Sequence[Planned]) -> tuple[list[int], int]:
    """Where each tensor begins in the block, and the block's size, in bytes."""
    places, end = [], 0
    for planned in plan:
        places.append(end)
        end += -(-planned.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


class Block:
    """Host memory that is used again; registered with the driver once it has been touched.

    New memory is populated by threads in the background, from its beginning on.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.registered = False
        self._populating: ThreadPoolExecutor | None = None

    def reserve(self, size: int) -> torch.Tensor:
        """At least `size` bytes: the old ones where they suffice."""
        if self.memory.numel() < size:
            self.release()
            self.memory = _untouched(size)
            self._populating = _populate(self.memory)
        return self.memory

    def register(self) -> None:
        """Let the GPU copy straight into it; without that it is as right, and slower."""
        if not self.registered:
            register = torch.cuda.cudart().cudaHostRegister
            self.registered = int(register(self.memory.data_ptr(), self.memory.numel(), 0)) == 0
        if not self.registered:
            # The refusal is still pending, and would be the next launch's error.
            with suppress(RuntimeError):
                torch.zeros(1, dtype=torch.uint8, device="cuda")

    def release(self) -> None:
        """Take it back from the driver, and populate no more of it."""
        if self._populating is not None:
            self._populating.shutdown(wait=False, cancel_futures=True)
            self._populating = None
        if self.registered:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
            self.registered = False

    def __del__(self) -> None:
        self.release()


def _untouched(size: int) -> torch.Tensor:
    """Memory that the system hands out in huge pages, where it has them, as it is first written."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _populate(memory: torch.Tensor) -> ThreadPoolExecutor:
    """Start to populate it; nobody has to wait for the threads."""
    pool, start = ThreadPoolExecutor(THREADS), Event()
    for part in memory.split(POPULATED):
        pool.submit(_hand_out, part, start)
    # Not before: a new thread's stack is mapped memory too.
    start.set()
    # Its threads end with the work.
    pool.shutdown(wait=False)
    return pool


def _hand_out(part: torch.Tensor, start: Event) -> None:
    """`part` keeps the mapping alive. An older kernel refuses: pages come as they are written."""
    start.wait()
    _madvise(part.data_ptr(), part.numel(), MADV_POPULATE_WRITE)


def _madvise(address: int, size: int, advice: int) -> int:
    """The C library's, for mmap's own does not let other threads run meanwhile."""
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return int(call(address, size, advice))


@dataclass(frozen=True)
class _Window:
    """Moves into a window on the GPU, and the copy that brings it to the host."""

    moves: Copy
    source: torch.Tensor
    target: torch.Tensor


class HostOutput:
    """A plan whose `dst`s are meta tensors, prepared to be run into a block of host memory.

    `run` may be called again while the sources stay where they are. Results of an earlier run
    lie in the same memory and are overwritten.

    Args:
        plan: what to fill.
        make: makes a batch of moves ready to run.
        device: where the sources are.
        block: the memory; another plan's before.
    """

    def __init__(
        self, plan: Sequence[Planned], make: Make, device: torch.device, block: Block
    ) -> None:
        places, size = places_of(plan)
        self.device, self.block = device, block
        memory = block.reserve(size)
        self.results = [
            memory[place : place + one.nbytes].view(one.dst.dtype).view(one.dst.shape)
            for one, place in zip(plan, places, strict=True)
        ]
        every = list(spans(plan, places, WINDOW))
        if device.type != "cuda":
            self._direct = make([_onto(memory, 0, span) for span in every])
            return
        self._touched = False
        self._windows = list(self._prepared(every, memory, make))

    def _prepared(self, every: list[Span], memory: torch.Tensor, make: Make) -> Iterator[_Window]:
        largest = max((span.stop - span.start for span in every), default=0)
        size = max(WINDOW, largest) + ALIGNMENT
        staging = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        for index, window in enumerate(windows(every, WINDOW)):
            first, last = window[0].start, window[-1].stop
            base, stage = first - first % ALIGNMENT, staging[index % 2]
            moves = make([_onto(stage, base, span) for span in window])
            yield _Window(moves, stage[first - base : last - base], memory[first:last])

    def run(self) -> list[torch.Tensor]:
        """Fill every tensor; they can be read when this returns."""
        if self.device.type != "cuda":
            self._direct.run()
            return self.results
        if self._touched:
            self.block.register()
        copies = torch.cuda.Stream(self.device)
        ring = None if self.block.registered else _Ring(copies)
        self._through_windows(copies, ring)
        copies.synchronize()
        if ring is not None:
            ring.finish()
        self._touched = True
        return self.results

    def _through_windows(self, copies: torch.cuda.Stream, ring: _Ring | None) -> None:
        """Kernel into one window while the other one is copied to the host."""
        current = torch.cuda.current_stream(self.device)
        copied: list[torch.cuda.Event] = []
        for index, window in enumerate(self._windows):
            if index >= 2:
                current.wait_event(copied[index - 2])
            window.moves.run()
            copies.wait_stream(current)
            if ring is None:
                with torch.cuda.stream(copies):
                    window.target.copy_(window.source, non_blocking=True)
            else:
                ring.copy(window.target, window.source)
            copied.append(copies.record_event())


def _onto(memory: torch.Tensor, base: int, span: Span) -> Move:
    """The span's move with its destination in `memory`, whose first byte is `base` of the block."""
    begin = span.start - base
    move = span.move
    flat = memory[begin : begin + move.dst.nbytes].view(move.dst.dtype)
    return Move(
        bind(move.dst, flat, int(move.dst.storage_offset())), move.src, move.shift, move.quant
    )


class _Ring:
    """Pinned buffers between the GPU and memory that the driver does not know."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream, self.pool, self.next = stream, ThreadPoolExecutor(THREADS), 0
        self.buffers = torch.empty(RING, CHUNK, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.busy: list[Future[None] | None] = [None] * RING

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        for start in range(0, source.numel(), CHUNK):
            part = source[start : start + CHUNK]
            slot = self.next = (self.next + 1) % RING
            if (previous := self.busy[slot]) is not None:
                previous.result()
            buffer = self.buffers[slot, : part.numel()]
            with torch.cuda.stream(self.stream):
                buffer.copy_(part, non_blocking=True)
                ready = self.stream.record_event()
            place = target.data_ptr() + start
            self.busy[slot] = self.pool.submit(_land, ready, place, buffer)

    def finish(self) -> None:
        self.pool.shutdown()
        for future in self.busy:
            if future is not None:
                future.result()


def _land(ready: torch.cuda.Event, place: int, buffer: torch.Tensor) -> None:
    ready.synchronize()
    ctypes.memmove(place, buffer.data_ptr(), buffer.numel())
