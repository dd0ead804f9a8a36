"""Where the payload of a `torch.save` zip lies, without reading the payload.

A `.distcp` file is a row of such zips. Each is opened through a window that cannot see beyond its
own range; the ends are cached, so a chunk costs two small reads however large its payload is.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from dataclasses import dataclass
from typing import IO, cast

from ..errors import CorruptSourceError, FuseportError, SourceError, UnsupportedOptionError
from .safe_pickle import MAX_PICKLE_BYTES, Inert, PickledTensor, load_pickle, pickled_tensor

_CACHED_END = 4096
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_PAYLOAD_NAME = re.compile(r"(?:^|/)data/[^/]+$")
_MAX_DESCRIPTION_BYTES = 1 << 16
# What zipfile lets through for a damaged archive, text and number errors among it.
ZIP_FAULTS = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
)


class Window:
    """A read-only binary file: `length` bytes of descriptor `fd` from `start`.

    Nothing outside the range can be read through it.
    """

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd, self._start, self._length = fd, start, length
        self._position = 0
        self._head = os.pread(fd, min(length, _CACHED_END), start)
        tail = max(0, length - _CACHED_END)
        self._tail_at = tail
        self._tail = os.pread(fd, length - tail, start + tail) if tail else self._head

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position, counted from the window's start."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; a position beyond the end reads as empty."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start of the window")
        self._position = base + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        """Up to `count` bytes, never from beyond the window."""
        left = max(0, self._length - self._position)
        count = left if count < 0 else min(count, left)
        data = self._at(self._position, count)
        self._position += len(data)
        return data

    def _at(self, begin: int, count: int) -> bytes:
        if begin + count <= len(self._head):
            return self._head[begin : begin + count]
        if begin >= self._tail_at:
            return self._tail[begin - self._tail_at :][:count]
        return os.pread(self._fd, count, self._start + begin)


@dataclass(frozen=True)
class Payload:
    """The single tensor of a zip: its description, its bytes as a range, and their CRC-32."""

    tensor: PickledTensor
    offset: int
    size: int
    crc: int


def find_payload(window: Window, where: str) -> Payload:
    """Locate the one data record of a `torch.save` zip.

    Raises CorruptSourceError if the zip is damaged, holds other than one stored data record, or
    places it outside itself; SourceError if the bytes are in another format or byte order.
    """
    with _open(window, where) as archive:
        payload = _payload_record(archive, where)
        check_byte_order(archive, where)
        description = read_record(archive, "data.pkl", _MAX_DESCRIPTION_BYTES, where)
        tensor = pickled_tensor(load_pickle(description, where), where)
        if payload.filename.rpartition("/")[2] != tensor.storage_key:
            raise CorruptSourceError(f"{where}: the tensor refers to a record that is not there")
        start = _data_start(window, payload, where)
        if start + payload.file_size > archive.start_dir:
            raise CorruptSourceError(f"{where}: the data record runs past its zip")
        return Payload(tensor, start, payload.file_size, payload.CRC)


def read_saved_object(file: Window | IO[bytes], where: str) -> object:
    """The pickled object of a `torch.save` file as plain data; its tensors are not read."""
    try:
        with zipfile.ZipFile(cast("IO[bytes]", file)) as archive:
            return load_pickle(read_record(archive, "data.pkl", MAX_PICKLE_BYTES, where), where)
    except ZIP_FAULTS as error:
        raise CorruptSourceError(f"{where}: not a readable torch.save file ({error})") from error


def _open(window: Window, where: str) -> zipfile.ZipFile:
    magic = window.read(4)
    if magic != b"PK\x03\x04":
        raise CorruptSourceError(
            f"{where}: no torch.save zip begins here (found {magic!r}). The file is damaged, or "
            "was written with another serialization format: save again with torch_save."
        )
    try:
        return zipfile.ZipFile(cast("IO[bytes]", window))
    except ZIP_FAULTS as error:
        raise CorruptSourceError(f"{where}: the zip directory is damaged ({error})") from error


def _payload_record(archive: zipfile.ZipFile, where: str) -> zipfile.ZipInfo:
    records = [info for info in archive.infolist() if _PAYLOAD_NAME.search(info.filename)]
    if len(records) != 1:
        raise _not_one(archive, len(records), where)
    return _stored(records[0], where)


def _not_one(archive: zipfile.ZipFile, count: int, where: str) -> FuseportError:
    """What to say of a chunk that is no single tensor."""
    damaged = CorruptSourceError(f"{where}: expected one data record, found {count}")
    try:
        value = load_pickle(read_record(archive, "data.pkl", _MAX_DESCRIPTION_BYTES, where), where)
    except SourceError:
        return damaged
    if not isinstance(value, Inert) or not value.path.startswith("transformer_engine."):
        return damaged
    return UnsupportedOptionError(
        f"{where}: stored in fp8 through {value.path}, and of fp8 weights in torch_dist only their "
        f"bf16 values are read, which Transformer Engine up to 2.16 writes; save the weights in "
        f"bf16, or in the legacy format (--ckpt-format torch)"
    )


def _stored(info: zipfile.ZipInfo, where: str) -> zipfile.ZipInfo:
    stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    if not stored or info.flag_bits & 1:  # bit 0: encrypted
        raise CorruptSourceError(f"{where}: record {info.filename!r} is not stored as it is")
    return info


def read_record(archive: zipfile.ZipFile, name: str, limit: int, where: str) -> bytes:
    """The bytes of the one record called `name`, below the archive's top folder."""
    found = [info for info in archive.infolist() if info.filename.partition("/")[2] == name]
    if len(found) != 1:
        raise CorruptSourceError(f"{where}: expected one record {name!r}, found {len(found)}")
    if _stored(found[0], where).file_size > limit:
        raise CorruptSourceError(f"{where}: record {name!r} is {found[0].file_size} bytes long")
    try:
        return archive.read(found[0])
    except ZIP_FAULTS as error:
        raise CorruptSourceError(f"{where}: record {name!r} is damaged ({error})") from error


def check_byte_order(archive: zipfile.ZipFile, where: str) -> None:
    """Raise SourceError if a `torch.save` zip is another machine's."""
    # Written since torch 2.1; files without it come from little-endian machines in practice.
    names = [info.filename.partition("/")[2] for info in archive.infolist()]
    if "byteorder" in names and read_record(archive, "byteorder", 16, where) != b"little":
        raise SourceError(f"{where}: the data is not little-endian; save it on another machine")


def _data_start(window: Window, info: zipfile.ZipInfo, where: str) -> int:
    window.seek(info.header_offset)
    header = window.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise CorruptSourceError(f"{where}: the data record has no header")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return info.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)
