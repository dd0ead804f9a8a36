"""What a source's files look like from outside: enough to notice that one was changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import CorruptSourceError

# Of each file: bytes, time of the last change in ns, inode.
Fingerprint = Mapping[str, list[int]]


def fingerprint(origin: Path) -> Fingerprint:
    """Every file of a source's directory and of the directories in it, by name.

    Raises:
        CorruptSourceError: a file went away.
    """
    if not origin.is_dir():
        return {}
    try:
        found = [one for one in origin.iterdir() if one.is_file()]
        inner = [one for one in origin.iterdir() if one.is_dir() and not one.name.startswith(".")]
        found += [one for folder in inner for one in folder.iterdir() if one.is_file()]
        return {one.relative_to(origin).as_posix(): _look(one) for one in sorted(found)}
    except OSError as error:
        raise CorruptSourceError(f"{origin} changed while it was looked at: {error}") from error


def _look(path: Path) -> list[int]:
    # Through links: a hub's cache keeps the bytes elsewhere.
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def check_unchanged(origin: Path, before: Fingerprint) -> None:
    """Raise CorruptSourceError if a file changed, went away or came since `before`."""
    now = fingerprint(origin)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise CorruptSourceError(
                f"{origin / name} changed during the conversion: bytes, time and inode were "
                f"{before.get(name)}, now {now.get(name)}; convert again once nobody writes it"
            )
