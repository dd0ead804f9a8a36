"""The header of a safetensors file, checked: every tensor located down to the byte, none read.

Format: u64 length of the header, the header as JSON, then the data; offsets count from the end
of the header, cover the file without holes and do not overlap
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import CorruptSourceError, SourceError, UnsafeSourceError, UnsupportedOptionError
from .stored import FileRange, Piece, Shape, Stored

# The format's own limit.
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    # Powers of two, which safetensors has two names for.
    "F8_E8M0": torch.uint8,
    "U8": torch.uint8,
}
# Known, but no weights that are converted.
NO_WEIGHTS = (
    "F64", "F8_E5M2", "F4", "F6_E2M3", "F6_E3M2", "C64",
    "I64", "I32", "I16", "I8", "U64", "U32", "U16", "BOOL",
)  # fmt: skip


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name.

    Raises:
        CorruptSourceError: the file is not one, or is damaged.
        SourceError: it has a dtype that is not known.
        UnsupportedOptionError: it has a dtype whose weights are not converted.
    """
    entries, start, size = _entries(path)
    entries.pop("__metadata__", None)
    found: dict[str, Stored] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        begin, end, shape, kind = _entry(path, name, entry)
        dtype = _dtype(path, name, kind)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CorruptSourceError(
                f"{path}: tensor {name!r} takes {end - begin} bytes, expected "
                f"{math.prod(shape) * dtype.itemsize} for {list(shape)} of {kind}"
            )
        ranges.append((begin, end, name))
        piece = Piece((0,) * len(shape), shape, FileRange(path, start + begin))
        found[name] = Stored(name, shape, dtype, (piece,))
    _check_cover(path, ranges, size - start)
    return found


def _entries(path: Path) -> tuple[dict[str, object], int, int]:
    """The header's entries, where the data begins, and the file's size."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise CorruptSourceError(
                f"{path}: a header of {length} bytes in a file of {size}; expected at most "
                f"{MAX_HEADER_BYTES}, and a whole safetensors file: truncated?"
            )
        return parse_json(stream.read(length), path), 8 + length, size


def parse_json(text: bytes, path: Path) -> dict[str, object]:
    """A JSON object.

    Raises:
        CorruptSourceError: it is something else, or has one key twice.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptSourceError(f"{path}: no readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorruptSourceError(f"{path}: expected a JSON object")
    return values


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def _entry(path: Path, name: str, entry: object) -> tuple[int, int, Shape, object]:
    if isinstance(entry, dict):
        shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
        if shape is not None and offsets and len(offsets) == 2 and offsets[0] <= offsets[1]:
            return offsets[0], offsets[1], shape, entry.get("dtype")
    raise CorruptSourceError(f"{path}: tensor {name!r} has no sensible dtype, shape and offsets")


def _sizes(value: object) -> Shape | None:
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value):
        return tuple(value)
    return None


def _dtype(path: Path, name: str, kind: object) -> torch.dtype:
    if not isinstance(kind, str):
        raise SourceError(f"{path}: tensor {name!r} has dtype {kind!r}, which is not known")
    if kind in NO_WEIGHTS:
        raise UnsupportedOptionError(
            f"{path}: tensor {name!r} is {kind}, but weights are read from {', '.join(DTYPES)} only"
        )
    if kind not in DTYPES:
        raise SourceError(f"{path}: tensor {name!r} has dtype {kind!r}, which is not known")
    return DTYPES[kind]


def _check_cover(path: Path, ranges: list[tuple[int, int, str]], size: int) -> None:
    end = 0
    for begin, stop, name in sorted(ranges):
        if begin != end:
            what = "overlaps the one before" if begin < end else "leaves a hole before it"
            raise CorruptSourceError(f"{path}: tensor {name!r} {what}, at byte {begin}")
        end = stop
    if end != size:
        raise CorruptSourceError(
            f"{path}: {size} bytes of data, its header describes {end}: truncated?"
        )


def regular_file(root: Path, name: str) -> Path:
    """A file of the directory `root`, by its bare name; a link must end at a regular file.

    Hub caches keep links to blobs outside of the snapshot's directory, so links are followed.

    Raises:
        UnsafeSourceError: the name leaves the directory.
        CorruptSourceError: it is missing, or no regular file.
    """
    if not name or name in (".", "..") or "\0" in name or Path(name).name != name:
        raise UnsafeSourceError(f"{root}: points to {name!r}, outside the checkpoint's directory")
    path = root / name
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise CorruptSourceError(f"{path} is missing; copy the checkpoint completely")
    return path


def read_object(path: Path) -> dict[str, object]:
    """The object in a JSON file of a checkpoint."""
    with path.open("rb") as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise CorruptSourceError(f"{path}: more than {MAX_JSON_BYTES} bytes")
    return parse_json(text, path)


def names_of(index: dict[str, object], path: Path) -> Iterator[tuple[str, str]]:
    """(tensor, file) of an index's `weight_map`."""
    table = index.get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise CorruptSourceError(f"{path}: no weight_map from tensors to files")
    yield from table.items()
