"""What a conversion would take, found without writing anything."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fuseport.kernels.move import Move

from .backend import choose, default_device
from .checkpoint_plan import CheckpointPlan
from .cuts import read_bytes
from .limits import Limits
from .publish import check_output, keep_apart

# Elements of the trial, and bytes a second of a disk's writing: that of an ordinary SSD.
_TRIAL, _WRITING = 4 << 20, 1.0e9


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds; memory is the most of one process, 0 on a GPU that is not used."""

    read: int
    written: int
    host_peak: int
    gpu_peak: int
    seconds: float


def forecast(plan: CheckpointPlan, limits: Limits, device: str, processes: int) -> Forecast:
    """Forecast a conversion; times a small cast on the device.

    Raises:
        RecipeError: there is no such device.
    """
    where = default_device(device)
    read = sum(read_bytes(move.src) for one in plan.tensors for move in one.moves)
    rate = _rate(where)
    seconds = max((read + plan.nbytes) / rate / processes, plan.nbytes / _WRITING)
    gpu = limits.gpu_memory if where.type == "cuda" else 0
    return Forecast(read, plan.nbytes, limits.peak(where), gpu, seconds)


def _rate(device: torch.device) -> float:
    """Bytes that moves read and write in a second."""
    src = torch.ones(_TRIAL, dtype=torch.float32, device=device)
    move = Move(torch.empty_like(src, dtype=torch.bfloat16), src)
    run = choose("auto", device)
    run([move], count=True)
    begin = time.perf_counter()
    counts = run([move], count=True)
    assert counts is not None
    counts.cpu()
    return 6 * _TRIAL / max(time.perf_counter() - begin, 1e-9)


def check_destination(plan: CheckpointPlan, out: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `out` could not be written; writes nothing."""
    keep_apart(plan.source.origin, out)
    check_output(Path(os.path.abspath(out)), overwrite, plan.nbytes)
