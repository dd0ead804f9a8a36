"""A few slabs of host memory, allocated once and used in turn.

Beside a GPU they are registered with the driver. Touching and registering them takes longer than
filling them, so the ring of a conversion that is over is kept for the next one of the process.
"""

from __future__ import annotations

import atexit
import queue
import threading

import torch

from .host_output import Block


class Slabs:
    """A ring of `count` slabs of `size` bytes, uint8; `release` it when done."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self._device = device
        self._block = _kept.pop(count * size, device)
        memory = self._block.reserve(count * size)
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        if device.type == "cuda":
            self._block.register()
        for part in memory[: count * size].split(size):
            self._free.put(part)

    def take(self, timeout: float) -> torch.Tensor | None:
        """A slab that nobody uses; None if there is none within `timeout` seconds."""
        try:
            return self._free.get(timeout=timeout)
        except queue.Empty:
            return None

    def give(self, slab: torch.Tensor) -> None:
        """Hand a slab back."""
        self._free.put(slab)

    def release(self) -> None:
        """Once nobody uses it: keep the memory for the next ring, or give it to the system."""
        if self._device.type == "cuda":
            _kept.push(self._block, self._device)
        else:
            self._block.release()


class _Kept:
    """The block of the last ring that was released, and its GPU."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block, self._device = Block(), torch.device("cpu")

    def pop(self, size: int, device: torch.device) -> Block:
        """The block that is kept, if it has `size` bytes and is the device's; or else a new one."""
        with self._lock:
            block, self._block = self._block, Block()
            return block if (block.memory.numel(), self._device) == (size, device) else Block()

    def push(self, block: Block, device: torch.device) -> None:
        """Keep it; what was kept before goes back to the system."""
        with self._lock:
            self._block, self._device = block, device


_kept = _Kept()


def forget() -> None:
    """Give the memory that is kept for the next conversion back to the system."""
    _kept.push(Block(), torch.device("cpu"))


# While torch can still be asked to let go of it.
atexit.register(forget)
