"""The order in which a pass fills tensors, by what each must wait for.

A run looks at every parameter's address. Some parameters are looked at first, and what they alone
make keeps the GPU busy while the host looks at the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .transfers import Wanted

# Bytes that a GPU writes while a parameter is looked at: 0.2 to 0.7 µs, at 1.5 TB/s.
_HIDING = 1_000_000
# At most one of so many parameters is looked at first.
_SHARE = 8


def first_sources(tensors: Sequence[Wanted], names: Collection[str]) -> set[str]:
    """A few parameters that keep the GPU busy while the others are looked at.

    Args:
        tensors: what is filled in this process.
        names: all its parameters.
    """
    found: set[str] = set()
    left, most, known = _HIDING * len(names), len(names) // _SHARE, {*names}
    for group in sorted(_groups(tensors), key=_nbytes, reverse=True):
        sources = set[str]().union(*map(_sources, group))
        if left > 0 and len(found | sources) <= most and sources <= known:
            found |= sources
            left -= _nbytes(group)
    return found


def _groups(tensors: Sequence[Wanted]) -> list[list[Wanted]]:
    """What can only be filled together."""
    groups: dict[object, list[Wanted]] = {}
    for one in tensors:
        groups.setdefault(_group(one), []).append(one)
    return list(groups.values())


def _nbytes(group: Sequence[Wanted]) -> int:
    return sum(one.planned.nbytes for one in group)


def _sources(one: Wanted) -> set[str]:
    return {part.source for parts in one.parts for part in parts}


def in_turn(
    tensors: Sequence[Wanted], first: Collection[str], is_late: Callable[[Wanted], bool]
) -> tuple[list[Wanted], list[Wanted], list[Wanted]]:
    """What comes from the first parameters alone; what can be filled next; what must wait.

    Of a group all are late if one is.
    """
    early: list[Wanted] = []
    soon: list[Wanted] = []
    late: list[Wanted] = []
    known = {*first}
    for group in _groups(tensors):
        if any(map(is_late, group)):
            late += group
        elif known and all(_sources(one) <= known for one in group):
            early += group
        else:
            soon += group
    return early, soon, late


def _group(one: Wanted) -> object:
    """What is filled together: a group that shares scales, or the tensor alone."""
    return one.planned.group or id(one.planned)
