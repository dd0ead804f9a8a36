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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from fuseport.kernels.move import Move

from .backend import Run
from .plan import Planned, bind

ALIGNMENT = 256
WINDOW = 96 << 20
RING, CHUNK, THREADS = 8, 16 << 20, 8


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


def windows(all_spans: Iterator[Span], limit: int) -> Iterator[list[Span]]:
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


@dataclass
class HostOutput:
    """One converter's block of host memory, used again by its next conversion."""

    block: torch.Tensor | None = None
    registered: bool = False
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS))

    def fill(self, plan: Sequence[Planned], run: Run, device: torch.device) -> list[torch.Tensor]:
        """Run a plan whose `dst`s are meta tensors; the results, readable at once.

        Results of an earlier call lie in the same memory and are overwritten.
        """
        places, size = places_of(plan)
        block = self._reserve(size, device)
        every = list(spans(plan, places, WINDOW))
        if device.type == "cuda":
            self._through_windows(every, block, run, device)
        else:
            run([_onto(block, 0, span) for span in every])
        return [
            block[place : place + one.nbytes].view(one.dst.dtype).view(one.dst.shape)
            for one, place in zip(plan, places, strict=True)
        ]

    def _reserve(self, size: int, device: torch.device) -> torch.Tensor:
        """The block: new where the old one is too small, registered when it is used again."""
        if self.block is None or self.block.numel() < size:
            self._unregister()
            self.block = torch.empty(size, dtype=torch.uint8)
        elif device.type == "cuda" and not self.registered:
            runtime = torch.cuda.cudart()
            status = runtime.cudaHostRegister(self.block.data_ptr(), self.block.numel(), 0)
            self.registered = int(status) == 0
        return self.block

    def _unregister(self) -> None:
        if self.registered and self.block is not None:
            torch.cuda.cudart().cudaHostUnregister(self.block.data_ptr())
            self.registered = False

    def _through_windows(
        self, every: list[Span], block: torch.Tensor, run: Run, device: torch.device
    ) -> None:
        """Kernel into one window while the other one is copied to the host."""
        largest = max(span.stop - span.start for span in every)
        size = max(WINDOW, largest) + ALIGNMENT
        staging = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        free: list[torch.cuda.Event | None] = [None, None]
        copies = torch.cuda.Stream(device)
        ring = None if self.registered else _Ring(self._pool, copies)
        for index, window in enumerate(windows(iter(every), WINDOW)):
            stage = staging[index % 2]
            if (busy := free[index % 2]) is not None:
                torch.cuda.current_stream(device).wait_event(busy)
            first, last = window[0].start, window[-1].stop
            base = first - first % ALIGNMENT
            run([_onto(stage, base, span) for span in window])
            copies.wait_stream(torch.cuda.current_stream(device))
            source, target = stage[first - base : last - base], block[first:last]
            if ring is None:
                with torch.cuda.stream(copies):
                    target.copy_(source, non_blocking=True)
            else:
                ring.copy(target, source)
            free[index % 2] = copies.record_event()
        copies.synchronize()
        if ring is not None:
            ring.finish()

    def __del__(self) -> None:
        self._unregister()
        self._pool.shutdown(wait=False)


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

    def __init__(self, pool: ThreadPoolExecutor, stream: torch.cuda.Stream) -> None:
        self.pool, self.stream = pool, stream
        self.buffers = torch.empty(RING, CHUNK, dtype=torch.uint8, pin_memory=True)
        self.busy: list[Future[None] | None] = [None] * RING
        self.next = 0

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
        for future in self.busy:
            if future is not None:
                future.result()


def _land(ready: torch.cuda.Event, place: int, buffer: torch.Tensor) -> None:
    ready.synchronize()
    ctypes.memmove(place, buffer.data_ptr(), buffer.numel())
