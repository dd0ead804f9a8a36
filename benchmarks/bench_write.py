"""How to write large files fast: buffered, preallocated, mapped or direct, one file or several.

    python -m benchmarks.bench_write DIRECTORY [--gigabytes 4] [--files 1 8]
        [--threads 1 4 16] [--ways NAME ...]

Each way writes the same bytes in parts of 8 MiB, which go to the files in turn; older files are
removed, and all is on the disk, before the time begins. Prints GB/s before fsync and with it.
`docs/reliability.md` says which won where.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

PART = 8 << 20
# Linux 5.14's advice to hand out pages now, as if each were written; mmap does not name it.
POPULATE_WRITE = 23
# A source of parts that is in memory, and aligned for direct writes.
_POOL = np.frombuffer(mmap.mmap(-1, 8 * PART), dtype=np.uint8)
Put = Callable[[int, int], object]


def _part(index: int) -> npt.NDArray[np.uint8]:
    return _POOL[index % 8 * PART : (index % 8 + 1) * PART]


def _positioned(handle: int, index: int) -> None:
    os.pwrite(handle, _part(index).data, index * PART)


def _mapped(handle: int, index: int, *advice: int) -> None:
    target = mmap.mmap(handle, PART, offset=index * PART)
    for one in advice:
        target.madvise(one)
    view = np.frombuffer(target, dtype=np.uint8)
    ctypes.memmove(view.ctypes.data, _part(index).ctypes.data, PART)
    del view
    target.close()


def _populated(handle: int, index: int) -> None:
    _mapped(handle, index, POPULATE_WRITE)


# Name → (flags, preallocated, how a part is put).
WAYS: dict[str, tuple[int, bool, Put]] = {
    "buffered": (0, False, _positioned),
    "preallocated": (0, True, _positioned),
    "mapped": (0, False, _mapped),
    "preallocated, mapped": (0, True, _mapped),
    "populated, mapped": (0, False, _populated),
    "direct": (os.O_DIRECT, False, _positioned),
    "preallocated, direct": (os.O_DIRECT, True, _positioned),
}


def measure(
    paths: Sequence[Path], size: int, threads: int, way: tuple[int, bool, Put]
) -> tuple[float, float]:
    """Seconds before fsync, and with it, for files of `size` bytes together."""
    flags, preallocated, put = way
    parts = size // PART // len(paths)
    for path in paths:
        path.unlink(missing_ok=True)
    os.sync()
    begin = time.perf_counter()
    with ExitStack() as opened:
        handles = [os.open(path, os.O_CREAT | os.O_RDWR | flags, 0o644) for path in paths]
        for handle, path in zip(handles, paths, strict=True):
            opened.callback(path.unlink)
            opened.callback(os.close, handle)
            (os.posix_fallocate(handle, 0, parts * PART) if preallocated
             else os.ftruncate(handle, parts * PART))  # fmt: skip
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(put, handles * parts, sorted([*range(parts)] * len(paths))))
        written = time.perf_counter() - begin
        for handle in handles:
            os.fsync(handle)
        return written, time.perf_counter() - begin


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--files", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    _POOL[:] = np.random.default_rng(0).integers(0, 256, len(_POOL), dtype=np.uint8)
    size = int(given.gigabytes * (1 << 30)) // PART // max(given.files) * PART * max(given.files)
    for name in given.ways:
        for files in given.files:
            for threads in given.threads:
                report(name, [given.directory / f"trial{n}" for n in range(files)], size, threads)


def report(name: str, paths: Sequence[Path], size: int, threads: int) -> None:
    """Measure and print one line."""
    text = f"{name:21} {len(paths):2} files {threads:2} threads"
    try:
        before, after = measure(paths, size, threads, WAYS[name])
    except OSError as error:
        print(f"{text} {error}", flush=True)
        return
    print(
        f"{text} {size / before / 1e9:6.2f} GB/s, with fsync {size / after / 1e9:6.2f}", flush=True
    )


if __name__ == "__main__":
    main()
