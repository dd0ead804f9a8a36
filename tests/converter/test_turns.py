"""Which parameters a refit looks at first, and what is filled in which turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from fuseport.converter.transfers import Wanted
from fuseport.converter.turns import first_sources, in_turn

MANY = [f"small{n}" for n in range(40)]


def wanted(name: str, nbytes: int, *sources: str, group: str = "") -> Wanted:
    planned = SimpleNamespace(name=name, nbytes=nbytes, group=group)
    parts = [[SimpleNamespace(source=source) for source in sources]]
    return cast("Wanted", SimpleNamespace(planned=planned, parts=parts))


def names(tensors: list[Wanted]) -> list[str]:
    return [one.planned.name for one in tensors]


GROUP = [
    wanted("codes", 1 << 30, "large", group="fused"),
    wanted("scales", 1 << 10, group="fused"),
    wanted("other codes", 1 << 20, "second", group="fused"),
]
OTHERS = [wanted(name, 1 << 10, name) for name in MANY]


def test_a_large_group_is_looked_at_first_as_a_whole() -> None:
    assert first_sources([*OTHERS, *GROUP], [*MANY, "large", "second"]) == {"large", "second"}


def test_what_other_processes_hold_is_not_looked_at_first() -> None:
    assert "large" not in first_sources([*OTHERS, *GROUP], [*MANY, "large"])


def test_few_are_looked_at_first() -> None:
    found = first_sources(OTHERS, MANY)
    assert 0 < len(found) <= len(MANY) // 8


def test_a_group_is_filled_in_one_turn() -> None:
    late = wanted("late", 1, "a", group="late")
    with_it = wanted("with it", 1, "large", group="late")
    tensors = [late, *GROUP, with_it, *OTHERS[:2]]
    turns = in_turn(tensors, {"large", "second"}, lambda one: one is late)
    assert [names(turn) for turn in turns] == [
        ["codes", "scales", "other codes"],
        MANY[:2],
        ["late", "with it"],
    ]


def test_half_a_group_is_not_filled_early() -> None:
    early, soon, _ = in_turn(GROUP, {"large"}, lambda one: False)
    assert not early
    assert soon == GROUP
    early, soon, _ = in_turn(GROUP, (), lambda one: False)
    assert not early
