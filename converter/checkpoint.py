"""The files of a checkpoint: images of safetensors files, digests, JSON.

A safetensors file (format: u64 header length, JSON header padded with spaces to 8, then the data
without holes) is known completely from the plan, so every tensor is written at its place as it
becomes ready. Nothing is written through a mapping: a disk that fills up is then an error and not
a signal.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from .errors import OutputError, VerificationError
from .limits import threads
from .plan import Planned

MANIFEST = "fuseport-manifest.json"
WEIGHTS = ".safetensors"
BLOCK = 8 << 20
# The format's own limit.
MAX_HEADER_BYTES = 100_000_000
# Larger than any that is written; a file that claims to be one must not fill the memory.
MAX_JSON_BYTES = 1 << 30

# safetensors' names of the dtypes.
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class FileImage:
    """One safetensors file: its header's bytes, and where each tensor's data begins."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


def lay_out(name: str, tensors: list[Planned], metadata: Mapping[str, str]) -> FileImage:
    """The image of a file that holds `tensors`, the ones with wide elements first.

    That order keeps every tensor aligned to its own elements.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for planned in sorted(tensors, key=lambda one: (-one.dst.element_size(), one.name)):
        starts[planned.name] = end
        end += planned.nbytes
        entries[planned.name] = {
            "dtype": DTYPE_NAMES[planned.dst.dtype],
            "shape": list(planned.dst.shape),
            "data_offsets": [starts[planned.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {key: len(header) + start for key, start in starts.items()}
    return FileImage(name, header, offsets, len(header) + end)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes, in row-major order; not copied if it is contiguous."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def write_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`."""
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view[:BLOCK], offset)
        view, offset = view[done:], offset + done


def file_digest(path: Path) -> str:
    """A file's digest: xxh3_128 of its bytes; of a safetensors file, see `file_digest_of`.

    A damaged safetensors file has the digest of its bytes, which is another one.
    """
    if path.suffix == WEIGHTS:
        try:
            image = read_image(path)
        except VerificationError:
            return _plain_digest(path)
        return file_digest_of(image, tensor_digests(path, image))
    return _plain_digest(path)


def _plain_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def file_digest_of(image: FileImage, tensors: Mapping[str, str]) -> str:
    """xxh3_128 of a safetensors file's header and, in the data's order, its tensors' digests.

    It says as much as a digest of all bytes, and needs none of them twice.
    """
    digest = xxhash.xxh3_128(image.header)
    for name in sorted(image.offsets, key=lambda one: (image.offsets[one], one)):
        digest.update(bytes.fromhex(tensors[name]))
    return digest.hexdigest()


def read_image(path: Path) -> FileImage:
    """The image of a safetensors file on disk.

    Raises:
        VerificationError: it has no whole header, or the file is not as long as that says.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            size = min(int.from_bytes(start, "little"), MAX_HEADER_BYTES)
            header = start + stream.read(size)
            entries = {k: v for k, v in json.loads(header[8:]).items() if k != "__metadata__"}
            spans = {name: entry["data_offsets"] for name, entry in entries.items()}
            end = max((stop for _, stop in spans.values()), default=0)
            actual = os.fstat(stream.fileno()).st_size
        offsets = {name: len(header) + start for name, (start, _) in spans.items()}
        if len(header) + end != actual:
            raise ValueError(f"{actual} bytes, expected {len(header) + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VerificationError(f"{path} is damaged: {error}; convert again") from error
    return FileImage(path.name, header, offsets, actual)


def tensor_digests(
    path: Path, image: FileImage, progress: Callable[[int], None] = lambda nbytes: None
) -> dict[str, str]:
    """xxh3_128 of each tensor's bytes in a file, read by several threads."""
    order = sorted(image.offsets, key=lambda one: image.offsets[one])
    ends = [image.offsets[name] for name in order[1:]] + [image.nbytes]
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with ThreadPoolExecutor(threads()) as pool:
            spans = ((image.offsets[n], end) for n, end in zip(order, ends, strict=True))
            found = pool.map(lambda span: _range_digest(handle, span[0], span[1], progress), spans)
            return dict(zip(order, found, strict=True))
    finally:
        os.close(handle)


def _range_digest(handle: int, start: int, stop: int, progress: Callable[[int], None]) -> str:
    digest = xxhash.xxh3_128()
    buffer = bytearray(min(BLOCK, max(stop - start, 0)))
    while start < stop:
        count = os.preadv(handle, [memoryview(buffer)[: stop - start]], start)
        if not count:
            break
        digest.update(memoryview(buffer)[:count])
        start += count
        progress(count)
    return digest.hexdigest()


def write_json(path: Path, values: object, *, durable: bool = True) -> None:
    """Write JSON that a person can read, and if it is to be durable bring it to the disk."""
    with path.open("w") as stream:
        json.dump(values, stream, indent=2)
        stream.write("\n")
        stream.flush()
        if durable:
            os.fsync(stream.fileno())


def copy_assets(source: Path, out: Path, names: Collection[str]) -> None:
    """Copy those of a directory's files that are known by name.

    Raises:
        OutputError: there are none, or one is no regular file.
    """
    found = [name for name in sorted(names) if os.path.lexists(source / name)]
    if not found:
        known = ", ".join(sorted(names)) or "none for this target"
        raise OutputError(
            f"assets {source}: no directory with a file to copy; known names: {known}"
        )
    for name in found:
        if not (source / name).is_file():
            raise OutputError(f"{source / name} is not a regular file; leave it out")
        shutil.copyfile(source / name, out / name)
        sync(out / name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        VerificationError: it is not there, or holds something else.
    """
    try:
        with path.open("rb") as stream:
            values = json.loads(stream.read(MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise VerificationError(
            f"{path} cannot be read ({error}); expected a directory that fuseport converted"
        ) from error
    if not isinstance(values, dict):
        raise VerificationError(f"{path} does not hold a JSON object; convert again")
    return values


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
