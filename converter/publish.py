"""A directory that appears whole or not at all, and a run that goes on after a kill.

Files grow in `OUT.partial-<id>`. Its folder `.fuseport` says what is being made, and which files
are finished; a lock shows that a run is alive. When all is there the folder goes, and a rename
makes it OUT. An old OUT is exchanged in one step where the system can do that. Elsewhere it steps
aside as `OUT.old-<id>`, and the next run puts it back if a kill came between.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import MANIFEST, file_digest, read_json, sync, write_json
from .errors import OutputError, VerificationError
from .writer import FileResult

_NOTES, _RUN = ".fuseport", "run.json"
# Seconds in which processes that were told to end have done so.
_ENDING = 5.0
# Linux's flag of renameat2, and its "relative to the working directory".
_EXCHANGE, _AT_FDCWD = 2, -100

Identity = Mapping[str, object]


@dataclass(frozen=True)
class Partial:
    """A directory that is being filled; `finished` are files of an earlier run, by name."""

    path: Path
    finished: Mapping[str, FileResult]

    def record(self, name: str, result: FileResult) -> None:
        """Note that a file is on the disk."""
        notes = self.path / _NOTES
        write_json(notes / f"{name}.new", dataclasses.asdict(result))
        (notes / f"{name}.new").rename(notes / f"{name}.json")
        sync(notes)


@contextmanager
def publish(
    out: Path,
    identity: Identity,
    *,
    needed: int,
    overwrite: bool = False,
    resume: bool = False,
    durable: bool = True,
) -> Iterator[Partial]:
    """A partial directory beside `out` that becomes `out` if the block ends well.

    Otherwise it is removed, or kept if `resume` is on, and what `out` was stays.

    Args:
        out: the directory to make.
        identity: everything that decides on the result; plain values for JSON.
        needed: bytes of the result.
        overwrite: replace `out`.
        resume: go on with what a killed run left.
        durable: False leaves fsync out, for benchmarks.

    Raises:
        OutputError: `out` exists (and `overwrite` is off, or it holds what was not written here),
            cannot be written, or its file system has less than `needed` bytes free; what is to be
            resumed was begun from something else.
    """
    out = Path(os.path.abspath(out))
    try:
        recover(out)
        _check_destination(out, overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _begin(out, identity, resume, durable) as partial:
            done = sum(result.nbytes for result in partial.finished.values())
            _check_space(out.parent, needed - done)
            yield partial
            shutil.rmtree(partial.path / _NOTES)
            _replace(partial.path, out, overwrite, durable)
    except OSError as error:
        kept = "what was finished is kept for resume (--resume)" if resume else "nothing was kept"
        raise OutputError(f"cannot write {out}: {error.strerror or error}; {kept}") from error


def recover(out: Path) -> None:
    """Mend what a kill between two renames left, and remove what had been replaced."""
    for old in _beside(out, "old"):
        if (old / MANIFEST).is_file() and not os.path.lexists(out):
            old.rename(out)
    for kind in ("old", "partial"):
        for one in _beside(out, kind):
            # Whole, but not in its place: exchanged, or about to be renamed by a living run.
            if (one / MANIFEST).is_file() and not (one / _NOTES).is_dir():
                _remove(one)


def _remove(directory: Path) -> None:
    """Remove what no living run holds."""
    if (handle := _locked(directory)) is not None:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(handle)


@contextmanager
def _begin(out: Path, identity: Identity, resume: bool, durable: bool) -> Iterator[Partial]:
    left = [one for one in _beside(out, "partial") if (one / _NOTES / _RUN).is_file()]
    path = _to_resume(left, identity) if resume else None
    if not resume:
        for one in left:
            _remove(one)
    is_new = path is None
    if path is None:
        path = out.parent / f"{out.name}.partial-{secrets.token_hex(4)}"
        path.mkdir()
    handle = _locked(path)
    if handle is None:
        raise OutputError(f"{path} is being written by another run; wait for it")
    try:
        if is_new:
            (path / _NOTES).mkdir()
            write_json(path / _NOTES / _RUN, identity, durable=durable)
        yield Partial(path, _finished(path))
    finally:
        if not resume:
            _clear(path)
        os.close(handle)


def _clear(directory: Path) -> None:
    """Remove a directory in which other processes may still begin a file before they end."""
    deadline = time.monotonic() + _ENDING
    shutil.rmtree(directory, ignore_errors=True)
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
        shutil.rmtree(directory, ignore_errors=True)


def _beside(out: Path, kind: str) -> list[Path]:
    """Directories that an earlier run, or one that is alive, made beside `out`."""
    found = sorted(out.parent.glob(f"{glob.escape(out.name)}.{kind}-*"))
    return [one for one in found if one.is_dir() and not one.is_symlink()]


def _locked(directory: Path) -> int | None:
    """A descriptor that holds a directory's lock; None while a living run holds it.

    The lock is on the directory itself, so it stays through a rename.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        # Some network file systems have no locks.
        return handle
    return handle


