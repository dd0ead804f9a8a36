"""How to write one large file fast: buffered, preallocated, by several threads, mapped, or direct.

    python -m benchmarks.bench_write DIRECTORY [--gigabytes 4]

Each way writes the same bytes in parts of 8 MiB; the old file is removed outside of the time.
Prints GB/s before fsync and with it. `docs/reliability.md` says which won where.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

PART = 8 << 20
# A source of parts that is in memory, and aligned for direct writes.
_POOL = np.frombuffer(mmap.mmap(-1, 8 * PART), dtype=np.uint8)
Put = Callable[[int, int], object]


def _part(index: int) -> npt.NDArray[np.uint8]:
    return _POOL[index % 8 * PART : (index % 8 + 1) * PART]


def _positioned(handle: int, index: int) -> None:
    os.pwrite(handle, _part(index).data, index * PART)


def _mapped(handle: int, index: int) -> None:
    target = mmap.mmap(handle, PART, offset=index * PART)
    view = np.frombuffer(target, dtype=np.uint8)
    ctypes.memmove(view.ctypes.data, _part(index).ctypes.data, PART)
    del view
    target.close()


# Name → (flags, preallocated, how a part is put).
WAYS: dict[str, tuple[int, bool, Put]] = {
    "buffered": (0, False, _positioned),
    "preallocated": (0, True, _positioned),
    "preallocated, mapped": (0, True, _mapped),
    "direct": (os.O_DIRECT, False, _positioned),
    "preallocated, direct": (os.O_DIRECT, True, _positioned),
}


def measure(path: Path, size: int, threads: int, way: tuple[int, bool, Put]) -> tuple[float, float]:
    """Seconds before fsync, and with it."""
    flags, preallocated, put = way
    path.unlink(missing_ok=True)
    begin = time.perf_counter()
    handle = os.open(path, os.O_CREAT | os.O_RDWR | flags, 0o644)
    try:
        (os.posix_fallocate(handle, 0, size) if preallocated else os.ftruncate(handle, size))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda index: put(handle, index), range(size // PART)))
        written = time.perf_counter() - begin
        os.fsync(handle)
        return written, time.perf_counter() - begin
    finally:
        os.close(handle)
        path.unlink()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gigabytes", type=int, default=4)
    arguments = parser.parse_args()
    _POOL[:] = np.random.default_rng(0).integers(0, 256, len(_POOL), dtype=np.uint8)
    size = arguments.gigabytes * (1 << 30)
    for name, way in WAYS.items():
        for threads in (1, 2, 4, 8):
            try:
                before, after = measure(arguments.directory / "trial", size, threads, way)
            except OSError as error:
                print(f"{name:22} {error}")
                break
            print(f"{name:22} {threads} threads {size / before / 1e9:6.2f} GB/s, "
                  f"with fsync {size / after / 1e9:6.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
