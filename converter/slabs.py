"""A few slabs of memory, allocated once and used in turn.

A slab on the host has a twin on the GPU where there is one, and is then registered with the driver.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass

import torch

from .host_output import Block


@dataclass(frozen=True)
class Slab:
    """Bytes on the host, and the same number on the device; one memory on a CPU."""

    host: torch.Tensor
    device: torch.Tensor


class Slabs:
    """A ring of `count` slabs of `size` bytes; `release` it when done."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self._block = Block()
        memory = self._block.reserve(count * size)
        self._free: queue.SimpleQueue[Slab] = queue.SimpleQueue()
        if device.type == "cuda":
            self._block.register()
        for part in memory[: count * size].split(size):
            twin = part if device.type == "cpu" else torch.empty_like(part, device=device)
            self._free.put(Slab(part, twin))

    def take(self, timeout: float) -> Slab | None:
        """A slab that nobody uses; None if there is none within `timeout` seconds."""
        try:
            return self._free.get(timeout=timeout)
        except queue.Empty:
            return None

    def give(self, slab: Slab) -> None:
        """Hand a slab back."""
        self._free.put(slab)

    def release(self) -> None:
        """Give the memory back to the system, once nobody uses it."""
        self._block.release()
