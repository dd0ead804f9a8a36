"""Unpickling that can only ever build data.

A pickle names callables and calls them: `torch.distributed.checkpoint` follows it blindly, so a
crafted `.metadata` runs code. Here a name resolves to a plain container, a dtype, or a fresh
`Inert` class that keeps what it was given and does nothing. No class of torch or Megatron is
imported or constructed, and the inert classes live as long as one load, so that a pickle that
sets attributes on them changes nothing outside. Any other name is an `UnsafeSourceError`.
"""

from __future__ import annotations

import collections
import io
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import CorruptSourceError, SourceError, UnsafeSourceError
from .pickle_guard import SMALL, end_of_pickle, try_in_child

MAX_PICKLE_BYTES = 256 * 2**20

_DCP = "torch.distributed.checkpoint"
_INERT_PATHS = frozenset(
    [f"{_DCP}.metadata.{name}" for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "MetadataIndex", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )]
    + [f"{_DCP}.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")]
    # Megatron keeps the save plans of all ranks in its metadata, for the next save.
    + [f"{_DCP}.planner.{name}" for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    )]
    # Written by the Hugging Face writer of torch; named so that the reader can say so.
    + [f"{_DCP}.{module}._HFStorageInfo" for module in ("_hf_utils", "hf_storage")]
    # The home of tensor properties before torch 2.3.
    + [f"torch.distributed._shard.sharded_tensor.metadata.{name}" for name in (
        "TensorProperties", "MEM_FORMAT_ENCODING",
    )]
    + [f"torch._utils.{name}" for name in (
        "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
    )]
    + [f"torch.{kind}Storage" for kind in (
        "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
    )]
    # A storage as plain pickle keeps it: the bytes of a torch.save file, which stay bytes here.
    + ["torch.storage._load_from_bytes"]
    + ["torch.storage.UntypedStorage", "torch.serialization._get_layout", "torch.device"]
    # Values found among training arguments and random number generator states.
    + ["argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "_codecs.encode",
       "_io.BytesIO", "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
       "numpy._core.multiarray._reconstruct", "pathlib.PosixPath", "pathlib.PurePosixPath",
       "pathlib._local.PosixPath"]
)  # fmt: skip
_INERT_PREFIXES = ("megatron.", "transformer_engine.", "transformer_engine_torch.")

_VALUES: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "torch.Size": torch.Size,
} | {f"torch.{name}": value for name, value in vars(torch).items() if type(value) is torch.dtype}

_STORAGE_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class Inert:
    """What a pickle wanted to build: the dotted `path` of its class, its arguments, its state."""

    path: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Keep the arguments; run nothing."""
        made = super().__new__(cls)
        made.args = args
        made.state = kwargs or None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.path}>"

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes the object would have; empty if its state is not a dict."""
        return self.state if isinstance(self.state, dict) else {}


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as `torch.save` describes it. Strides and offset are in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage_key: str
    storage_bytes: int

    @property
    def plain(self) -> bool:
        """Whether the storage's bytes are the tensor's elements, row-major, from the first."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return self.offset == 0


def inert_class(path: str, where: str) -> type[Inert]:
    """A new inert class for the dotted `path`; `UnsafeSourceError` unless it is a known one."""
    if path in _INERT_PATHS or path.startswith(_INERT_PREFIXES):
        return type(path.rpartition(".")[2], (Inert,), {"path": path})
    raise UnsafeSourceError(
        f"{where}: the pickle asks for {path!r}, which is neither checkpoint metadata, a dtype "
        "nor a plain container. Nothing was run. Don't load this file with other tools unless "
        "you trust its author."
    )


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._made: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Protocol 2, which torch.save writes, has Python 2's name for it.
        path = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if path in _VALUES:
            return _VALUES[path]
        if path not in self._made:
            self._made[path] = inert_class(path, self._where)
        return self._made[path]

    def persistent_load(self, pid: Any) -> Any:
        storage = type("storage", (Inert,), {"path": "storage"})
        return storage(*pid) if isinstance(pid, tuple) else storage(pid)


def load_pickle(data: bytes, where: str, limit: int = MAX_PICKLE_BYTES) -> Any:
    """The plain data in a pickle; `where` names the file in errors.

    Raises UnsafeSourceError for a name that is not allowed, CorruptSourceError for anything that
    is not a complete pickle of at most `limit` bytes.
    """
    if len(data) > limit:
        raise CorruptSourceError(f"{where}: a pickle of {len(data)} bytes; at most {limit} is read")
    if len(data) <= SMALL:
        end_of_pickle(data, where)
    else:
        try_in_child(_Unpickler(data, where).load, len(data), where)
    return _load(data, where)


def _load(data: bytes, where: str) -> Any:
    try:
        return _Unpickler(data, where).load()
    except SourceError:
        raise
    # A damaged pickle can raise nearly anything; all of it means the same to the caller.
    except Exception as error:
        raise CorruptSourceError(f"{where}: not a readable pickle ({error!r})") from error


def load_small_pickles(data: bytes, count: int, where: str) -> tuple[list[Any], int]:
    """`count` pickles one after the other, and the position after them.

    Each operation is looked at before it is run, so this is for pickles of few operations. Raises
    as `load_pickle` does.
    """
    values, start = [], 0
    for _ in range(count):
        stop = end_of_pickle(data[start:], where) + start
        values.append(_load(data[start:stop], where))
        start = stop
    return values, start


def pickled_tensor(value: object, where: str) -> PickledTensor:
    """Read an inert `torch.save` tensor; SourceError if `value` is something else."""
    try:
        return _describe(value)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{where}: {value!r} is not a plain dense tensor ({error!r})") from error


def _describe(value: Any) -> PickledTensor:
    kind = value.path.rpartition(".")[2]
    if kind == "_rebuild_parameter":
        return _describe(value.args[0])
    if kind not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        raise ValueError("unknown rebuild function")
    storage, offset, shape, stride = value.args[:4]
    _, storage_class, key, _, length = storage.args
    if kind == "_rebuild_tensor_v3":
        dtype, nbytes = value.args[6], int(length)
    else:
        dtype = _STORAGE_DTYPES[storage_class.path]
        nbytes = int(length) * dtype.itemsize
    sizes, strides = tuple(map(int, shape)), tuple(map(int, stride))
    if type(dtype) is not torch.dtype or len(sizes) != len(strides):
        raise ValueError("dtype or strides do not fit")
    return PickledTensor(dtype, sizes, strides, int(offset), str(key), nbytes)
