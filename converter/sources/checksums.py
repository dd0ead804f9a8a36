"""The checksums that a source keeps of its own bytes: CRC-32 of each record in a `torch.save` zip.

torch does not look at them when it loads, so a flipped bit loads silently. A conversion reads
ranges, which a checksum of the whole does not cover; so each record is read once more as a whole,
beside the conversion, while the system still has most of it in memory.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from ..errors import CorruptSourceError
from ..timings import Timings
from .stored import FileRange, Stored

_BLOCK = 4 << 20
_THREADS = 2


def summed(stored: Iterable[Stored]) -> list[FileRange]:
    """The records that have a checksum, each once, in the order of their files."""
    ranges = (piece.data for one in stored for piece in one.pieces)
    found = {one for one in ranges if isinstance(one, FileRange) and one.crc is not None}
    return sorted(found, key=lambda one: (str(one.path), one.offset))


def check_crc(record: FileRange) -> None:
    """Raise CorruptSourceError if a record's bytes are not those that were saved."""
    crc, at, end = 0, record.offset, record.offset + record.nbytes
    buffer = memoryview(bytearray(min(_BLOCK, record.nbytes)))
    try:
        handle = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while at < end:
                size = os.preadv(handle, [buffer[: end - at]], at)
                if not size:
                    raise CorruptSourceError(f"{record.path} ends at byte {at}: truncated?")
                crc = zlib.crc32(buffer[:size], crc)
                at += size
        finally:
            os.close(handle)
    except OSError as error:
        raise CorruptSourceError(f"{record.path}: {error.strerror or error}") from error
    if crc != record.crc:
        raise CorruptSourceError(
            f"{record.path}: bytes {record.offset} to {end} have CRC-32 {crc:08x}, expected "
            f"{record.crc:08x}: they changed since they were saved. Copy the checkpoint again, or "
            f"give check_source False (--no-check-source) if it was saved without checksums"
        )


class Checking:
    """Records that are being checked by threads in the background."""

    def __init__(self, records: Iterable[FileRange], timings: Timings) -> None:
        self._timings = timings
        self._pool = ThreadPoolExecutor(_THREADS, "check")
        self._futures = deque(self._pool.submit(self._check, record) for record in records)

    def _check(self, record: FileRange) -> None:
        with self._timings.busy("check", record.nbytes):
            check_crc(record)

    def glance(self) -> None:
        """Raise CorruptSourceError if a record is known to be damaged."""
        while self._futures and self._futures[0].done():
            self._futures.popleft().result()

    def finish(self) -> None:
        """Wait for all of them.

        Raises:
            CorruptSourceError: one is damaged.
        """
        while self._futures:
            self._futures.popleft().result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
