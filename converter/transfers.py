"""The plan of a refit over processes: which slice of which target tensor each of them sends.

Every process computes the same plan, so nothing is negotiated. A slice that a process lacks comes
from one that holds it; copies take turns. Casts happen before a slice travels where they make it
smaller. A weight with a scale for each region is quantised by its holders, and travels as codes and
scales, if no region is cut; else its elements travel as they are and are quantised where the whole
weight is. So no region's amax has ever to be merged, and the bits are the whole weight's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import GivenScale, NvScale

from .codes import Box, box_of, scales_of
from .plan import Planned, storage_key
from .shards import Whole
from .slices import Slice, slices


@dataclass(frozen=True)
class Part:
    """A slice of a move's source.

    Attributes:
        move: the move whose `dst` it fills a part of.
        source: the whole tensor's name.
        slice: where in the move, and in its holders' memory.
        holder: the process that sends it.
        takers: the processes that need it and lack it.
        dtype: what travels.
        box: whole regions of a quantised matrix, which travel as codes with their scales.
    """

    move: Move
    source: str
    slice: Slice
    holder: int
    takers: tuple[int, ...]
    dtype: torch.dtype
    box: Box | None = None

    @property
    def cargo(self) -> tuple[torch.Tensor, ...]:
        """What travels, as meta tensors: elements, or codes and scales."""
        elements = torch.empty(self.slice.dst.shape, dtype=self.dtype, device="meta")
        return (elements,) if self.box is None else (elements, scales_of(self.box))

    @property
    def nbytes(self) -> int:
        """Bytes that travel to each taker."""
        return sum(one.nbytes for one in self.cargo)

    @property
    def is_ready(self) -> bool:
        """True if it travels as the target has it, False if the taker converts it."""
        return self.dtype is not self.move.src.dtype


@dataclass(frozen=True)
class Wanted:
    """A target tensor, who fills one, and the parts of each of its moves."""

    planned: Planned
    wanters: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]


# A meta tensor's `storage_key` → the whole tensor's name and pieces.
Sources = Mapping[int, tuple[str, Whole]]


def wanted(
    plan: Sequence[Planned], sources: Sources, wants: Sequence[Sequence[int]]
) -> list[Wanted]:
    """Who fills which target tensor from what.

    Args:
        plan: every rank's target tensors, over meta tensors.
        sources: the whole tensors that the plan's moves read.
        wants: for each process the target's ranks that it fills.
    """
    fillers = {
        rank: tuple(process for process, ranks in enumerate(wants) if rank in ranks)
        for rank in {planned.rank for planned in plan}
    }
    return [
        _wanted(planned, fillers[planned.rank], sources, turn) for turn, planned in enumerate(plan)
    ]


def _wanted(planned: Planned, wanters: tuple[int, ...], sources: Sources, turn: int) -> Wanted:
    def parts(move: Move) -> Iterator[Part]:
        name, whole = sources[storage_key(move.src)]
        for one in slices(elements_of(move), move.src, whole):
            holders = sorted(one.piece.holders)
            takers = tuple(process for process in wanters if process not in one.piece.holders)
            yield Part(move, name, one, holders[turn % len(holders)], takers, _travels_as(move))

    found = tuple(tuple(parts(move)) for move in planned.moves)
    return Wanted(planned, wanters, _coded(found))


def elements_of(move: Move) -> torch.Tensor:
    """The move's destination, an element for each of the source's.

    NVFP4 has two codes in a byte: there it is a meta tensor that stands for them.
    """
    if isinstance(move.quant, NvScale):
        return torch.empty(move.src.shape, dtype=move.dst.dtype, device="meta")
    return move.dst


def _coded(found: tuple[tuple[Part, ...], ...]) -> tuple[tuple[Part, ...], ...]:
    """The parts as codes, if something travels and all of them are whole regions."""
    parts = [part for one in found for part in one]
    boxes = {id(part): box_of(part.move, part.slice.dst) for part in parts}
    if None in boxes.values() or not any(part.takers for part in parts):
        return found

    def coded(part: Part) -> Part:
        dtype = part.move.dst.dtype
        return dataclasses.replace(part, dtype=dtype, box=boxes[id(part)])

    return tuple(tuple(map(coded, one)) for one in found)


def _travels_as(move: Move) -> torch.dtype:
    """The smaller dtype of the two, where the cast can be done by parts."""
    by_parts = move.quant is None or isinstance(move.quant, GivenScale)
    if by_parts and move.dst.dtype.itemsize < move.src.dtype.itemsize:
        return move.dst.dtype
    return move.src.dtype


@dataclass(frozen=True)
class Message:
    """What one process sends to all of `takers`: parts one behind the other, without gaps."""

    holder: int
    takers: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that each taker receives."""
        return sum(part.nbytes for part in self.parts)

    def views(self, buffer: torch.Tensor) -> list[list[torch.Tensor]]:
        """Each part's cargo in the message's buffer, uint8 [nbytes]."""
        cargoes = [part.cargo for part in self.parts]
        placed = iter(carve(buffer, [one for cargo in cargoes for one in cargo]))
        return [[next(placed) for _ in cargo] for cargo in cargoes]


def carve(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Places for tensors in a buffer, uint8 [their bytes], without gaps.

    Those of wide elements go first, so that all are aligned.
    """
    places, end = list(tensors), 0
    for index in sorted(range(len(tensors)), key=lambda one: -tensors[one].dtype.itemsize):
        one, begin = tensors[index], end
        end += one.nbytes
        places[index] = buffer[begin:end].view(one.dtype).view(one.shape)
    return places


def messages(tensors: Sequence[Wanted]) -> list[Message]:
    """All messages of a pass, in the order in which every process lists its own."""
    found: dict[tuple[int, tuple[int, ...]], list[Part]] = {}
    for part in (part for one in tensors for parts in one.parts for part in parts):
        if part.takers:
            found.setdefault((part.holder, part.takers), []).append(part)
    return [
        Message(holder, takers, tuple(parts)) for (holder, takers), parts in sorted(found.items())
    ]


def traffic(tensors: Sequence[Wanted], processes: int) -> list[list[int]]:
    """[sender][receiver]: bytes that travel in one run."""
    table = [[0] * processes for _ in range(processes)]
    for message in messages(tensors):
        nbytes = message.nbytes
        for taker in message.takers:
            table[message.holder][taker] += nbytes
    return table
