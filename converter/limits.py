"""How much memory a conversion may take, and how it is shared out.

The bounds are for one process, and hold for any size of model: windows are made to fit them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from numbers import Integral

import torch

from .errors import RecipeError

MIB = 1 << 20
# What a process has beside the slabs: the interpreter, torch, read buffers, fp32 temporaries.
BASE = 768 * MIB
# Slabs: one is read into, one is converted, one is written.
SLABS = 3
# Beside a GPU: so that there is always something to write into each of the files.
_MOST_SLABS = 8
# Beside its slabs, a GPU holds tables, and copies of what must be gathered before it is scaled.
_GPU_SHARES = 2 * SLABS
_SMALLEST, _LARGEST = 4 * MIB, 256 * MIB
# Files that are filled at the same time, where there are so many processors.
MOST_FILES = 16
# Slabs lie one behind the other, and each has to begin where any element may.
PAGE = 4096


@dataclass(frozen=True)
class Limits:
    """Bounds in bytes for one process: torch's memory on the GPU, and the host's private memory.

    Raises:
        RecipeError: less than what a conversion needs.
    """

    gpu_memory: int = 1 << 30
    host_memory: int = 2 << 30

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "host_memory"):
            if not isinstance(value := getattr(self, name), Integral):
                raise RecipeError(f"{name} must be a whole number of bytes, found {value!r}")
        smallest = BASE + SLABS * _SMALLEST
        if self.host_memory < smallest:
            raise RecipeError(
                f"host_memory (--host-memory) is {self.host_memory / MIB:.0f} MiB; a conversion "
                f"needs at least {smallest // MIB} MiB"
            )
        if self.gpu_memory < _GPU_SHARES * _SMALLEST:
            raise RecipeError(
                f"gpu_memory (--gpu-memory) is {self.gpu_memory / MIB:.0f} MiB; a conversion "
                f"needs at least {_GPU_SHARES * _SMALLEST // MIB} MiB"
            )

    def window(self, device: torch.device) -> int:
        """Bytes of one slab: whole pages."""
        size = min((self.host_memory - BASE) // SLABS, _LARGEST)
        if device.type == "cuda":
            size = min(size, self.gpu_memory // _GPU_SHARES)
        return size // PAGE * PAGE

    def slabs(self, device: torch.device) -> int:
        """Slabs on the host. Beside a GPU, which is never waited for, most of them are written."""
        most = _MOST_SLABS if device.type == "cuda" else SLABS
        return min(most, (self.host_memory - BASE) // self.window(device))

    def peak(self, device: torch.device) -> int:
        """The most host memory that a conversion takes, in bytes."""
        return BASE + self.slabs(device) * self.window(device)


_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of "1GiB", "800 MB" or "4000000".

    Raises:
        RecipeError: it is something else.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise RecipeError(f"a size is {text!r}; expected a number and a unit, as in 2GiB or 800MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def threads(most: int = 8) -> int:
    """Threads of a stage that waits for the disk."""
    return max(2, min(most, len(os.sched_getaffinity(0))))