def _to_resume(left: list[Path], identity: Identity) -> Path | None:
    """The directory of the same run.

    Raises:
        OutputError: there are only others; says what differs.
    """
    differing: list[str] = []
    for one in left:
        found = _read_notes(one / _NOTES / _RUN)
        if found == identity:
            return one
        names = {*found, *identity}
        differing = sorted(n for n in names if found.get(n) != identity.get(n))
    if differing:
        raise OutputError(
            f"{left[-1]} was begun with another {', '.join(differing)}; leave out "
            f"resume (--resume) to start anew"
        )
    return None


def _read_notes(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except VerificationError:
        return {}


def _finished(path: Path) -> dict[str, FileResult]:
    """The files that are noted as finished and are still whole; others are removed."""
    whole: dict[str, FileResult] = {}
    for file in sorted(one for one in path.iterdir() if one.is_file()):
        note = _read_notes(path / _NOTES / f"{file.name}.json")
        try:
            result = FileResult(**note)
        except TypeError:
            result = FileResult(-1)
        if result.nbytes == file.stat().st_size and result.digest == file_digest(file):
            whole[file.name] = result
        else:
            file.unlink()
    return whole


def keep_apart(source: Path, out: Path) -> None:
    """Raise OutputError if the result would lie within the source, or hold it."""
    origin, target = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    # A run's directory is looked through for its iterations.
    iteration = target.parent == origin.parent and target.name.startswith("iter_")
    if iteration or target.is_relative_to(origin) or origin.is_relative_to(target):
        raise OutputError(
            f"{out} would lie among the source's files in {source}; choose another directory"
        )


def check_output(out: Path, overwrite: bool, needed: int) -> None:
    """Raise OutputError if `out` is in the way, or its place is full or not writable."""
    _check_destination(out, overwrite)
    place = next(one for one in out.parents if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {out}: {place} is not a directory that can be written")
    _check_space(place, needed)


def _check_destination(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise OutputError(f"{out} is a file or a link; expected a directory to create")
    if not overwrite:
        raise OutputError(
            f"{out} exists; choose another directory, or give overwrite (--overwrite)"
        )
    # Replacing deletes: a source, or a home directory, must survive a slip of the keyboard.
    if not (out / MANIFEST).is_file() or any(entry.is_dir() for entry in out.iterdir()):
        raise OutputError(
            f"{out} is not just a converted checkpoint (it has no {MANIFEST}, or has directories), "
            f"so overwrite (--overwrite) does not replace it; choose another directory, or remove "
            f"it yourself"
        )


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OutputError(
            f"{directory} has {free / 1e9:.2f} GB free, but the result takes {needed / 1e9:.2f} GB"
        )


def _replace(partial: Path, out: Path, overwrite: bool, durable: bool) -> None:
    """Rename into place.

    A directory that another process put there in the meantime is an OSError.
    """
    if durable:
        sync(partial)
    old = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
    if not (overwrite and out.exists()):
        partial.rename(out)
    elif not _exchange(partial, out):
        _step_aside(partial, out, old)
    if durable:
        sync(out.parent)
    for replaced in (old, partial):
        shutil.rmtree(replaced, ignore_errors=True)


def _step_aside(partial: Path, out: Path, old: Path) -> None:
    """Two renames; the first is taken back if the second fails."""
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return int(call(*paths, _EXCHANGE)) == 0
