"""Timing on a GPU: medians of event times, and the copy that everything is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import triton


def milliseconds(run: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median time of `run` on the current stream, by device events."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(statistics.median(times))


def copy_bandwidth(nbytes: int = 4 << 30) -> float:
    """Bytes per millisecond of a device-to-device copy, read and written bytes counted."""
    # Random bits: zeros can be faster than real data.
    source = torch.randint(-(2**62), 2**62, (nbytes // 8,), dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / milliseconds(lambda: target.copy_(source))


def machine() -> str:
    """The card and the library versions that a figure belongs to."""
    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"
