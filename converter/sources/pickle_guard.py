"""Pickles that build only data, and still take all memory, all time, or the whole stack.

An operation may number an object 4 294 967 295, and the unpickler makes a table of that length. A
tuple may hold itself twice, sixty times over, and a dict that has it as a key never ends hashing
it. Small pickles are looked through, operation by operation, before one of them runs. That would
take minutes for large ones: they are tried in a child first, with bounds of time and memory.
"""

from __future__ import annotations

import contextlib
import os
import pickletools
import resource
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import CorruptSourceError

# Bytes that are looked through; each operation costs about a microsecond.
SMALL = 64 << 10
# What a tuple may be nested, and hold when all that it holds is written out.
_DEEPEST, _WIDEST = 100, 1000
# Of a child: seconds, and bytes beside those that this process has.
_SECONDS, _SECONDS_A_MB = 10.0, 0.5
_MEMORY, _MEMORY_A_BYTE = 1 << 30, 40

# The operations that number an object, for another operation to refer to, and that refer to one.
_NUMBERING = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_REFERRING = frozenset(["GET", "BINGET", "LONG_BINGET"])
_TUPLES = frozenset(["TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"])

# How deep a value is nested, and what it holds written out; None is a mark on the stack.
Size = tuple[int, int]
_PLAIN: Size = (0, 1)


def end_of_pickle(data: bytes, where: str) -> int:
    """Where the first pickle ends.

    Raises:
        CorruptSourceError: it never does, or would take memory, time or stack without bound.
    """
    try:
        machine = _Machine(len(data))
        for opcode, argument, position in pickletools.genops(data):
            machine.step(opcode, argument)
            if opcode.name == "STOP":
                assert position is not None
                return position + 1
    # Damage can raise nearly anything.
    except Exception as error:
        raise CorruptSourceError(f"{where}: not a readable pickle ({error!r})") from error
    raise CorruptSourceError(f"{where}: not a readable pickle (it has no end)")


@dataclass
class _Machine:
    """The unpickler's stack, of which only the sizes of tuples are kept."""

    length: int
    steps: int = 0
    stack: list[Size | None] = field(default_factory=list)
    memo: dict[int, Size] = field(default_factory=dict)

    def step(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        self.steps += 1
        name = opcode.name
        if name == "MARK":
            self.stack.append(None)
        elif name in _NUMBERING or name == "MEMOIZE":
            number = len(self.memo) if name == "MEMOIZE" else int(str(argument))
            if number > self.length:
                raise ValueError(f"object number {number}")
            self.memo[number] = self.stack[-1] or _PLAIN
        elif name in _REFERRING:
            self.stack.append(self.memo[int(str(argument))])
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            taken = self._take(opcode)
            made = self._tuple(taken) if name in _TUPLES else _PLAIN
            self.stack += [made] * len(opcode.stack_after)

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[Size]:
        before = opcode.stack_before
        taken: list[Size] = []
        if pickletools.markobject in before:
            while (one := self.stack.pop()) is not None:
                taken.append(one)
            before = before[: before.index(pickletools.markobject)]
        return taken + [self.stack.pop() or _PLAIN for _ in before]

    def _tuple(self, parts: list[Size]) -> Size:
        depth = 1 + max((one for one, _ in parts), default=0)
        held = 1 + sum(count for _, count in parts)
        if depth > _DEEPEST or held > _WIDEST + 2 * self.steps:
            raise ValueError(f"a tuple that is nested {depth} deep and holds {held} values")
        return depth, held


def try_in_child(load: Callable[[], object], nbytes: int, where: str) -> None:
    """Load a large pickle in a child, whose fate says if this process may.

    Raises:
        CorruptSourceError: it took too long, too much memory, or the child with it.
    """
    with warnings.catch_warnings():
        # The child only unpickles, and takes no lock that another thread may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _attempt(load, nbytes)
    limit = _SECONDS + _SECONDS_A_MB * nbytes / 1e6
    status = _outcome(child, time.monotonic() + limit)
    if status != 0:
        raise CorruptSourceError(
            f"{where}: a pickle of {nbytes} bytes that cannot be read within {limit:.0f} s and "
            f"{(_MEMORY + _MEMORY_A_BYTE * nbytes) >> 20} MiB; the file is damaged, or made to harm"
        )


def _attempt(load: Callable[[], object], nbytes: int) -> None:
    """Runs in the child, and ends it."""
    code = 1
    try:
        with open("/proc/self/statm", "rb") as statm:
            own = int(statm.read().split()[0]) * resource.getpagesize()
        most = own + _MEMORY + _MEMORY_A_BYTE * nbytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with contextlib.suppress(Exception):
            try:
                load()
            except MemoryError:
                os._exit(1)
        # What load raises otherwise, it raises in the parent too, which says it better.
        code = 0
    finally:
        os._exit(code)


def _outcome(child: int, deadline: float) -> int:
    """The child's exit status; it is killed at the deadline."""
    pause = 0.001
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
