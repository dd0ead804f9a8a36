"""Large torch_dist checkpoints that take little disk: their weights are holes, and a few values.

Each chunk's zip is written as torch writes it, with its payload left out: the file system keeps a
hole there, which reads as zeros. Some bytes of each chunk are then set, so that amaxes, and
digests, are those of weights.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from .tiny import FACTS, ITERATION

Shape = tuple[int, ...]
ZEROS = bytes(4 << 20)
# The first values of each chunk.
VALUES = bytes(torch.arange(1 << 14).remainder(251).mul(0.01).to(torch.bfloat16).view(torch.uint8))


def write_sparse(
    directory: Path, *, hidden: int, ffn: int, layers: int, vocab: int, groups: int = 8
) -> Path:
    """A Llama in bf16, heads of 128; each layer of a stack is a chunk of its own."""
    iteration = directory / ITERATION
    iteration.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("1")
    heads = hidden // 128
    facts = FACTS | {
        "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn,
        "num_attention_heads": heads, "num_query_groups": groups, "kv_channels": 128,
        "vocab_size": vocab,
    }  # fmt: skip
    torch.save({"args": argparse.Namespace(**facts)}, iteration / "common.pt")
    (iteration / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    shapes: dict[str, Shape] = {
        "embedding.word_embeddings.weight": (vocab, hidden),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        "decoder.layers.self_attention.linear_qkv.weight": (
            layers, (heads + 2 * groups) * 128, hidden,
        ),
        "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, heads * 128),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        "decoder.layers.mlp.linear_fc1.weight": (layers, 2 * ffn, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, ffn),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocab, hidden),
    }  # fmt: skip
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    with (iteration / "__0_0.distcp").open("wb") as file:
        for name, shape in shapes.items():
            boxes = _boxes(shape)
            chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
            properties = TensorProperties(dtype=torch.bfloat16)
            entries[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
            for index, (offset, box) in enumerate(boxes):
                start, length = _write_chunk(file, box)
                key = MetadataIndex(name, torch.Size(offset), index)
                storage[key] = _StorageInfo("__0_0.distcp", start, length)
    metadata = Metadata(entries, storage_data=storage)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    return directory


def _boxes(shape: Shape) -> list[tuple[Shape, Shape]]:
    if len(shape) < 3:
        return [((0,) * len(shape), shape)]
    return [((i, *[0] * (len(shape) - 1)), (1, *shape[1:])) for i in range(shape[0])]


class _Holes:
    """A file's rest as a file of its own, which skips zeros instead of writing them.

    Offsets count from where it begins, as they do in torch's zips.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()

    def write(self, data: bytes) -> int:
        if len(data) > 4096 and data == ZEROS[: len(data)]:
            self._file.seek(len(data), os.SEEK_CUR)
            return len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        first = self._start if whence == os.SEEK_SET else 0
        return self._file.seek(first + offset, whence) - self._start

    def flush(self) -> None:
        self._file.flush()


class _Described:
    """Pickles as torch describes a tensor."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.shape, device="meta").stride()
        hooks: OrderedDict[str, object] = OrderedDict()
        arguments = (_Storage(self.shape), 0, self.shape, strides, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _Storage:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        if isinstance(obj, _Storage):
            return "storage", torch.BFloat16Storage, "0", "cpu", math.prod(obj.shape)
        return None


def _write_chunk(file: IO[bytes], shape: Shape) -> tuple[int, int]:
    """Append the zip of a tensor; (first byte, length)."""
    start = file.seek(0, os.SEEK_END)
    description = io.BytesIO()
    _Pickler(description, protocol=2).dump(_Described(shape))
    nbytes = math.prod(shape) * 2
    with zipfile.ZipFile(cast("IO[bytes]", _Holes(file)), "w") as archive:
        archive.writestr("archive/data.pkl", description.getvalue())
        archive.writestr("archive/byteorder", b"little")
        with archive.open("archive/data/0", "w", force_zip64=nbytes >= 1 << 32) as record:
            record.write(VALUES[:nbytes])
            left = nbytes - min(len(VALUES), nbytes)
            while left >= len(ZEROS):
                record.write(ZEROS)
                left -= len(ZEROS)
            record.write(bytes(left))
        archive.writestr("archive/version", b"3\n")
    return start, file.seek(0, os.SEEK_END) - start
