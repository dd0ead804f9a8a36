"""Destinations that cannot be written, and results that are not what they should be."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fuseport_testing.tiny import write_tiny

from fuseport.converter import Recipe, convert_checkpoint, verify_checkpoint
from fuseport.converter.checkpoint import MANIFEST, file_digest
from fuseport.converter.errors import OutputError, VerificationError
from fuseport.converter.publish import publish

Json = dict[str, Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def result(source: Path, tmp_path: Path) -> Path:
    convert_checkpoint(source, tmp_path / "out", Recipe(tp_size=2))
    return tmp_path / "out"


def test_paths_may_be_strings(source: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    out = str(tmp_path / "strings")
    convert_checkpoint(str(source), out, Recipe(target="hf"), assets=str(tokenizer))
    assert Path(out, "tokenizer.json").read_text() == "{}"
    assert verify_checkpoint(out, str(source)).accounting is not None


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(match: str, source: Path, out: Path, **kwargs: Any) -> None:
    with pytest.raises(OutputError, match=match):
        convert_checkpoint(source, out, Recipe(), **kwargs)


# Destinations.


def test_overwrite_replaces_only_a_converted_checkpoint(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, Recipe())
    refused(r"exists; choose another directory, or give overwrite \(--overwrite\)", source, out)
    convert_checkpoint(source, out, Recipe(tp_size=2), overwrite=True)
    assert verify_checkpoint(out, source).files == 3
    (out / "engine").mkdir()
    before = contents(tmp_path)
    refused("not just a converted checkpoint", source, out, overwrite=True)
    (out / "engine").rmdir()
    (out / MANIFEST).unlink()
    refused("not just a converted checkpoint", source, out, overwrite=True)
    assert contents(tmp_path) == {k: v for k, v in before.items() if not k.endswith(MANIFEST)}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_out_is_the_source(source: Path, overwrite: bool) -> None:
    before = contents(source.parent)
    for out in (source, source.parent, source / "iter_0000001", Path("/")):
        refused("exists|not just a converted|among the source", source, out, overwrite=overwrite)
    assert contents(source.parent) == before


def test_out_is_no_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        refused("a file or a link", source, tmp_path / name, overwrite=True)
    refused("cannot write .*File exists", source, tmp_path / "file" / "out")
    refused("cannot write .*name too long", source, tmp_path / ("x" * 300))
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_too_little_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    refused("has 0.00 GB free, but the result takes", source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
def test_disk_fills_up(
    call: str, source: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(result.parent)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="No space left on device; nothing was kept"):
        convert_checkpoint(source, result, Recipe(), overwrite=True)
    monkeypatch.undo()
    assert contents(result.parent) == before
    assert os.listdir(result.parent) == ["out"]


def test_interrupted(source: Path, result: Path) -> None:
    before = contents(result.parent)

    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, result, Recipe(), overwrite=True, progress=stop)
    assert contents(result.parent) == before


def test_the_old_result_comes_back_if_the_last_rename_fails(
    source: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two directories cannot be exchanged in one step."""
    before = contents(result.parent)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr("fuseport.converter.publish._exchange", lambda one, other: False)
    refused("Input/output error", source, result, overwrite=True)
    assert contents(result.parent) == before


def test_two_conversions_to_one_place(source: Path, tmp_path: Path) -> None:
    """Both begin before either ends: one is kept, the other fails, nothing is mixed."""
    barrier = threading.Barrier(2, timeout=60)
    errors: list[str] = []

    def work(tp: int) -> None:
        met: list[int] = []

        def meet(nbytes: int) -> None:
            if not met:
                met.append(barrier.wait())

        try:
            convert_checkpoint(source, tmp_path / "out", Recipe(tp_size=tp), progress=meet)
        except OutputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(tp,)) for tp in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert "not empty" in errors[0]
    verify_checkpoint(tmp_path / "out", source)
    assert os.listdir(tmp_path) == ["out"]


# Results.

NONSENSE = [None, 3, "x", [], [1], {"a": 1}, -1, 1e400, 10**30, True]


def spoil(out: Path, change: Callable[[Json], object]) -> None:
    """Change the manifest."""
    manifest = json.loads((out / MANIFEST).read_text())
    change(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest))


def sign(out: Path) -> None:
    """Make the manifest's digests those of the files, as someone with bad intent would."""

    def change(manifest: Json) -> None:
        for name in manifest["files"]:
            path = out / name
            manifest["files"][name] = {
                "bytes": path.stat().st_size,
                "xxh3_128": file_digest(path),
            }

    spoil(out, change)


