"""Work that must not grow faster than the number of tensors, pieces or processes: it is counted."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
from fuseport_testing.command import Run
from fuseport_testing.tiny import write_tiny

from fuseport.converter import slices as slices_module
from fuseport.converter import transfers
from fuseport.converter.errors import CorruptSourceError
from fuseport.converter.plan import Planned, storage_key
from fuseport.converter.scales import table_of
from fuseport.converter.shards import Local, Piece, Whole
from fuseport.converter.slices import slices
from fuseport.converter.sources import stored as stored_module
from fuseport.converter.sources.safetensors_file import parse_json
from fuseport.converter.sources.stored import Stored
from fuseport.kernels.move import Move


def stack(experts: int, holders: range = range(1)) -> Whole:
    """Experts [E, 4, 6] in one tensor, each in two pieces."""
    held = dict.fromkeys(holders, Local((24, 6, 1), 0))
    pieces = [Piece((e, row, 0), (1, 2, 6), held) for row in (0, 2) for e in range(experts)]
    return Whole((experts, 4, 6), (experts, 4, 6), torch.float32, tuple(pieces))


def looks(experts: int) -> int:
    """Pieces that are looked at for all moves of a stack, an expert each."""
    slices_module._spans.cache_clear()
    whole = stack(experts)
    for view in torch.empty(whole.shape, device="meta").unbind(0):
        assert len(list(slices(view, view, whole))) == 2
    found = slices_module._spans.cache_info()
    return found.hits + found.misses


def test_a_move_looks_at_its_own_pieces() -> None:
    assert (looks(8), looks(32)) == (2 * 8, 2 * 32)


def test_pieces_come_in_their_order() -> None:
    whole = stack(3)
    assert [piece.start for piece in whole.meeting(1, 3)] == [
        (1, 0, 0), (2, 0, 0), (1, 2, 0), (2, 2, 0)
    ]  # fmt: skip
    scalar = Whole((), (), torch.float32, (Piece((), ()),))
    assert len(scalar.meeting(0, 1)) == 1


def sizes_asked_for(monkeypatch: pytest.MonkeyPatch, takers: int) -> int:
    whole, src = stack(4), torch.empty(4, 4, 6, device="meta")
    planned = Planned(0, "w", torch.empty_like(src), (Move(torch.empty_like(src), src),))
    wants = [(), *[(0,)] * takers]
    found = transfers.wanted([planned], {storage_key(src): ("w", whole)}, wants)
    asked = []
    cargo: Any = transfers.Part.cargo.fget  # type: ignore[attr-defined]
    counted = property(lambda part: asked.append(part) or cargo(part))  # type: ignore[func-returns-value]
    with monkeypatch.context() as patched:
        patched.setattr(transfers.Part, "cargo", counted)
        table = transfers.traffic(found, takers + 1)
    assert table[0] == [0, *[src.nbytes] * takers]
    return len(asked)


def test_traffic_measures_a_part_once_for_all_takers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_asked_for(monkeypatch, 1) == sizes_asked_for(monkeypatch, 16) == 8


class Position(int):
    """A position that counts its comparisons."""

    compared = 0
    __hash__ = int.__hash__

    def __lt__(self, other: int) -> bool:
        Position.compared += 1
        return int.__lt__(self, other)

    def __gt__(self, other: int) -> bool:
        Position.compared += 1
        return int.__gt__(self, other)


@pytest.mark.parametrize("count", [8, 256])
def test_a_read_looks_at_the_pieces_near_it(count: int) -> None:
    rows = torch.arange(count * 6.0).view(count, 2, 3)
    pieces = [
        stored_module.Piece((n, 0, column), (1, 2, width), rows[n : n + 1, :, column:][..., :width])
        for column, width in ((1, 2), (0, 1))
        for n in reversed(range(count))
    ]
    one = Stored("w", tuple(rows.shape), rows.dtype, tuple(pieces))
    one.__dict__["_spans"] = tuple(list(map(Position, each)) for each in one._spans)
    Position.compared, out = 0, torch.empty(6)
    for n in range(count):
        one.read_flat(6 * n, 6 * n + 6, out)
        assert torch.equal(out, rows[n].flatten())
    # Two searches among 2 · 256 pieces, and the pieces that are found.
    assert 0 < Position.compared <= 25 * count


class Name(str):
    """A name that counts its comparisons."""

    __slots__ = ()
    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Name.compared += 1
        return str.__eq__(self, other)


def comparisons(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    load = json.loads

    def named(text: bytes, object_pairs_hook: Any) -> Any:
        pairs = load(text, object_pairs_hook=list)
        return object_pairs_hook([(Name(name), value) for name, value in pairs])

    text = "{" + "".join(f'"n{n}": 0, ' for n in range(count)) + '"twice": 0, "twice": 0}'
    Name.compared = 0
    with monkeypatch.context() as patched:
        patched.setattr(json, "loads", named)
        with pytest.raises(CorruptSourceError, match="'twice' is"):
            parse_json(text.encode(), Path("index.json"))
    return Name.compared


def test_a_name_that_is_there_twice_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < comparisons(1000, monkeypatch) < 100


@pytest.mark.parametrize("flag", ["--json", "-q"])
def test_nothing_is_laid_out_that_nobody_reads(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    def render(*_: object, **__: object) -> Any:
        raise AssertionError("a table was laid out")

    source = write_tiny(tmp_path / "tiny")
    monkeypatch.setattr(rich.console.Console, "render", render)
    run("inspect", source, flag)


def matches_tried(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    names = [f"layers.{n}.fc" for n in range(count)]
    table = table_of({"*.fc": {"weight": 1.0}, **{n: {"weight": 2.0} for n in names}}, "scales")
    tried: list[str] = []

    def match(name: str, pattern: str) -> bool:
        tried.append(pattern)
        return pattern == "*.fc"

    with monkeypatch.context() as patched:
        patched.setattr(fnmatch, "fnmatchcase", match)
        assert [table.find(name, "weight") for name in names] == [2.0] * count
    return len(tried)


def test_scales_by_name_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (matches_tried(8, monkeypatch), matches_tried(32, monkeypatch)) == (8, 32)
