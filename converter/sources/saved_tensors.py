"""Small tensors out of `torch.save` files and plain pickles, without torch's loaders.

A tensor in a plain pickle brings its storage along as the bytes of another file: five pickles
(magic number, protocol, machine, storage's description, its key), the number of elements, and the
elements. That is torch's format from before its zips, and still what `pickle.dumps(tensor)`
writes. Both are read here with the unpickler that only builds data: `torch.load` would allocate
what a description claims before it looks whether the bytes are there.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CorruptSourceError, SourceError
from .safe_pickle import Inert, PickledTensor, load_small_pickles, pickled_tensor
from .torch_zip import ZIP_FAULTS, check_byte_order, read_record

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# What a pickle calls for a storage's bytes: torch's function, or the one that Megatron-Core (from
# 0.19 on) puts in its place when it is imported.
_FROM_BYTES = frozenset([
    "torch.storage._load_from_bytes",
    "megatron.core.safe_globals.safe_load_from_bytes",
])  # fmt: skip
_COUNT = struct.Struct("<q")

# From an inert storage to its description as `torch.save` has it, and its bytes.
ReadStorage = Callable[[Inert], tuple[Inert, bytes]]


@dataclass(frozen=True)
class Saved:
    """A saved object as plain data; `tensor` reads one of the tensors in it."""

    value: Any
    read_storage: ReadStorage
    where: str

    def tensor(self, value: object) -> torch.Tensor:
        """A contiguous CPU tensor.

        Raises:
            SourceError: it is no plain dense tensor. CorruptSourceError: its bytes are not there.
        """
        if not isinstance(value, Inert) or not value.args or not isinstance(value.args[0], Inert):
            raise SourceError(f"{self.where}: expected a tensor, found {type(value).__name__}")
        described, data = self.read_storage(value.args[0])
        value.args = (described, *value.args[1:])
        return _from_bytes(pickled_tensor(value, self.where), data, self.where)


def load_saved(data: bytes, where: str, limit: int) -> Saved:
    """Read a `torch.save` zip or a plain pickle; `limit` is in bytes, for each record too.

    Raises:
        UnsafeSourceError: it asks for code to run. CorruptSourceError: it is damaged or too big.
        SourceError: its byte order is another machine's.
    """
    if len(data) > limit:
        raise CorruptSourceError(f"{where}: {len(data)} bytes; at most {limit} are read")
    if data.startswith(ZIP_MAGIC):
        return _load_zip(data, where, limit)
    values, _ = load_small_pickles(data, 1, where)
    return Saved(values[0], lambda storage: _nested(storage, where), where)


def _load_zip(data: bytes, where: str, limit: int) -> Saved:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except ZIP_FAULTS as error:
        raise CorruptSourceError(f"{where}: not a readable torch.save file ({error})") from error
    check_byte_order(archive, where)
    values, _ = load_small_pickles(read_record(archive, "data.pkl", limit, where), 1, where)

    def read(storage: Inert) -> tuple[Inert, bytes]:
        key = storage.args[2] if len(storage.args) > 2 else None
        return storage, read_record(archive, f"data/{key}", limit, where)

    return Saved(values[0], read, where)


def _nested(storage: Inert, where: str) -> tuple[Inert, bytes]:
    data = storage.args[0] if len(storage.args) == 1 else None
    if storage.path not in _FROM_BYTES or not isinstance(data, bytes):
        raise CorruptSourceError(f"{where}: a tensor's storage is {storage!r}, not its bytes")
    (magic, protocol, machine, described, keys), start = load_small_pickles(data, 5, where)
    known = (magic, protocol) == (_LEGACY_MAGIC, _LEGACY_PROTOCOL) and isinstance(machine, dict)
    # Its last entry is for views of other storages, which torch no longer writes.
    whole = isinstance(described, Inert) and len(described.args) == 6 and described.args[5] is None
    if not known or not whole or not isinstance(keys, list):
        raise CorruptSourceError(f"{where}: a tensor's storage is in an unknown format")
    if machine.get("little_endian") is not True:
        raise SourceError(f"{where}: the data is not little-endian; save it on another machine")
    described.args = described.args[:5]
    return described, _elements(described, keys, data[start:], where)


def _elements(described: Inert, keys: list[Any], rest: bytes, where: str) -> bytes:
    """The bytes after the count of elements, which must be the description's."""
    expected = described.args[2:5:2]  # key, then after the device the number of elements
    found = (*keys, *_COUNT.unpack(rest[: _COUNT.size])) if len(rest) >= _COUNT.size else ()
    if found != expected:
        raise CorruptSourceError(f"{where}: a tensor's storage is not as long as it says")
    return rest[_COUNT.size :]


def _from_bytes(tensor: PickledTensor, data: bytes, where: str) -> torch.Tensor:
    """Views of a larger storage come out on their own; none repeats elements."""
    if len(data) != tensor.storage_bytes:
        raise CorruptSourceError(
            f"{where}: a tensor's storage has {len(data)} bytes, expected {tensor.storage_bytes}"
        )
    sizes = tensor.shape
    if min(sizes, default=0) < 0 or math.prod(sizes) * tensor.dtype.itemsize > len(data):
        raise CorruptSourceError(f"{where}: a tensor {sizes} has {len(data)} bytes")
    if not len(data):
        return torch.empty(sizes, dtype=tensor.dtype, device="cpu")
    flat = torch.frombuffer(bytearray(data), dtype=tensor.dtype)
    # torch checks that strides and offset stay within the storage.
    with contextlib.suppress(RuntimeError, OverflowError, TypeError):
        return flat.as_strided(sizes, tensor.stride, tensor.offset).clone()
    raise CorruptSourceError(f"{where}: a tensor {sizes} reaches past its storage")