def bad(out: Path, source: Path | None = None, match: str = ".") -> None:
    with pytest.raises(VerificationError, match=match):
        verify_checkpoint(out, source)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[" * 100_000, b"3", b'{"format": 1}', b'{"format": 2}']
)
def test_a_file_that_is_no_manifest(text: bytes, result: Path) -> None:
    (result / MANIFEST).write_bytes(text)
    bad(result, match=MANIFEST)


def test_no_manifest(result: Path) -> None:
    (result / MANIFEST).unlink()
    bad(result, match="expected a directory that fuseport converted")


@pytest.mark.parametrize("key", ["format", "files", "tensors", "spec", "recipe"])
def test_manifest_with_missing_and_strange_parts(key: str, result: Path, source: Path) -> None:
    good = (result / MANIFEST).read_bytes()
    spoil(result, lambda manifest: manifest.pop(key))
    bad(result, source)
    for value in NONSENSE[:-1]:
        (result / MANIFEST).write_bytes(good)
        spoil(result, lambda manifest, value=value: manifest.update({key: value}))  # type: ignore[misc]
        bad(result, source)


@pytest.mark.parametrize("part", ["spec", "recipe"])
def test_manifest_with_a_strange_spec_or_recipe(part: str, result: Path, source: Path) -> None:
    good = (result / MANIFEST).read_bytes()
    for key in [*json.loads(good)[part], "unknown"]:
        for value in ({"a": 1}, -1, [1]):
            (result / MANIFEST).write_bytes(good)
            spoil(result, lambda m, key=key, value=value: m[part].update({key: value}))  # type: ignore[misc]
            bad(result, source, "spec or recipe makes no sense")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "a/b", "\0", "rank7", "x" * 999])
@pytest.mark.parametrize("table", ["files", "tensors"])
def test_manifest_that_names_other_files(table: str, name: str, result: Path) -> None:
    entry = {"bytes": 0, "xxh3_128": ""} if table == "files" else {}
    spoil(result, lambda manifest: manifest[table].update({name: entry}))
    bad(result, match="makes no sense")


def test_manifest_with_strange_entries(result: Path) -> None:
    good = (result / MANIFEST).read_bytes()
    file = "rank0.safetensors"
    for value in NONSENSE:
        for change in (
            lambda m, v=value: m["files"].update({file: v}),
            lambda m, v=value: m["files"][file].update({"bytes": v}),
            lambda m, v=value: m["files"][file].update({"xxh3_128": v}),
            lambda m, v=value: m["tensors"].update({file: v}),
            lambda m, v=value: m["tensors"][file].update({"lm_head.weight": v}),
        ):
            (result / MANIFEST).write_bytes(good)
            spoil(result, change)
            bad(result, match=".")


def test_settings_that_are_not_the_sources(result: Path, source: Path) -> None:
    path = result / "config.json"
    good = json.loads(path.read_text())
    for key in good:
        for value in NONSENSE:
            if value != good[key] and good[key] is not None:
                path.write_text(json.dumps(good | {key: value}))
                sign(result)
                bad(result, source)
        path.write_text(json.dumps({k: v for k, v in good.items() if k != key}))
        sign(result)
        bad(result, source)
    for size in ("world_size", "tp_size", "pp_size"):
        for value in (*NONSENSE, 0, 10**12):
            path.write_text(json.dumps(good | {"mapping": {**good["mapping"], size: value}}))
            sign(result)
            if value != good["mapping"][size]:
                bad(result, source)
    path.write_bytes(b"\xff")
    sign(result)
    bad(result, match="config.json cannot be read")


def test_damaged_header_with_the_right_digest(result: Path) -> None:
    path = result / "rank0.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    swapped = good.replace(b"lm_head", b"lm_haed", 1)
    for data in (b"", good[:5], good[:-1], (2**63).to_bytes(8, "little") + good[8:], swapped):
        path.write_bytes(data)
        sign(result)
        bad(result, match="rank0.safetensors")
    for place in range(0, 8 + length, 37):
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        sign(result)
        bad(result)


def test_missing_file(result: Path) -> None:
    (result / "rank1.safetensors").unlink()
    bad(result, match="rank1.safetensors is missing")
    (result / "rank1.safetensors").mkdir()
    bad(result, match="rank1.safetensors is missing")


def test_a_file_that_is_begun_while_a_directory_goes_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may not have heard yet that all is over."""
    remove, late = shutil.rmtree, ["one", "two"]

    def racing(path: Path, **options: Any) -> None:
        remove(path, **options)
        if late:
            path.mkdir()
            (path / late.pop()).touch()

    monkeypatch.setattr(shutil, "rmtree", racing)

    def end() -> None:
        with publish(tmp_path / "out", {"source": "any"}, needed=0):
            raise RuntimeError("over")

    with pytest.raises(RuntimeError, match="over"):
        end()
    assert not late
    assert list(tmp_path.iterdir()) == []
