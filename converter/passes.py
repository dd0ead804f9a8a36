"""One pass of a refit: some target tensors are filled from parameters that live on.

Packing (what others lack, into one buffer a message), sending, and filling: first what is here, and
when the messages have arrived the rest. Addresses are fixed, so a pass is a few launches; a
parameter that has moved changes addresses in its moves alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fuseport.kernels.move import Move
from fuseport.kernels.quant import Regional, Scheme

from .backend import Copy
from .exchange import operation
from .plan import Planned, bind, storage_key
from .quantise import on_real
from .slices import View
from .transfers import Message, Part, Wanted, messages

ALIGNMENT = 256

Make = Callable[[Sequence[Move]], Copy]


@dataclass(frozen=True)
class Source:
    """A part of a parameter, by the parameter's name in the whole model."""

    name: str
    view: View


@dataclass(frozen=True)
class Feed:
    """A move whose source is a place in a live parameter, or memory that stays where it is."""

    dst: torch.Tensor
    src: Source | torch.Tensor
    shift: float = 0.0
    quant: Scheme | None = None

    def move(self, live: Mapping[str, torch.Tensor]) -> Move:
        """Over the parameters as they are now."""
        src = self.src
        if isinstance(src, Source):
            src = src.view.of(live[src.name])
        return Move(self.dst, src, self.shift, self.quant)


class Batch:
    """Feeds that run together; none is no work."""

    def __init__(self, feeds: Sequence[Feed], live: Mapping[str, torch.Tensor], make: Make) -> None:
        self._feeds, self._make = tuple(feeds), make
        self._moves = [feed.move(live) for feed in feeds]
        self._copy = make(self._moves) if feeds else None

    def run(self) -> None:
        """Launch every kind once."""
        if self._copy is not None:
            self._copy.run()

    def follow(self, moved: set[str], live: Mapping[str, torch.Tensor]) -> bool:
        """Go after parameters that have moved; False if a captured graph is no longer good."""
        touched = False
        for index, feed in enumerate(self._feeds):
            if isinstance(feed.src, Source) and feed.src.name in moved:
                self._moves[index], touched = feed.move(live), True
        if not touched or (self._copy is not None and self._copy.follow(self._moves)):
            return True
        self._copy = self._make(self._moves)
        return False


class Workspace:
    """Memory that passes share, one after the other: each takes from its beginning."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._used = 0

    def rewind(self) -> None:
        """Begin anew: what was taken before will be overwritten."""
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], aligned."""
        begin = self._used
        self._used += padded(nbytes)
        return self._memory[begin : begin + nbytes]


def padded(nbytes: int) -> int:
    """The bytes that are taken for so many."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Here:
    """What a pass works with in this process.

    `live` are the parameters by their names in the whole model.
    """

    process: int
    live: Mapping[str, torch.Tensor]
    make: Make
    group: dist.ProcessGroup | None
    device: torch.device


def workspace_bytes(tensors: Sequence[Wanted], process: int) -> int:
    """Bytes that a pass takes for messages and for matrices that arrive in parts."""
    sizes = [message.nbytes for message in messages(tensors) if _takes_part(message, process)]
    sizes += [
        move.src.numel() * move.src.dtype.itemsize
        for one in tensors
        if process in one.wanters
        for move, parts in zip(one.planned.moves, one.parts, strict=True)
        if _by_matrix(move, parts)
    ]
    return sum(map(padded, sizes))


def _takes_part(message: Message, process: int) -> bool:
    return process == message.holder or process in message.takers


def _by_matrix(move: Move, parts: Sequence[Part]) -> bool:
    """True if the source must be whole first: regions of a scale would be cut."""
    if not isinstance(move.quant, Regional) or len(parts) < 2:
        return False
    return any(_scheme(move, part.slice.dst) is None for part in parts)


def _scheme(move: Move, dst: torch.Tensor) -> Scheme | None:
    """The move's scheme for a part of its destination; None if that is not whole rows."""
    if not isinstance(move.quant, Regional):
        return move.quant
    columns = move.quant.columns
    if not dst.is_contiguous() or dst.numel() % columns:
        return None
    done = int(dst.storage_offset() - move.dst.storage_offset()) // columns
    return dataclasses.replace(move.quant, first_row=move.quant.first_row + done)


