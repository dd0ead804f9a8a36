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

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


@cache
def _names(owner: Any) -> tuple[str, ...]:
    """The built-in functions of a module or class, before any is replaced."""
    return tuple(name for name, member in inspect.getmembers(owner) if core.is_builtin(member))


# What interprets reductions replaces these, before the others and after them.
_REDUCTIONS = ("associative_scan", "reduce")


def _members(owner: Any) -> list[tuple[str, Any]]:
    """Those that stand to be replaced; none where the first has been, as all others are at once."""
    names = _names(owner)
    some = [*names[:1], *(name for name in _REDUCTIONS if name in names)]
    if not any(core.is_builtin(getattr(owner, name)) for name in some):
        return []
    members = ((name, getattr(owner, name)) for name in names)
    return [(name, member) for name, member in members if core.is_builtin(member)]


def remember_builtins() -> None:
    """Let the interpreter look for built-in functions once: here, before it has replaced any."""
    for owner in (tl, core, tl.math, tl.tensor, core.tensor_descriptor_base):
        _names(owner)
    interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": _members})
