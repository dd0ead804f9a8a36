"""Megatron's `torch_dist` checkpoints, without running what is in them.

`.metadata` says which chunk of which tensor lies where. Every chunk is located down to the byte,
and checked, before anything is read: its file is inside the directory, its zip inside its range,
its payload of the stated dtype and size, and all chunks of a tensor tile it. What is handed on is
byte ranges, so that a slice of a tensor costs a read of that slice.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CorruptSourceError, SourceError
from .byte_entries import (
    byte_entries,
    check_range,
    fields_of,
    module_states,
    path_inside,
    range_of,
)
from .checkpoint_dir import check_torch_dist, iteration_dir, refuse_format
from .run_facts import namespace, read_facts
from .safe_pickle import MAX_PICKLE_BYTES, Inert, load_pickle
from .stored import FileRange, Piece, Shape, Stored
from .tiling import check_tiling
from .torch_zip import Window, find_payload, read_saved_object

READABLE_DTYPES = frozenset({
    torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
})  # fmt: skip

_IGNORED = (
    (re.compile(r"(?:^|\.)optimizer\."), "optimizer state"),
    (re.compile(r"_extra_state(?:/|$)"), "extra state of a module"),
    (re.compile(r"(?:^|/)rng_state"), "random number generator state"),
    (re.compile(r"^(?:rerun_state_machine|opt_param_scheduler|iteration)"), "training state"),
)


@dataclass(frozen=True)
class TorchDist:
    """A torch_dist checkpoint: model tensors by their key, the rest by key and reason.

    `facts` are the run's arguments (see `read_facts`); `origin` is the iteration directory;
    `states` reads Transformer Engine's module states.
    """

    tensors: dict[str, Stored]
    ignored: dict[str, str]
    facts: dict[str, object]
    origin: Path
    states: Callable[[], dict[str, object]]


@dataclass(frozen=True)
class _Chunk:
    """A box of tensor `key`, and the range of the file that holds its zip."""

    key: str
    dtype: torch.dtype
    offset: Shape
    shape: Shape
    file: str
    start: int
    length: int

    @property
    def where(self) -> str:
        return f"{self.file}: tensor {self.key!r} at {self.offset}"


def read_torch_dist(path: Path) -> TorchDist:
    """Read the directory of one iteration, or the latest one below `path`. No tensor is loaded.

    Raises UnsafeSourceError for a checkpoint that asks for code or for files elsewhere,
    CorruptSourceError for one that is damaged, SourceError for a format that is not read here.
    """
    root = iteration_dir(path)
    check_torch_dist(root)
    facts = read_facts(root)
    refuse_format(root, facts.get("ckpt_format"))
    metadata = _read_metadata(root / ".metadata")
    entries = fields_of(metadata, "Metadata").get("state_dict_metadata")
    if not isinstance(entries, dict):
        raise CorruptSourceError(f"{root}/.metadata: no table of tensors")
    places = _places(metadata, root)
    facts = facts or _common_state(metadata, root)
    ignored = {key: reason for key, entry in entries.items() if (reason := _ignored(key, entry))}
    kept = {key: entry for key, entry in entries.items() if key not in ignored}
    states = partial(module_states, metadata, root)
    return TorchDist(_tensors(root, kept, places), ignored, facts, root, states)


def _read_metadata(path: Path) -> object:
    size = path.stat().st_size
    if size > MAX_PICKLE_BYTES:
        raise CorruptSourceError(f"{path}: {size} bytes; at most {MAX_PICKLE_BYTES} are read")
    return load_pickle(path.read_bytes(), str(path))


def _ignored(key: object, entry: object) -> str | None:
    if not isinstance(key, str):
        raise CorruptSourceError(f".metadata: a key is {key!r}, not a string")
    for pattern, reason in _IGNORED:
        if pattern.search(key):
            return reason
    is_bytes = isinstance(entry, Inert) and entry.path.endswith(".BytesStorageMetadata")
    return "an object, not a tensor" if is_bytes else None


def _places(metadata: object, root: Path) -> dict[tuple[str, Shape], object]:
    """(key, chunk offset) → its storage entry, for all tensor chunks."""
    table = fields_of(metadata, "Metadata").get("storage_data")
    if not isinstance(table, dict):
        raise CorruptSourceError(f"{root}/.metadata: no table of storage")
    places: dict[tuple[str, Shape], object] = {}
    for index, entry in table.items():
        fields = fields_of(index, "MetadataIndex")
        if fields.get("offset") is None:
            continue
        place = (str(fields.get("fqn")), _sizes(fields["offset"]))
        if place in places:
            raise CorruptSourceError(f".metadata: two storage entries for {place[0]!r} {place[1]}")
        places[place] = entry
    return places


def _common_state(metadata: object, root: Path) -> dict[str, object]:
    """The run's arguments where Megatron-Core 0.19 and later keeps them: in a byte entry."""
    for key, path, window in byte_entries(metadata, root):
        if key.partition("/")[0] == "common_state":
            saved = read_saved_object(window, f"{path}: {key}")
            # A list with the state of each rank that saved.
            return namespace(saved[0] if isinstance(saved, list) and saved else saved, "args")
    return {}


