"""Where a torch_dist checkpoint's entries lie, checked, and those that are no tensor's chunks.

An entry of Transformer Engine's module states has the key that Megatron-Core's `ShardedObject`
makes: `{key}/shard_{offsets}_{shape}`, offsets and shape joined by dots.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from ..errors import CorruptSourceError, SourceError, UnsafeSourceError
from .safe_pickle import Inert
from .te_state import MAX_STATE_BYTES
from .torch_zip import Window

_BYTES = re.compile(r"^common_state(?:/|$)|_extra_state/")
# A module's state: what goes before the layers' numbers, whether they are in the key, the rest.
_STATE = re.compile(r"(decoder\.layers\.)((?=\d))?(.+\._extra_state)/shard_(\d[\d.]*)_\d[\d.]*")


def fields_of(value: object, kind: str) -> dict[str, Any]:
    """The fields of one of the metadata's classes."""
    if isinstance(value, Inert) and value.path.rpartition(".")[2] == kind:
        return value.fields
    raise CorruptSourceError(f".metadata: expected {kind}, found {value!r}")


def byte_entries(metadata: object, root: Path) -> Iterator[tuple[str, Path, Window]]:
    """Every entry that is no chunk of a tensor: its key, and the bytes of its file."""
    for index, place in fields_of(metadata, "Metadata")["storage_data"].items():
        fields = fields_of(index, "MetadataIndex")
        key = str(fields.get("fqn"))
        if fields.get("offset") is not None or not _BYTES.search(key):
            continue
        file, start, length = range_of(key, place)
        path = path_inside(root, file, key)
        with path.open("rb") as shard:
            check_range(shard.fileno(), start, length, f"{file}: {key}")
            yield key, path, Window(shard.fileno(), start, length)


def module_states(metadata: object, root: Path) -> dict[str, object]:
    """Transformer Engine's module states as bytes, by Megatron-Core's in-memory names.

    Raises:
        CorruptSourceError: one is larger than any is.
    """
    found: dict[str, object] = {}
    for key, _, window in byte_entries(metadata, root):
        match = _STATE.fullmatch(key)
        if match is not None:
            found[_state_name(match)] = window.read(MAX_STATE_BYTES + 1)
    return found


def _state_name(match: re.Match[str]) -> str:
    """A stacked key's first offset is the layer; one behind it, or alone, is the expert."""
    before, stacked, behind, offsets = match.groups()
    numbers = offsets.split(".")
    layer = f"{numbers.pop(0)}." if stacked is None else ""
    expert = int(numbers[0]) if numbers else 0
    return f"{before}{layer}{behind}{expert or ''}"


def range_of(key: str, place: object) -> tuple[str, int, int]:
    """File, first byte and length of a storage entry."""
    info = fields_of(place, "_StorageInfo")
    if info.get("transform_descriptors"):
        raise SourceError(f"tensor {key!r}: stored through {info['transform_descriptors']!r}")
    file, start, length = (info.get(name) for name in ("relative_path", "offset", "length"))
    if type(file) is not str or type(start) is not int or type(length) is not int:
        raise CorruptSourceError(f"tensor {key!r}: its storage entry is {info!r}")
    return file, start, length


def path_inside(root: Path, name: str, key: str) -> Path:
    """The real path of a shard file; it must be a regular file below the real `root`."""
    pure, base = PurePath(name), Path(os.path.realpath(root))
    path = Path(os.path.realpath(base / name)) if "\0" not in name else Path("/")
    if pure.is_absolute() or ".." in pure.parts or not path.is_relative_to(base):
        raise UnsafeSourceError(
            f"{root}: tensor {key!r} points to {name!r}, outside the checkpoint's directory"
        )
    if pure.suffix == ".safetensors":
        raise SourceError(f"{root}: {name!r} is a safetensors file; save again with torch_save")
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise CorruptSourceError(
            f"{path}: missing, and {key!r} lies in it; copy the checkpoint completely"
        )
    return path


def check_range(fd: int, start: int, length: int, where: str) -> None:
    """Raise CorruptSourceError if a range is not within its file."""
    size = os.fstat(fd).st_size
    if start < 0 or length < 1 or start + length > size:
        raise CorruptSourceError(f"{where}: bytes {start}+{length} of a file of {size}: truncated?")
