"""A conversion that is killed at any moment, and the one after it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import fuseport_testing
import pytest
from fuseport_testing import forked
from fuseport_testing.faulty import PHASES
from fuseport_testing.tiny import tiny_weights, write_tiny
from safetensors import SafetensorError, safe_open

from fuseport.converter import Recipe, convert_checkpoint, verify_checkpoint
from fuseport.converter.errors import CorruptSourceError, OutputError
from fuseport.converter.writer import Writer

SUPPORT = Path(fuseport_testing.__path__[0]).parent
OPTIONS = ("--tp", "4", "--overwrite")


def contents(directory: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "tiny")


def run(source: Path, out: Path, phase: str, fault: str, *options: str) -> int:
    command = ["-m", "fuseport_testing.faulty", str(source), str(out), phase, fault]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    done = forked.run(*command, *OPTIONS, *options, environment=environment, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


def loadable(directory: Path) -> list[str]:
    """Weight files that a reader would take."""
    found = []
    for path in directory.rglob("*.safetensors"):
        try:
            with safe_open(path, "pt"):
                found.append(path.name)
        except SafetensorError:
            pass
    return found


# Phases before which no file is whole.
NOTHING_WHOLE = ("plan", "begin", "first window", "second window", "header")


ALL = [name for name in PHASES if name != "never"]
# What stands at OUT matters before anything is done, while it is done, and at the end.
WITH_OLD = ["plan", "first window", "manifest", "rename", "exchange", "after exchange"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "phase"),
    [("nothing", phase) for phase in ALL] + [("an older result", phase) for phase in WITH_OLD],
)
def test_killed_and_resumed(before: str, phase: str, source: Path, tmp_path: Path) -> None:
    """OUT is the old one or the new one, whole; afterwards it has the bytes of a quiet run."""
    place, out = tmp_path / "place", tmp_path / "place" / "out"
    place.mkdir()
    old: dict[str, bytes] = {}
    if before != "nothing":
        convert_checkpoint(source, out, Recipe(dtype="float32"))
        old = contents(out)
    convert_checkpoint(source, tmp_path / "quiet", Recipe(tp_size=4))
    new = contents(tmp_path / "quiet")
    code = run(source, out, phase, "kill", "--resume")
    happens = before != "nothing" or phase != "exchange"
    assert code == (-signal.SIGKILL if happens else 0)
    found = contents(out) if out.exists() else {}
    assert found == (old if happens and phase != "after exchange" else new)
    for partial in place.glob("out.partial-*"):
        assert phase not in NOTHING_WHOLE or loadable(partial) == []
    again = Recipe(tp_size=4)
    convert_checkpoint(source, out, again, overwrite=True, resume=True)
    assert contents(out) == new
    assert os.listdir(place) == ["out"]


def count_windows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that are written from now on."""
    written: list[str] = []
    open_file = Writer._open

    def opened(self: Writer, number: int) -> object:
        name = self.images[number].name
        if name not in written:
            written.append(name)
        return open_file(self, number)

    monkeypatch.setattr(Writer, "_open", opened)
    return written


def killed(source: Path, out: Path) -> Path:
    assert run(source, out, "second file", "kill", "--resume") == -signal.SIGKILL
    (partial,) = out.parent.glob("out.partial-*")
    return partial


@pytest.mark.slow
def test_finished_files_are_not_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = killed(source, tmp_path / "out")
    (done,) = (one.stem for one in (partial / ".fuseport").glob("rank*.json"))
    written = count_windows(monkeypatch)
    convert_checkpoint(source, tmp_path / "out", Recipe(tp_size=4), resume=True)
    assert len(written) == 3
    assert done not in written
    verify_checkpoint(tmp_path / "out", source)


