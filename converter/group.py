"""Several processes on one conversion: who writes which file, and how they agree.

No weights travel, only a few words: they go through `torch.distributed`'s store, in which every
wait can look after the one it waits for. Each process lets its heart beat there, from a thread
that also says how far it is. One that dies, hangs or fails ends the run on all others, by its
name. Rejected: gloo's collectives. A wait in one of them ends by a fixed time, which must exceed
the longest share of work, and does not say whom it waited for.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from .errors import RankError

# Seconds: between beats, until a silent process counts as dead, until one that never was heard
# does, and until one that does not advance counts as hanging.
BEAT, SILENCE, JOINING, STANDSTILL = 1.0, 15.0, 25.0, 600.0
_GLANCE = 0.05
# How long rank 0 waits for the others when all is over.
_FAREWELL = 5.0


@runtime_checkable
class Group(Protocol):
    """The processes of a conversion. All call the same methods in the same order."""

    rank: int
    size: int

    def tell(self, key: str, value: object) -> None:
        """Say something under this rank's name; plain values for JSON."""
        ...

    def hear(self, key: str, rank: int, standstill: float = math.inf) -> Any:
        """What a rank told, once it has; it may be still for `standstill` seconds until then.

        Raises:
            RankError: it died, hangs or failed, or another one did.
        """
        ...

    def advance(self, nbytes: int) -> None:
        """Say that work was done.

        Raises:
            RankError: as `hear`, of any rank.
        """
        ...

    def fail(self, error: BaseException) -> RankError | None:
        """Tell all others to end; what another one had told before, if that is the cause."""
        ...

    def close(self) -> None:
        """End; nothing is told or heard after this."""
        ...


class Alone:
    """A single process, which has nobody to agree with."""

    rank, size = 0, 1

    def tell(self, key: str, value: object) -> None:
        """Nobody listens."""

    def hear(self, key: str, rank: int, standstill: float = math.inf) -> Any:
        """Nobody tells."""

    def advance(self, nbytes: int) -> None:
        """Nobody waits."""

    def fail(self, error: BaseException) -> RankError | None:
        """Nobody has to know."""
        return None

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class _Pulse:
    """The last beat that was seen of a rank, and when it changed, as this process counts."""

    beat: bytes = b""
    progress: bytes = b""
    seen: float = field(default_factory=time.monotonic)
    advanced: float = field(default_factory=time.monotonic)

    @property
    def still(self) -> float:
        """Seconds without progress."""
        return time.monotonic() - self.advanced


class Ranks:
    """The processes that `torchrun` started, or that have its environment variables.

    Args:
        store: shared by all; `joined` makes it.
        rank, size: this process's number, and how many there are.
        silence: seconds without a beat after which a process counts as dead.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        silence: float = SILENCE,
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._silence = store, silence
        self._pulses = {other: _Pulse() for other in range(size) if other != rank}
        self._done, self._looked = 0, 0.0
        self._stop = threading.Event()
        self._own = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        self._ask(lambda: store.set(f"name/{rank}", self._own))
        # Whoever joined has beaten once: from then on its silence counts.
        self._ask(lambda: store.set(f"beat/{rank}", "0 0"))
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def tell(self, key: str, value: object) -> None:
        """As `Group.tell`."""
        text = json.dumps(value)
        self._ask(lambda: self._store.set(f"{key}/{self.rank}", text))

    def hear(self, key: str, rank: int, standstill: float = math.inf) -> Any:
        """As `Group.hear`."""
        name = f"{key}/{rank}"
        while not self._has(name):
            self._look_after()
            if rank in self._pulses and self._pulses[rank].still > standstill:
                raise RankError(
                    f"{self._name(rank)} did nothing for {standstill:.0f} s: it hangs; look at its "
                    f"output, and run again"
                )
            time.sleep(_GLANCE)
        return json.loads(self._get(name))

    def advance(self, nbytes: int) -> None:
        """As `Group.advance`."""
        self._done += nbytes
        if time.monotonic() - self._looked > BEAT:
            self._look_after()

    def fail(self, error: BaseException) -> RankError | None:
        """As `Group.fail`."""
        own = f"{self._own} failed: {type(error).__name__}: {error}"
        # A store that is gone is known to everybody; what failed first is what counts.
        with suppress(RuntimeError):
            text = str(error) if isinstance(error, RankError) else own
            first = bytes(self._store.compare_set("failed", "", text)).decode()
            return RankError(first) if first not in (text, own) else None
        return None

    def close(self) -> None:
        """As `Group.close`; rank 0, where the store may live, lets the others hear why it ends."""
        with suppress(RuntimeError):
            self._store.set(f"bye/{self.rank}", "")
            deadline = time.monotonic() + _FAREWELL
            others = [f"bye/{rank}" for rank in self._pulses]
            while self.rank == 0 and time.monotonic() < deadline and not self._store.check(others):
                time.sleep(_GLANCE)
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT / 2):
            beat += 1
            try:
                self._store.set(f"beat/{self.rank}", f"{beat} {self._done}")
            except RuntimeError:
                return

    def _look_after(self) -> None:
        """Raise RankError if a rank failed, died or hangs."""
        self._looked = time.monotonic()
        if self._has("failed"):
            raise RankError(self._get("failed").decode())
        for rank, pulse in self._pulses.items():
            if self._has(f"beat/{rank}"):
                beat, _, progress = self._get(f"beat/{rank}").partition(b" ")
                if beat != pulse.beat:
                    pulse.beat, pulse.seen = beat, self._looked
                if progress != pulse.progress:
                    pulse.progress, pulse.advanced = progress, self._looked
            patience = self._silence if pulse.beat else max(self._silence, JOINING)
            if self._looked - pulse.seen > patience:
                raise RankError(
                    f"{self._name(rank)} gave no sign of life for {patience:.0f} s: it died "
                    f"or hangs; look at its output, and run again"
                )

    def _name(self, rank: int) -> str:
        return self._get(f"name/{rank}").decode() if self._has(f"name/{rank}") else f"rank {rank}"

    def _has(self, key: str) -> bool:
        return bool(self._ask(lambda: self._store.check([key])))

    def _get(self, key: str) -> bytes:
        return bytes(self._ask(lambda: self._store.get(key)))

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        # torch's errors of a store are RuntimeErrors.
        except RuntimeError as error:
            raise RankError(
                f"the processes' common store does not answer ({str(error).splitlines()[0]}): "
                f"rank 0 or torchrun died"
            ) from error


@contextmanager
def joined() -> Iterator[Group]:
    """The group that the environment says this process belongs to: torchrun's, or none.

    Raises:
        RankError: the others cannot be reached.
    """
    group: Group = Alone()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=30))))
        except (RuntimeError, ValueError) as error:
            raise RankError(f"the other processes cannot be reached: {error}") from error
        group = Ranks(store, rank, size, SILENCE)
    try:
        yield group
    except BaseException as error:
        group.fail(error)
        raise
    finally:
        group.close()


def shares(sizes: Mapping[int, int], size: int) -> list[list[int]]:
    """Files for each process, by number: the largest first, to whoever has the fewest bytes."""
    loads: Sequence[list[int]] = [[0, rank] for rank in range(size)]
    owned: list[list[int]] = [[] for _ in range(size)]
    for number in sorted(sizes, key=lambda one: (-sizes[one], one)):
        least = min(loads)
        owned[least[1]].append(number)
        least[0] += sizes[number]
    return [sorted(one) for one in owned]