def _sizes(value: object) -> Shape:
    if isinstance(value, tuple | list) and all(type(size) is int for size in value):
        return tuple(value)
    raise CorruptSourceError(f".metadata: {value!r} is not a shape")


def _tensors(
    root: Path, entries: dict[str, Any], places: dict[tuple[str, Shape], object]
) -> dict[str, Stored]:
    shapes: dict[str, tuple[Shape, torch.dtype]] = {}
    chunks: list[_Chunk] = []
    for key, entry in entries.items():
        fields = fields_of(entry, "TensorStorageMetadata")
        shape, dtype = _sizes(fields.get("size")), _dtype(key, fields.get("properties"))
        boxes = [_box(chunk) for chunk in fields.get("chunks") or ()]
        check_tiling(key, shape, boxes)
        shapes[key] = shape, dtype
        chunks += [_chunk(key, dtype, box, places) for box in boxes if math.prod(box[1])]
    pieces = _locate(root, chunks)
    return {key: Stored(key, *shapes[key], tuple(pieces[key])) for key in entries}


def _dtype(key: str, properties: object) -> torch.dtype:
    state = properties.state if isinstance(properties, Inert) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if isinstance(dtype, torch.dtype) and dtype in READABLE_DTYPES:
        return dtype
    raise SourceError(f"tensor {key!r}: dtype {dtype!r} is not one that is converted")


def _box(chunk: object) -> tuple[Shape, Shape]:
    fields = fields_of(chunk, "ChunkStorageMetadata")
    return _sizes(fields.get("offsets")), _sizes(fields.get("sizes"))


def _chunk(
    key: str, dtype: torch.dtype, box: tuple[Shape, Shape], places: dict[tuple[str, Shape], object]
) -> _Chunk:
    place = places.get((key, box[0]))
    if isinstance(place, Inert) and place.path.endswith("._HFStorageInfo"):
        raise SourceError(f"tensor {key!r}: written as Hugging Face safetensors; read it as such")
    if place is None:
        raise CorruptSourceError(f"tensor {key!r}: no storage entry for its chunk at {box[0]}")
    file, start, length = range_of(key, place)
    return _Chunk(key, dtype, *box, file, start, length)


def _locate(root: Path, chunks: Iterable[_Chunk]) -> dict[str, list[Piece]]:
    """Find every chunk's payload, file by file, so that one file is open at a time."""
    by_file: dict[str, list[_Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_file[chunk.file].append(chunk)
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for name, group in by_file.items():
        path = path_inside(root, name, group[0].key)
        fd = os.open(path, os.O_RDONLY)
        try:
            for chunk in sorted(group, key=lambda chunk: chunk.start):
                pieces[chunk.key].append(_piece(chunk, path, fd))
        finally:
            os.close(fd)
    return pieces


def _piece(chunk: _Chunk, path: Path, fd: int) -> Piece:
    check_range(fd, chunk.start, chunk.length, chunk.where)
    found = find_payload(Window(fd, chunk.start, chunk.length), chunk.where)
    nbytes, tensor = math.prod(chunk.shape) * chunk.dtype.itemsize, found.tensor
    if found.size != nbytes or tensor.storage_bytes != nbytes:
        raise CorruptSourceError(f"{chunk.where}: {found.size} bytes of data, expected {nbytes}")
    if tensor.dtype != chunk.dtype or _squeezed(tensor.shape) != _squeezed(chunk.shape):
        raise CorruptSourceError(
            f"{chunk.where}: holds {tensor.dtype} {tensor.shape}, "
            f"the metadata says {chunk.dtype} {chunk.shape}"
        )
    if not tensor.plain:
        raise SourceError(f"{chunk.where}: saved with strides {tensor.stride}, not contiguous")
    data = FileRange(path, chunk.start + found.offset, nbytes, found.crc)
    return Piece(chunk.offset, chunk.shape, data)


def _squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
