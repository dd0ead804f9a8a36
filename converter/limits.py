"""How much memory a conversion may take, and how it is shared out.

The bounds are for one process, and hold for any size of model: windows are made to fit them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .errors import RecipeError

MIB = 1 << 20
# What a process has beside the slabs: the interpreter, torch, read buffers, fp32 temporaries.
BASE = 768 * MIB
# Slabs: one is read into, one is converted, one is written.
SLABS = 3
# Beside its slabs, a GPU holds tables, and copies of what must be gathered before it is scaled.
_GPU_SHARES = 2 * SLABS
_SMALLEST, _LARGEST = 4 * MIB, 256 * MIB


@dataclass(frozen=True)
class Limits:
    """Bounds in bytes for one process: torch's memory on the GPU, and the host's private memory.

    Raises:
        RecipeError: less than what a conversion needs.
    """

    gpu_memory: int = 1 << 30
    host_memory: int = 2 << 30

    def __post_init__(self) -> None:
        smallest = BASE + SLABS * _SMALLEST
        if self.host_memory < smallest:
            raise RecipeError(
                f"--host-memory is {self.host_memory / MIB:.0f} MiB; a conversion needs at least "
                f"{smallest // MIB} MiB"
            )
        if self.gpu_memory < _GPU_SHARES * _SMALLEST:
            raise RecipeError(
                f"--gpu-memory is {self.gpu_memory / MIB:.0f} MiB; a conversion needs at least "
                f"{_GPU_SHARES * _SMALLEST // MIB} MiB"
            )

    def window(self, device: torch.device) -> int:
        """Bytes of one slab."""
        size = min((self.host_memory - BASE) // SLABS, _LARGEST)
        if device.type == "cuda":
            size = min(size, self.gpu_memory // _GPU_SHARES)
        return size

    def peak(self, device: torch.device) -> int:
        """The most host memory that a conversion takes, in bytes."""
        return BASE + SLABS * self.window(device)


def threads() -> int:
    """Threads of a stage that waits for the disk."""
    return max(2, min(8, len(os.sched_getaffinity(0))))
