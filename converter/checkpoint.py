"""Writing a checkpoint: file images, a partial directory, a manifest, one rename.

A safetensors file (format: u64 header length, JSON header padded with spaces to 8, then the data
without holes) is known completely from the plan, so the header goes first and every tensor is
written at its place as it becomes ready. Nothing is written through a mapping: a disk that fills
up is then an error and not a signal.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from .errors import OutputError, VerificationError
from .plan import Planned

MANIFEST = "fuseport-manifest.json"
_BLOCK = 16 << 20
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


@dataclass
class Writer:
    """Fills the files of one partial directory and remembers digests."""

    directory: Path
    images: Mapping[int, FileImage]
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    _files: dict[int, int] = field(default_factory=dict)

    def open(self) -> None:
        """Create every file with its header and its full length."""
        for rank, image in self.images.items():
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            handle = os.open(self.directory / image.name, flags, 0o644)
            self._files[rank] = handle
            self.digests[image.name] = {}
            _write_all(handle, image.header, 0)
            os.ftruncate(handle, image.nbytes)

    def write(self, rank: int, name: str, tensor: torch.Tensor) -> None:
        """Put a finished tensor (contiguous, on the CPU) into its place."""
        image = self.images[rank]
        data = raw_bytes(tensor)
        _write_all(self._files[rank], data, image.offsets[name])
        self.digests[image.name][name] = xxhash.xxh3_128_hexdigest(data)

    def finish(self) -> None:
        """Flush everything to the disk."""
        for handle in self._files.values():
            os.fsync(handle)

    def close(self) -> None:
        """Close the files."""
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes, in row-major order; not copied if it is contiguous."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _write_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view[:_BLOCK], offset)
        view, offset = view[done:], offset + done


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def write_json(path: Path, values: object) -> None:
    """Write JSON that a person can read, and flush it to the disk."""
    with path.open("w") as stream:
        json.dump(values, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def copy_assets(source: Path, out: Path, names: Collection[str]) -> None:
    """Copy those of a directory's files that are known by name.

    Raises:
        OutputError: there are none, or one is no regular file.
    """
    found = [name for name in sorted(names) if os.path.lexists(source / name)]
    if not found:
        known = ", ".join(sorted(names)) or "none for this target"
        raise OutputError(f"{source} has no file to copy; known names: {known}")
    for name in found:
        if not (source / name).is_file():
            raise OutputError(f"{source / name} is not a regular file; leave it out")
        shutil.copyfile(source / name, out / name)


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


def keep_apart(source: Path, out: Path) -> None:
    """Raise OutputError if the result would lie within the source, or hold it."""
    origin, target = source.resolve(), out.resolve()
    # A run's directory is looked through for its iterations.
    iteration = target.parent == origin.parent and target.name.startswith("iter_")
    if iteration or target.is_relative_to(origin) or origin.is_relative_to(target):
        raise OutputError(
            f"{out} would lie among the source's files in {source}; choose another directory"
        )


@contextmanager
def publish(out: Path, *, overwrite: bool, needed: int) -> Iterator[Path]:
    """A partial directory beside `out` that becomes `out` if the block ends well.

    Otherwise it is removed, and what `out` was stays.

    Raises:
        OutputError: `out` exists (and `overwrite` is off, or it holds what was not written here),
            cannot be written, or its file system has less than `needed` bytes free.
    """
    out = Path(os.path.abspath(out))
    partial = out.parent / f"{out.name}.partial-{secrets.token_hex(4)}"
    try:
        _check_destination(out, overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_space(out.parent, needed)
        partial.mkdir()
        yield partial
        _replace(partial, out, overwrite)
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror or error}; nothing was kept"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_destination(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise OutputError(f"{out} is a file or a link; expected a directory to create")
    if not overwrite:
        raise OutputError(f"{out} exists; choose another directory, or give --overwrite")
    # Replacing deletes: a source, or a home directory, must survive a slip of the keyboard.
    if not (out / MANIFEST).is_file() or any(entry.is_dir() for entry in out.iterdir()):
        raise OutputError(
            f"{out} is not just a converted checkpoint (it has no {MANIFEST}, or has directories), "
            f"so --overwrite does not replace it; choose another directory, or remove it yourself"
        )


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OutputError(
            f"{directory} has {free / 1e9:.2f} GB free, but the result takes {needed / 1e9:.2f} GB"
        )


def _replace(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename into place; an old directory steps aside first, and comes back if that fails.

    A directory that another process put there in the meantime is an OSError.
    """
    _sync_directory(partial)
    old = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
    try:
        if overwrite and out.exists():
            out.rename(old)
        partial.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    _sync_directory(out.parent)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
