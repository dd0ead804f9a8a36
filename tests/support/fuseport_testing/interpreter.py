"""Triton's interpreter, spared what it repeats.

At each call of a device function it looks through all that `triton.language` holds for what it has
to replace: a third of the time of a small kernel. What is there to be found is always the same,
and during a launch all of it has been replaced.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

from triton.language import core
from triton.runtime import interpreter


@cache
def _names(owner: Any) -> tuple[str, ...]:
    """The built-in functions of a module or class, before any is replaced."""
    return tuple(name for name, member in inspect.getmembers(owner) if core.is_builtin(member))


def _members(owner: Any) -> list[tuple[str, Any]]:
    """Those that stand to be replaced; none where the first has been, as all are at once."""
    names = _names(owner)
    if not names or not core.is_builtin(getattr(owner, names[0])):
        return []
    # Some are replaced before the others, by what interprets reductions.
    members = ((name, getattr(owner, name)) for name in names)
    return [(name, member) for name, member in members if core.is_builtin(member)]


def remember_builtins() -> None:
    """Let the interpreter look for built-in functions once."""
    interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": _members})
