"""Signals that end the program, in one way for all of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal that ends the program; not KeyboardInterrupt, which click handles by itself.

    `state` says how things were left, where a command knows.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.state = number, ""


def watch() -> None:
    """Raise `Stopped` in the main thread when one of the signals comes."""
    for one in STOPS:
        if signal.getsignal(one) is not signal.SIG_IGN:
            signal.signal(one, _stop)


def _stop(number: int, _frame: object) -> None:
    # What the first one sets going, a second one must not cut short.
    for one in STOPS:
        signal.signal(one, signal.SIG_IGN)
    raise Stopped(number)


@contextmanager
def leaving(state: str) -> Iterator[None]:
    """Say how a signal in the block leaves things."""
    try:
        yield
    except Stopped as stopped:
        stopped.state = state
        raise
