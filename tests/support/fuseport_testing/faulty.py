"""Converts as the command does, and goes wrong on demand: one process, or one of several.

    python -m fuseport_testing.faulty SOURCE OUT PHASE FAULT [options of `fuseport convert`]

At its PHASE the process meets the FAULT. With a rank behind it ("kill:1"), only that one does.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# Phase → what is called when it begins, and at which call of it (from 0).
PHASES = {
    "never": ("convert:carry_out", 10**9),
    "plan": ("convert:identity", 0),
    "begin": ("convert:windows", 0),
    "first window": ("writer:Writer.put", 0),
    "second window": ("writer:Writer.put", 1),
    "header": ("writer:_Open.finish", 0),
    "first file": ("publish:Partial.record", 0),
    "second file": ("publish:Partial.record", 1),
    "manifest": ("convert:manifest", 0),
    "rename": ("publish:_replace", 0),
    "exchange": ("publish:_exchange", 0),
    "after exchange": ("publish:shutil.rmtree", 1),
}


def _hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _stall() -> None:
    time.sleep(600)


def _full() -> None:
    raise OSError(28, "No space left on device")


FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": _hang,
    "stall": _stall,
    "full": _full,
}


def break_at(phase: str, fault: str) -> None:
    """Make the fault happen when the phase begins."""
    path, at = PHASES[phase]
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(f"fuseport.converter.{module}")
    *outer, last = name.split(".")
    for one in outer:
        owner = getattr(owner, one)
    original, calls, turn = getattr(owner, last), [0], threading.Lock()

    def broken(*args: Any, **kwargs: Any) -> Any:
        # One call after the other: what came before the fault is done when it happens.
        with turn:
            calls[0] += 1
            if calls[0] == at + 1:
                FAULTS[fault]()
            return original(*args, **kwargs)

    setattr(owner, last, broken)


def main() -> None:
    """Run the command."""
    source, out, phase, fault, *options = sys.argv[1:]
    fault, _, rank = fault.partition(":")
    # With all that the command imports when it is needed, torch above all.
    from fuseport.converter import cli, convert, group
    from fuseport.converter.limits import Limits

    print(f"{convert.__name__} is there", flush=True)

    # Small enough for several windows of a tiny model, and for a quick end of a silent rank.
    Limits.window = lambda self, device: 6 << 10  # type: ignore[method-assign]
    group.SILENCE = 4.0
    if not rank or rank == os.environ.get("RANK"):
        if fault == "disagree":
            options += ["--dtype", "float16"]
        else:
            break_at(phase, fault)
    sys.argv = ["fuseport", "convert", source, out, *options]
    cli.main()


if __name__ == "__main__":
    main()
