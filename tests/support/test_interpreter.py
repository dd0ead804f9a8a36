"""What the interpreter is told of `triton.language` is what it would find."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import triton.language as tl
from fuseport_testing.interpreter import _members, _names

from fuseport.kernels.fused_copy import fused_copy
from fuseport.kernels.move import Move

OWNERS = [tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base]


def found(owner: Any) -> list[str]:
    """By looking through all of it, as the interpreter does."""
    return [name for name, one in inspect.getmembers(owner) if tl.core.is_builtin(one)]


def told(owner: Any) -> list[str]:
    return [name for name, _ in _members(owner)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels natively")
@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: str(owner.__name__))
def test_builtins_before_during_and_after_a_launch(
    owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(owner) == found(owner)
    seen: list[tuple[list[str], list[str]]] = []
    load = tl.core.load

    def spied(*args: Any, **kwargs: Any) -> Any:
        seen.append((told(owner), found(owner)))
        return load(*args, **kwargs)

    spied.__triton_builtin__ = True  # type: ignore[attr-defined]
    monkeypatch.setattr(tl, "load", spied)
    fused_copy([Move(torch.empty(3, 5), torch.randn(3, 5))])
    assert seen
    assert all(one == other for one, other in seen)
    assert told(owner) == found(owner)


def test_all_of_the_language_is_replaced_during_a_launch() -> None:
    assert len(_names(tl)) > 50
    assert {"load", "store", "where"} <= set(_names(tl))
