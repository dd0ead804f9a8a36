"""Files of a partial directory, filled by threads at their places.

A file is preallocated, gets its data in any order, and its header last, once the data is on the
disk: before that nothing loads it. Digests are of tensors, taken while the bytes are in memory; a
file's is that of its header and its tensors' digests in order, so no byte is read again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from .checkpoint import FileImage, file_digest_of, raw_bytes, write_all
from .cuts import Run
from .engine import Filled
from .errors import FuseportError
from .limits import threads
from .timings import Timings

# Bytes of one positioned write.
PART = 8 << 20
# File systems that cannot preallocate; the length is set instead.
_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass
class FileResult:
    """A finished file: its digest, its tensors', and what was lost, by tensor.

    That is saturated and non-finite elements, signal and noise: see `losses`.
    """

    nbytes: int
    digest: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    lost: dict[str, list[float]] = field(default_factory=dict)


class _Open:
    """A file that is being filled."""

    def __init__(self, path: Path, image: FileImage) -> None:
        self.image, self.missing = image, image.nbytes - len(image.header)
        self.handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o644)
        self.digests: dict[str, xxhash.xxh3_128] = {}
        self.result = FileResult(image.nbytes)
        try:
            self._reserve()
        except BaseException:
            os.close(self.handle)
            raise

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self.handle, 0, self.image.nbytes)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise
            os.ftruncate(self.handle, self.image.nbytes)

    def update(self, run: Run, data: torch.Tensor) -> None:
        state = self.digests.setdefault(run.planned.name, xxhash.xxh3_128())
        state.update(raw_bytes(data))

    def finish(self, sync: bool) -> FileResult:
        """Everything on the disk, and then the header."""
        if sync:
            os.fsync(self.handle)
        write_all(self.handle, self.image.header, 0)
        if sync:
            os.fsync(self.handle)
        os.close(self.handle)
        self.handle = -1
        # Tensors without elements never came in a run.
        empty = xxhash.xxh3_128_hexdigest(b"")
        names = {name: self.digests.pop(name, None) for name in sorted(self.image.offsets)}
        self.result.tensors = {n: empty if d is None else d.hexdigest() for n, d in names.items()}
        self.result.digest = file_digest_of(self.image, self.result.tensors)
        return self.result


class Writer:
    """Fills files of `directory`: a `Sink`.

    Args:
        directory: the partial directory.
        images: all files, by number.
        timings: where busy times go.
        progress: called with bytes done, by the thread that calls `check` or `finish`.
        finished: called by a thread for each finished file.
        sync: False leaves fsync out, for benchmarks.
    """

    def __init__(
        self,
        directory: Path,
        images: Mapping[int, FileImage],
        timings: Timings,
        progress: Callable[[int], None],
        finished: Callable[[int, FileResult], None] = lambda number, result: None,
        *,
        sync: bool = True,
    ) -> None:
        self.directory, self.images, self.timings = directory, images, timings
        self.progress, self.finished, self.sync = progress, finished, sync
        self.results: dict[int, FileResult] = {}
        self._files: dict[int, _Open] = {}
        self._lock = threading.Lock()
        self._done = 0
        self._error: list[BaseException] = []
        self._digest = ThreadPoolExecutor(1, "digest")
        self._finish = ThreadPoolExecutor(1, "finish")
        self._write = ThreadPoolExecutor(threads(), "write")
        self._fsync = ThreadPoolExecutor(4, "fsync")
        self._syncs: list[Future[None]] = []

    def put(self, filled: Filled, done: Callable[[], None]) -> None:
        """Write and digest a window in the background."""
        landed = self._digest.submit(self._land, filled)
        self._finish.submit(self._conclude, filled, landed, done)

    def check(self) -> None:
        """Report progress.

        Raises:
            OSError, FuseportError: what a thread met.
        """
        with self._lock:
            done, self._done = self._done, 0
        if done:
            self.progress(done)
        if self._error:
            raise self._error[0]

    def finish(self, files: Collection[int]) -> dict[int, FileResult]:
        """Wait for everything; the files' results by number.

        Raises:
            OSError, FuseportError: as `check`; a file lacks bytes.
        """
        self._digest.shutdown()
        self._finish.shutdown()
        for number in files:
            # What has no elements at all is never met on the way.
            if number not in self._files and not self._error:
                self._open(number)
                self._end_if_full(number)
        for sync in list(self._syncs):
            sync.result()
        self.check()
        if short := [self.images[n].name for n in files if n not in self.results]:
            raise FuseportError(f"{short[0]} was not filled completely; please report this")
        return self.results

    def close(self) -> None:
        """End the threads and close the files, whatever their state."""
        for pool in (self._digest, self._write, self._finish, self._fsync):
            pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            if file.handle >= 0:
                os.close(file.handle)
                file.handle = -1

    def _open(self, number: int) -> _Open:
        image = self.images[number]
        if number not in self._files:
            self._files[number] = _Open(self.directory / image.name, image)
        return self._files[number]

    def _land(self, filled: Filled) -> list[Future[None]]:
        """Hand a window's bytes to the writing threads, and digest them meanwhile."""
        filled.ready()
        runs = list(zip(filled.window.runs, filled.window.places.values(), strict=True))
        pieces = [(self._open(run.planned.rank), run, filled.bytes_of(run, at)) for run, at in runs]
        writes = [
            self._write.submit(self._put, file, offset, part)
            for file, run, data in pieces
            for offset, part in _parts(file.image, run, data)
        ]
        for file, run, data in pieces:
            with self.timings.busy("digest", run.nbytes):
                file.update(run, data)
        return writes

    def _put(self, file: _Open, offset: int, data: torch.Tensor) -> None:
        if self._error:
            return
        with self.timings.busy("write", data.numel()):
            write_all(file.handle, raw_bytes(data), offset)

    def _conclude(
        self, filled: Filled, landed: Future[list[Future[None]]], done: Callable[[], None]
    ) -> None:
        try:
            for write in landed.result():
                write.result()
            self._account(filled)
        except BaseException as error:
            self._error.append(error)
        finally:
            done()

    def _account(self, filled: Filled) -> None:
        for cut, own in zip(filled.window.cuts, filled.lost.tolist(), strict=True):
            run = cut.runs[0]
            lost, name = self._files[run.planned.rank].result.lost, run.planned.name
            if any(own):
                before = lost.get(name, [0.0] * len(own))
                lost[name] = [a + b for a, b in zip(before, own, strict=True)]
        for run in filled.window.runs:
            self._files[run.planned.rank].missing -= run.nbytes
            with self._lock:
                self._done += run.nbytes
        for number in dict.fromkeys(run.planned.rank for run in filled.window.runs):
            self._end_if_full(number)

    def _end_if_full(self, number: int) -> None:
        if self._files[number].missing == 0:
            self._syncs.append(self._fsync.submit(self._end, number))

    def _end(self, number: int) -> None:
        try:
            with self.timings.busy("fsync", self.images[number].nbytes):
                result = self._files[number].finish(self.sync)
            self.finished(number, result)
            self.results[number] = result
        except BaseException as error:
            self._error.append(error)


def _parts(image: FileImage, run: Run, data: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(byte of the file, bytes) of a run, a positioned write each."""
    start = image.offsets[run.planned.name] + run.start * run.planned.dst.element_size()
    return [(start + at, data[at : at + PART]) for at in range(0, data.numel(), PART)]
