"""Python's cycle collector is as it was once a plan is made, also where that fails."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from fuseport.converter import collector


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    (gc.enable if was_on else gc.disable)()


@collector.paused()
def fail_within() -> None:
    assert not gc.isenabled()
    with collector.paused():
        pass
    assert not gc.isenabled()
    raise KeyError


@pytest.mark.parametrize("was_on", [True, False])
def test_it_is_off_within_and_as_it_was_after(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    with pytest.raises(KeyError):
        fail_within()
    assert gc.isenabled() is was_on
