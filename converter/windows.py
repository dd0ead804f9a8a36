"""A plan as windows: what is read, converted and written together, within a bound of bytes.

Ranks' shares of one weight are cut in step, so that a range of the source is read once for all of
them. Files take turns, so that several are written at once. Where weights that share a scale do not
fit a window, windows that only measure the amax go before those that fill.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .cuts import Cut, Run, cuts, read_bytes
from .errors import RecipeError
from .limits import MOST_FILES, threads
from .loads import ALIGNMENT, SLACK, Loads, plan_loads
from .plan import Planned, batched, storage_key
from .sources.stored import Stored


@dataclass(frozen=True)
class Shared:
    """The amaxes that several windows share, by storage: running maxima, on the device."""

    running: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, amax: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The running maximum of a meta amax; 0 at first."""
        key = storage_key(amax)
        if key not in self.running:
            self.running[key] = torch.zeros(1, dtype=torch.float32, device=device)
        return self.running[key]


@dataclass(frozen=True)
class Window:
    """Cuts that are converted together.

    A slab holds the loads, then the runs, each at its place in `places`. With `shared`, amaxes
    come from (or, if it `measures`, go to) other windows; one that measures writes nothing.
    """

    cuts: tuple[Cut, ...]
    loads: Loads
    places: Mapping[tuple[int, int], int]
    nbytes: int
    shared: Shared | None = None
    measures: bool = False

    @property
    def runs(self) -> Iterator[Run]:
        """All runs, in the order of their places."""
        return (run for cut in self.cuts for run in cut.runs)


@dataclass(frozen=True)
class Unit:
    """Tensors that are cut in step: shares of one weight, or what shares an amax."""

    members: tuple[Planned, ...]

    @property
    def scales(self) -> dict[int, Planned]:
        """The members that moves of others write, by storage."""
        return {storage_key(one.dst): one for one in self.members if not one.moves}

    def only(self, files: Collection[int]) -> Unit:
        """Those of certain files."""
        return Unit(tuple(one for one in self.members if one.rank in files))

    def cuts(self, limit: int) -> list[Cut]:
        """All cuts, each of at most about half of `limit` bytes, if the whole is larger."""
        size = sum(
            one.nbytes + sum(read_bytes(move.src) for move in one.moves) for one in self.members
        )
        count = 1 if size * SLACK <= limit else int(2 * SLACK * size / limit) + 1
        seen: set[tuple[int, int]] = set()
        scales = self.scales
        own = [cuts(one, scales, count, seen) for one in self.members if one.moves]
        steps = itertools.zip_longest(*own)
        return [cut for step in steps for cut in step if cut is not None]


def units(plan: Sequence[Planned]) -> Iterator[Unit]:
    """Neighbours of one group, or of one name; a group stays together, whatever lies between."""
    last = {one.group: index for index, one in enumerate(plan) if one.group}
    members: list[Planned] = []
    held = -1
    for index, one in enumerate(plan):
        alike = members and not one.group and not members[-1].group and one.name == members[-1].name
        if members and index > held and not alike:
            yield Unit(tuple(members))
            members = []
        members.append(one)
        held = max(held, last.get(one.group, -1))
    if members:
        yield Unit(tuple(members))


def in_turns(all_units: Iterable[Unit]) -> Iterator[Unit]:
    """The units of a few files at a time, the file with the fewest bytes so far first."""
    queues: dict[int, list[Unit]] = {}
    for unit in all_units:
        queues.setdefault(unit.members[0].rank, []).append(unit)
    waiting = iter(queues.values())
    active = [(0, number, iter(queue)) for number, queue in
              enumerate(itertools.islice(waiting, threads(MOST_FILES)))]  # fmt: skip
    number = len(active)
    while active:
        done, own, queue = heapq.heappop(active)
        following = next(queue, None)
        if following is None:
            follower = next(waiting, None)
            if follower is not None:
                heapq.heappush(active, (done, number, iter(follower)))
                number += 1
            continue
        yield following
        taken = done + sum(one.nbytes for one in following.members)
        heapq.heappush(active, (taken, own, queue))


def windows(
    plan: Sequence[Planned], stored: Mapping[int, Stored], limit: int, files: Collection[int]
) -> Iterator[Window]:
    """The windows that fill `files`, each of at most `limit` bytes.

    Raises:
        RecipeError: the smallest piece of a tensor is larger.
    """
    pending: list[Cut] = []
    size = 0
    for unit in in_turns(_of(files, plan)):
        own = unit.only(files)
        pieces = own.cuts(limit)
        total = sum(map(_cost, pieces))
        shares = any(cut.amaxes for cut in pieces)
        apart = shares and (total > limit or len(own.members) < len(unit.members))
        if pending and (apart or (shares and size + total > limit)):
            yield _window(pending, stored, limit)
            pending, size = [], 0
        if apart:
            yield from _two_passes(unit.cuts(limit), pieces, stored, limit)
            continue
        for piece in pieces:
            if pending and size + _cost(piece) > limit:
                yield _window(pending, stored, limit)
                pending, size = [], 0
            pending.append(piece)
            size += _cost(piece)
    if pending:
        yield _window(pending, stored, limit)


def _of(files: Collection[int], plan: Sequence[Planned]) -> Iterator[Unit]:
    return (unit for unit in units(plan) if any(one.rank in files for one in unit.members))


def _two_passes(
    whole: list[Cut], own: list[Cut], stored: Mapping[int, Stored], limit: int
) -> Iterator[Window]:
    """Windows over all that shares amaxes, which measure; then windows over what is filled."""
    shared = Shared()
    for measures, pieces in ((True, whole), (False, own)):
        for batch in batched(pieces, _cost, limit):
            yield _window(batch, stored, limit, shared, measures)


def _cost(cut: Cut) -> int:
    """Bytes of a slab that a cut takes at most."""
    read = sum(read_bytes(move.src) for move in cut.moves)
    aligned = ALIGNMENT * (len(cut.runs) + len(cut.moves))
    return int(read * SLACK) + sum(run.nbytes for run in cut.runs) + aligned


def _window(
    pieces: list[Cut],
    stored: Mapping[int, Stored],
    limit: int,
    shared: Shared | None = None,
    measures: bool = False,
) -> Window:
    loads = plan_loads((move.src for cut in pieces for move in cut.moves), stored)
    end = loads.nbytes
    places: dict[tuple[int, int], int] = {}
    for cut in pieces:
        for run in cut.runs:
            places[storage_key(run.planned.dst), run.start] = end
            end += -(-run.nbytes // ALIGNMENT) * ALIGNMENT
    if end > limit:
        raise RecipeError(
            f"a piece of {pieces[0].runs[0].planned.name} takes {end} bytes at once, but a window "
            f"has {limit}; give more "
            f"host_memory (--host-memory) or gpu_memory (--gpu-memory)"
        )
    return Window(tuple(pieces), loads, places, end, shared, measures)
