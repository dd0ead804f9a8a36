"""Files of a partial directory, filled by threads at their places.

A file is preallocated, gets its data in any order, and its header last, once the data is on the
disk: before that nothing loads it. The system lets one thread at a time into a file, so several
files are written at once, each by few threads. Digests are of tensors, taken while the bytes are
in memory, of several tensors at once; a file's is that of its header and its tensors' digests in
order, so no byte is read again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import xxhash

from .checkpoint import FileImage, file_digest_of, raw_bytes, write_all
from .cuts import Run
from .engine import Filled
from .errors import FuseportError
from .lanes import Lanes, Task
from .limits import MOST_FILES, threads
from .timings import Timings

# Bytes of one positioned write.
PART = 32 << 20
# Threads that write one file: while one copies, another one gets ready.
_A_FILE = 2
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

    def reserve(self) -> None:
        """Have the file's space, before its bytes or beside them."""
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


class _Landing:
    """Counts a window's pieces of work; the last one that ends calls `conclude`."""

    def __init__(self, conclude: Callable[[], None]) -> None:
        self._conclude, self._left, self._lock = conclude, 1, threading.Lock()

    def begin(self) -> None:
        """One more piece, beside the first."""
        with self._lock:
            self._left += 1

    def end(self) -> None:
        """A piece is done."""
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._conclude()


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
        self._settled = threading.Condition()
        self._on_their_way = 0
        self._done = 0
        self._error: list[BaseException] = []
        self._stopped = False
        self._land = ThreadPoolExecutor(1, "land")
        # By file, and by tensor: a digest takes a tensor's bytes in order.
        self._write = Lanes(threads(MOST_FILES), _A_FILE, "write")
        self._digest = Lanes(threads(), 1, "digest")
        self._fsync = ThreadPoolExecutor(4, "fsync")
        self._syncs: list[Future[None]] = []

    def put(self, filled: Filled, done: Callable[[], None]) -> None:
        """Write and digest a window in the background."""
        with self._settled:
            self._on_their_way += 1
        landing = _Landing(partial(self._conclude, filled, done))
        self._land.submit(self._step, landing, partial(self._hand_out, filled, landing))

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
        with self._settled:
            self._settled.wait_for(lambda: self._on_their_way == 0)
        for number in files:
            # What has no elements at all is never met on the way.
            if number not in self._files and not self._error:
                self._open(number).reserve()
                self._end_if_full(number)
        for sync in list(self._syncs):
            sync.result()
        self.check()
        if short := [self.images[n].name for n in files if n not in self.results]:
            raise FuseportError(f"{short[0]} was not filled completely; please report this")
        return self.results

    def close(self) -> None:
        """End the threads and close the files, whatever their state."""
        self._stopped = True
        self._land.shutdown(cancel_futures=True)
        self._write.close()
        self._digest.close()
        self._fsync.shutdown(cancel_futures=True)
        for file in self._files.values():
            if file.handle >= 0:
                os.close(file.handle)
                file.handle = -1

    def _open(self, number: int) -> _Open:
        image = self.images[number]
        if number not in self._files:
            self._files[number] = _Open(self.directory / image.name, image)
        return self._files[number]

    def _hand_out(self, filled: Filled, landing: _Landing) -> None:
        """Hand a window's bytes, once they are there, to the threads: the writing ones first."""
        filled.ready()
        runs = zip(filled.window.runs, filled.window.places.values(), strict=True)
        pieces = [(run, filled.bytes_of(run, at)) for run, at in runs]
        for run, data in pieces:
            self._hand_to_writers(run, data, landing)
        for run, data in pieces:
            lane = run.planned.rank, run.planned.name
            self._submit(self._digest, lane, landing, partial(self._take_in, run, data))

    def _hand_to_writers(self, run: Run, data: torch.Tensor, landing: _Landing) -> None:
        number = run.planned.rank
        is_new, file = number not in self._files, self._open(number)
        if is_new:
            self._submit(self._write, number, landing, file.reserve)
        for offset, part in _parts(file.image, run, data):
            self._submit(self._write, number, landing, partial(self._put, file, offset, part))

    def _submit(self, lanes: Lanes, lane: Hashable, landing: _Landing, task: Task) -> None:
        landing.begin()
        lanes.submit(lane, partial(self._step, landing, task))

    def _step(self, landing: _Landing, task: Task) -> None:
        """A piece of a window's work; what it raises makes the others be left out."""
        try:
            if not (self._error or self._stopped):
                task()
        except BaseException as error:
            self._error.append(error)
        finally:
            landing.end()

    def _take_in(self, run: Run, data: torch.Tensor) -> None:
        with self.timings.busy("digest", run.nbytes):
            self._files[run.planned.rank].update(run, data)

    def _put(self, file: _Open, offset: int, data: torch.Tensor) -> None:
        with self.timings.busy("write", data.numel()):
            write_all(file.handle, raw_bytes(data), offset)

    def _conclude(self, filled: Filled, done: Callable[[], None]) -> None:
        """All of a window's work is done, or was left out after an error."""
        try:
            if not (self._error or self._stopped):
                with self._lock:
                    self._account(filled)
        except BaseException as error:
            self._error.append(error)
        finally:
            done()
            with self._settled:
                self._on_their_way -= 1
                self._settled.notify_all()

    def _account(self, filled: Filled) -> None:
        for cut, own in zip(filled.window.cuts, filled.lost.tolist(), strict=True):
            run = cut.runs[0]
            lost, name = self._files[run.planned.rank].result.lost, run.planned.name
            if any(own):
                before = lost.get(name, [0.0] * len(own))
                lost[name] = [a + b for a, b in zip(before, own, strict=True)]
        for run in filled.window.runs:
            self._files[run.planned.rank].missing -= run.nbytes
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
