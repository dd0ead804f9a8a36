"""Timing: one clock for every suite, and the copy that everything is compared with."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
import triton
from torch._C._autograd import DeviceType

Run = Callable[[], object]


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> float:
    """Seconds, once the GPU is idle: so a time begins and ends with an idle GPU."""
    synchronise()
    return time.perf_counter()


def seconds(run: Run) -> float:
    """Time of one call, from an idle GPU to an idle GPU."""
    begin = clock()
    result = run()
    # Held until the clock has stopped: giving memory back is not part of the work.
    end = clock()
    del result
    return end - begin


def median_seconds(run: Run, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of some calls."""
    times = [seconds(run) for _ in range(warmup + repeats)]
    return statistics.median(times[warmup:])


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes per second of a copy on the device, read and written bytes counted."""
    # Random bits: zeros can be faster than real data.
    shape = (nbytes // 8,)
    source = torch.randint(-(2**62), 2**62, shape, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds(lambda: target.copy_(source))


def extra_memory(run: Run) -> int | None:
    """Most bytes on the GPU during a call, beside what was there and what it returns."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    synchronise()
    kept = max(before, torch.cuda.memory_allocated())
    del result
    return torch.cuda.max_memory_allocated() - kept


def launches(run: Run) -> int | None:
    """Kernels and memory operations that a call puts on the GPU; None where they can't be seen."""
    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        result = run()
        synchronise()
    del result
    return sum(event.device_type is DeviceType.CUDA for event in profile.events() or ()) or None


def card() -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def machine() -> str:
    """The card and the library versions that a figure belongs to."""
    return f"{card()}, torch {torch.__version__}, triton {triton.__version__}"