class Pass:
    """Fills target tensors, again and again. Collective over the group if anything travels.

    Args:
        tensors: what all processes fill in this pass.
        outputs: for the planned tensors that are filled here, by `storage_key`, their memory.
        workspace: where messages and matrices that arrive in parts are put.
    """

    def __init__(
        self,
        tensors: Sequence[Wanted],
        outputs: Mapping[int, torch.Tensor],
        workspace: Workspace,
        here: Here,
    ) -> None:
        self._here, self._real = here, dict(outputs)
        self._arrived: dict[int, torch.Tensor] = {}
        self._posts: list[dist.P2POp] = []
        packed = [feed for one in messages(tensors) for feed in self._post(one, workspace)]
        mine = [one for one in tensors if here.process in one.wanters]
        late = {_group(one.planned) for one in mine if self._is_late(one)}
        soon = [one for one in mine if _group(one.planned) not in late]
        then = [one for one in mine if _group(one.planned) in late]
        self._gathered: list[Feed] = []
        self._pack = Batch(packed, here.live, here.make)
        self._soon = Batch(
            [f for one in soon for f in self._fill(one, workspace)], here.live, here.make
        )
        last = [feed for one in then for feed in self._fill(one, workspace)]
        self._gather = Batch(self._gathered, here.live, here.make)
        self._last = Batch(last, here.live, here.make)

    @property
    def is_collective(self) -> bool:
        """True if this process sends or receives."""
        return bool(self._posts)

    def run(self) -> None:
        """Fill the outputs, on the current stream."""
        self._pack.run()
        works = dist.batch_isend_irecv(self._posts) if self._posts else []
        self._soon.run()
        for work in works:
            work.wait()
        self._gather.run()
        self._last.run()

    def follow(self, moved: set[str]) -> bool:
        """Go after parameters that have moved; False if a captured graph is no longer good."""
        batches = (self._pack, self._soon, self._gather, self._last)
        # Each must follow, whatever the ones before it answer.
        good = [batch.follow(moved, self._here.live) for batch in batches]
        return all(good)

    def _post(self, message: Message, workspace: Workspace) -> Iterator[Feed]:
        """Register a message's sends or receive; the feeds that pack it."""
        here = self._here
        if not _takes_part(message, here.process):
            return
        buffer = workspace.take(message.nbytes)
        views = message.views(buffer)
        if here.process in message.takers:
            self._arrived |= {id(p): v for p, v in zip(message.parts, views, strict=True)}
            self._posts.append(operation(dist.irecv, buffer, message.holder, here.group))
            return
        self._posts += [operation(dist.isend, buffer, one, here.group) for one in message.takers]
        for part, view in zip(message.parts, views, strict=True):
            place = Source(part.source, part.slice.view(here.process))
            move = part.move
            yield Feed(view, place, move.shift, move.quant) if part.is_ready else Feed(view, place)

    def _is_late(self, one: Wanted) -> bool:
        """True if something must arrive, or be gathered, before the tensor can be filled."""
        pairs = zip(one.planned.moves, one.parts, strict=True)
        return any(
            _by_matrix(move, parts) or any(self._here.process in part.takers for part in parts)
            for move, parts in pairs
        )

    def _fill(self, one: Wanted, workspace: Workspace) -> Iterator[Feed]:
        for move, parts in zip(one.planned.moves, one.parts, strict=True):
            if _by_matrix(move, parts):
                yield self._by_way_of_a_matrix(move, parts, workspace)
            else:
                for part in parts:
                    quant = self._quant(_scheme(move, part.slice.dst))
                    yield self._feed(part, self._bound(part.slice.dst), quant)

    def _feed(self, part: Part, dst: torch.Tensor, quant: Scheme | None) -> Feed:
        source = self._source(part)
        if isinstance(source, torch.Tensor) and part.is_ready:
            return Feed(dst, source)
        return Feed(dst, source, part.move.shift, quant)

    def _source(self, part: Part) -> Source | torch.Tensor:
        """What has arrived, or where it is in a parameter."""
        arrived = self._arrived.get(id(part))
        if arrived is not None:
            return arrived
        return Source(part.source, part.slice.view(self._here.process))

    def _by_way_of_a_matrix(self, move: Move, parts: Sequence[Part], workspace: Workspace) -> Feed:
        """All parts of a source put together as they are; then the move itself."""
        buffer = workspace.take(move.src.numel() * move.src.dtype.itemsize)
        matrix = buffer.view(move.src.dtype).view(move.src.shape)
        for part in parts:
            # The destination of such a move is contiguous, as the matrix is.
            first = part.slice.dst.storage_offset() - move.dst.storage_offset()
            start = int(matrix.storage_offset() + first)
            dst = matrix.as_strided(part.slice.dst.shape, part.slice.dst.stride(), start)
            self._gathered.append(Feed(dst, self._source(part)))
        return Feed(self._bound(move.dst), matrix, move.shift, self._quant(move.quant))

    def _bound(self, view: torch.Tensor) -> torch.Tensor:
        return bind(view, self._real[storage_key(view)].view(-1), 0)

    def _quant(self, quant: Scheme | None) -> Scheme | None:
        return on_real(quant, self._real, self._here.device)


def _group(planned: Planned) -> object:
    """What is filled together: a group that shares scales, or the tensor alone."""
    return planned.group or id(planned)
