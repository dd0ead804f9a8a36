"""A disk that is really full: a small tmpfs, where it can be mounted."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuseport_testing.tiny import write_tiny

from fuseport.converter import Recipe, convert_checkpoint, publish, verify_checkpoint
from fuseport.converter.errors import OutputError

SMALL, LARGE = "size=16k", "size=4m"
RECIPE = Recipe(tp_size=2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB, which the tiny model does not fit."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", SMALL, "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs can be mounted by root alone")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "source")


def unlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the space had gone since it was looked at."""
    monkeypatch.setattr(publish, "_check_space", lambda directory, needed: None)


def test_the_space_is_looked_at_first(disk: Path, source: Path) -> None:
    with pytest.raises(OutputError, match=r"GB free, but the result takes"):
        convert_checkpoint(source, disk / "out", RECIPE)
    assert os.listdir(disk) == []


@pytest.mark.parametrize("reserves", [True, False])
def test_a_disk_that_fills_up(
    reserves: bool, disk: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a file's space is reserved; where that cannot be done, when it is written."""
    unlooked(monkeypatch)
    if not reserves:

        def unsupported(*args: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with pytest.raises(OutputError, match="No space left on device; nothing was kept"):
        convert_checkpoint(source, disk / "out", RECIPE)
    assert os.listdir(disk) == []


def test_a_disk_that_cannot_be_written(disk: Path, source: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OutputError, match="Read-only file system"):
        convert_checkpoint(source, disk / "out", RECIPE)


def test_a_resumed_run_ends_well_once_there_is_space(
    disk: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlooked(monkeypatch)
    with pytest.raises(OutputError, match=r"kept for resume \(--resume\)"):
        convert_checkpoint(source, disk / "out", RECIPE, resume=True)
    assert not (disk / "out").exists()
    subprocess.run(["mount", "-o", f"remount,{LARGE}", str(disk)], check=True)
    convert_checkpoint(source, disk / "out", RECIPE, resume=True)
    verify_checkpoint(disk / "out", source)
    assert os.listdir(disk) == ["out"]
