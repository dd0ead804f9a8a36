"""Parsers against bytes that nobody meant: always a named error, never a crash or a hang.

Short here; FUSEPORT_FUZZ=100000 tries so many examples of each.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import fuseport_testing
import pytest
import torch
from fuseport_testing.hf_tiny import write_hf_tiny
from fuseport_testing.tiny import ITERATION, write_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuseport.converter import Recipe, plan_checkpoint
from fuseport.converter.errors import CorruptSourceError, FuseportError, SourceError
from fuseport.converter.sources.safe_pickle import load_pickle, load_small_pickles
from fuseport.converter.sources.safetensors_file import read_header
from fuseport.converter.sources.saved_tensors import load_saved
from fuseport.converter.sources.te_state import decode_te_state
from fuseport.converter.sources.torch_zip import Window, find_payload

EXAMPLES = int(os.environ.get("FUSEPORT_FUZZ", "60"))
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
SECONDS, MIB = 30.0, 1 << 20


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def harmful() -> dict[str, bytes]:
    """A tuple that holds itself twice, sixty times over; absurd numbers; a deep tuple as a key."""
    doubled = b"\x80\x04)\x94" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60)
    )
    nested = b"\x80\x04)" + b"\x85" * 60_000
    return {
        "doubled key": doubled + b"}h\x3cK\x01s.",
        "doubled in a set": doubled + b"\x8f(h\x3c\x90.",
        "number": b"\x80\x02]r\xff\xff\xff\xff.",
        "number in text": b"\x80\x02]p4294967295\n.",
        "deep": b"\x80\x04}" + nested[2:] + b"K\x01s.",
    }


def padded(data: bytes, size: int) -> bytes:
    """The same, behind a string that makes the pickle large."""
    return data[:2] + b"B" + size.to_bytes(4, "little") + bytes(size) + b"0" + data[2:]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("size", [0, 200_000])
@pytest.mark.parametrize("name", list(harmful()))
def test_pickles_that_are_made_to_harm(name: str, size: int) -> None:
    data = harmful()[name]
    begin, before = time.monotonic(), peak()
    # Where the stack suffices, a deep key loads, and does no harm.
    loads = contextlib.suppress(CorruptSourceError) if size and name == "deep" else None
    with loads or pytest.raises(CorruptSourceError):
        load_pickle(padded(data, size) if size else data, "here")
    assert time.monotonic() - begin < SECONDS
    assert peak() - before < 256 * MIB


def test_what_the_guard_lets_pass() -> None:
    values = {(i, (i, i)): [(1, 2), "x", {"y": (i,)}] for i in range(2000)}
    for protocol in (2, 4, 5):
        data = pickle.dumps(values, protocol)
        assert load_pickle(data, "here") == values
        assert load_small_pickles(data + data, 2, "here")[0] == [values, values]
    shared = tuple(range(900))
    assert load_pickle(pickle.dumps([shared] * 5), "here") == [shared] * 5


@st.composite
def spoilt(draw: st.DrawFn, good: bytes) -> bytes:
    """Good bytes with some changed, cut off, repeated or put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat", "number"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        elif kind == "number":
            data[at : at + 8] = draw(
                st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            ).to_bytes(8, "little")
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def unharmed(read: Callable[[], object]) -> None:
    begin, before = time.monotonic(), peak()
    with contextlib.suppress(FuseportError):
        read()
    assert time.monotonic() - begin < SECONDS
    assert peak() - before < 512 * MIB


SAVED = {
    "zip": saved({"a": torch.arange(5), "b": [1, (2, 3)]}),
    "plain": pickle.dumps({"scale": torch.ones(3), "recipe": None}),
    "small": pickle.dumps({("x", 1): [1.5, None, b"y"], "s": {1, 2}}, 4),
}


@fuzzed
@given(st.sampled_from(list(SAVED)).flatmap(lambda name: spoilt(SAVED[name])))
def test_saved_objects(data: bytes) -> None:
    unharmed(lambda: load_saved(data, "here", MIB))
    unharmed(lambda: load_pickle(data, "here"))
    state = torch.frombuffer(bytearray(data or b"x"), dtype=torch.uint8)
    unharmed(lambda: decode_te_state(state, "here"))


@fuzzed
@given(st.one_of(st.binary(max_size=200), spoilt(SAVED["small"])))
def test_any_bytes_as_a_pickle(data: bytes) -> None:
    unharmed(lambda: load_pickle(data, "here"))


@fuzzed
@given(spoilt(saved(torch.arange(64, dtype=torch.bfloat16))))
def test_embedded_zips(data: bytes) -> None:
    handle = os.memfd_create("zip")
    try:
        os.write(handle, data)
        unharmed(lambda: find_payload(Window(handle, 0, len(data)), "here"))
    finally:
        os.close(handle)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_tiny(tmp_path_factory.mktemp("hf") / "tiny", shards=2)


@pytest.fixture(scope="module")
def torch_dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dist") / "tiny")


@fuzzed
@given(data=st.data())
def test_headers_of_safetensors(data: st.DataObject, hf: Path) -> None:
    file = next(hf.glob("*.safetensors"))
    good = file.read_bytes()
    try:
        file.write_bytes(data.draw(spoilt(good[:3000])) + good[3000:])
        unharmed(lambda: read_header(file))
    finally:
        file.write_bytes(good)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@fuzzed
@given(data=st.data())
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_json_beside_the_weights(name: str, data: st.DataObject, hf: Path) -> None:
    file = hf / name
    good = file.read_bytes()
    values = json.loads(good)
    try:
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(spoilt(good)))
        else:
            table = values.get("weight_map", values)
            table[data.draw(st.sampled_from(sorted(table)))] = data.draw(JSONS)
            file.write_text(json.dumps(values))
        unharmed(lambda: plan_checkpoint(hf, Recipe(target="hf")))
    finally:
        file.write_bytes(good)


@fuzzed
@given(data=st.data())
@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_files_of_torch_dist(name: str, data: st.DataObject, torch_dist: Path) -> None:
    file = torch_dist / ITERATION / name
    good = file.read_bytes()
    try:
        file.write_bytes(data.draw(spoilt(good)))
        unharmed(lambda: plan_checkpoint(torch_dist, Recipe()))
    finally:
        file.write_bytes(good)


@pytest.mark.slow
@pytest.mark.parametrize("parser", ["pickle", "saved", "zip", "safetensors", "extra_state"])
def test_guided_by_coverage(parser: str) -> None:
    """Where atheris is installed."""
    pytest.importorskip("atheris")
    command = [sys.executable, "-W", "ignore", "-m", "fuseport_testing.coverage_fuzz", parser]
    limits = [f"-runs={20 * EXAMPLES}", f"-timeout={SECONDS:.0f}", "-rss_limit_mb=1024"]
    environment = {**os.environ, "PYTHONPATH": str(Path(fuseport_testing.__path__[0]).parent)}
    done = subprocess.run([*command, *limits], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr


def test_a_bomb_of_a_zip_is_not_unpacked() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200 * MIB))
    before = peak()
    with pytest.raises(SourceError):
        load_saved(stream.getvalue(), "here", MIB)
    assert peak() - before < 64 * MIB