@pytest.mark.slow
def test_a_finished_file_that_was_damaged_is_written_again(source: Path, tmp_path: Path) -> None:
    partial = killed(source, tmp_path / "out")
    (done,) = (one.stem for one in (partial / ".fuseport").glob("rank*.json"))
    data = bytearray((partial / done).read_bytes())
    data[-3] ^= 1
    (partial / done).write_bytes(data)
    convert_checkpoint(source, tmp_path / "out", Recipe(tp_size=4), resume=True)
    verify_checkpoint(tmp_path / "out", source)


@pytest.mark.slow
def test_resume_refuses_another_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    partial = killed(source, out)
    with pytest.raises(OutputError, match=r"was begun with another layout, recipe"):
        convert_checkpoint(source, out, Recipe(tp_size=4, dtype="float16"), resume=True)
    other = write_tiny(tmp_path / "other")
    with pytest.raises(OutputError, match=r"another source; leave out resume"):
        convert_checkpoint(other, out, Recipe(tp_size=4), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("fuseport.converter.manifest.versions", lambda: {"fuseport": "0.0.1"})
        with pytest.raises(OutputError, match="another version"):
            convert_checkpoint(source, out, Recipe(tp_size=4), resume=True)
    assert partial.is_dir()
    # Without --resume it makes way.
    convert_checkpoint(source, out, Recipe(tp_size=4, dtype="float16"))
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_what_a_living_run_writes_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def convert_too(nbytes: int) -> None:
        if not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            with pytest.raises(OutputError, match="being written by another run"):
                convert_checkpoint(source, out, Recipe(), resume=True)

    convert_checkpoint(source, out, Recipe(), progress=convert_too)
    verify_checkpoint(out, source)


def test_a_failed_run_keeps_its_files_only_for_resume(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for resume, kept in ((False, "nothing was kept"), (True, r"kept for resume \(--resume\)")):
        with monkeypatch.context() as patch:
            patch.setattr("fuseport.converter.convert.manifest", full)
            with pytest.raises(OutputError, match=kept):
                convert_checkpoint(source, tmp_path / "out", Recipe(), resume=resume)
        assert len(os.listdir(tmp_path)) == int(resume)
    convert_checkpoint(source, tmp_path / "out", Recipe(), resume=True)
    assert os.listdir(tmp_path) == ["out"]


def test_two_renames_leave_what_the_next_run_mends(source: Path, tmp_path: Path) -> None:
    """Where directories cannot be exchanged, a kill may come between the two renames."""
    out = tmp_path / "out"
    convert_checkpoint(source, out, Recipe())
    old = contents(out)
    out.rename(tmp_path / "out.old-0123abcd")
    with pytest.raises(OutputError, match="exists"):
        convert_checkpoint(source, out, Recipe())
    assert contents(out) == old
    shutil.copytree(out, tmp_path / "out.old-4567abcd")
    convert_checkpoint(source, out, Recipe(), overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "s")
    file = next(source.rglob("common.pt"))

    def touch(nbytes: int) -> None:
        os.utime(file, ns=(1, 1))

    with pytest.raises(CorruptSourceError, match=r"common\.pt changed during the conversion"):
        convert_checkpoint(source, tmp_path / "out", Recipe(), progress=touch)
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_a_shard_is_noticed(place: float, tmp_path: Path) -> None:
    import torch

    weights = tiny_weights()
    weights["decoder.layers.mlp.linear_fc1.weight"] = torch.randn(2, 48, 16) + 4
    source = write_tiny(tmp_path / "s", weights)
    file = next(source.rglob("*.distcp"))
    data = bytearray(file.read_bytes())
    payload = weights["decoder.layers.mlp.linear_fc1.weight"].numpy().tobytes()
    at = bytes(data).find(payload) + int(place * len(payload))
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptSourceError, match="CRC-32"):
        convert_checkpoint(source, tmp_path / "out", Recipe())
    assert os.listdir(tmp_path) == ["s"]
    convert_checkpoint(source, tmp_path / "out", Recipe(), check_source=False)
