"""One pass of a refit: some target tensors are filled from parameters that live on.

Packing (what others lack, into one buffer a message), sending, and filling: first what is here, and
when the messages have arrived the rest. Addresses are fixed, so a pass is a few launches; a
parameter that has moved changes addresses in its moves alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fuseport.kernels.move import Move
from fuseport.kernels.quant import NvScale, Regional, Scheme, placed

from .backend import Make
from .codes import Box, own_scheme, scales_of
from .exchange import operation
from .feeds import Batch, Feed, Source, Workspace, padded
from .plan import bind, storage_key
from .refit_amax import Merge, shared_amaxes, takes_part
from .transfers import Message, Part, Wanted, carve, elements_of, messages
from .turns import in_turn


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
    for one in tensors:
        if process not in one.wanters:
            continue
        for move, parts in zip(one.planned.moves, one.parts, strict=True):
            if _by_matrix(move, parts):
                sizes.append(move.src.numel() * move.src.dtype.itemsize)
            sizes += [part.nbytes for part in parts if _is_staged(part, process)]
    return sum(map(padded, sizes))


def _takes_part(message: Message, process: int) -> bool:
    return process == message.holder or process in message.takers


def _by_matrix(move: Move, parts: Sequence[Part]) -> bool:
    """True if the source must be whole first: regions of a scale would be cut."""
    if not isinstance(move.quant, Regional) or len(parts) < 2:
        return False
    return any(part.box is None and _scheme(move, part.slice.dst) is None for part in parts)


def _is_staged(part: Part, process: int) -> bool:
    """True if codes are made here beside the matrix that has them as some of its columns."""
    if part.box is None or process in part.takers:
        return False
    return part.box.columns != part.box.quant.columns


def _scheme(move: Move, dst: torch.Tensor) -> Scheme | None:
    """The move's scheme for a part of its destination; None if that is not whole rows.

    Nor is there one for a part of NVFP4, which counts in elements and not in bytes.
    """
    if not isinstance(move.quant, Regional):
        return move.quant
    if isinstance(move.quant, NvScale):
        return None
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
        first: parameters; what comes from them alone, as it is, is filled by `begin`.
    """

    def __init__(
        self,
        tensors: Sequence[Wanted],
        outputs: Mapping[int, torch.Tensor],
        workspace: Workspace,
        here: Here,
        first: Collection[str] = (),
    ) -> None:
        self._here, self._real = here, dict(outputs)
        self._arrived: dict[int, Sequence[torch.Tensor]] = {}
        self._posts: list[dist.P2POp] = []
        packed = [feed for one in messages(tensors) for feed in self._post(one, workspace)]
        mine = [one for one in tensors if here.process in one.wanters]
        shared = shared_amaxes(tensors) if here.group is not None else {}
        early, soon, then = in_turn(
            mine, first, lambda one: self._is_late(one) or takes_part(one, shared)
        )
        self._gathered: list[Feed] = []
        self._pack = Batch(packed, here.live, here.make)
        self._first, self._soon = (
            Batch([f for one in ones for f in self._fill(one, workspace)], here.live, here.make)
            for ones in (early, soon)
        )
        last = [feed for one in then for feed in self._fill(one, workspace)]
        self._gather = Batch(self._gathered, here.live, here.make)
        self._last = Batch(last, here.live, here.make)
        self._merge: Merge | None = None
        if shared and here.group is not None:
            self._merge = Merge(shared, self._real, here.group, here.device)

    def run(self) -> None:
        """Fill the outputs, on the current stream."""
        self.begin()
        self.finish()

    def begin(self) -> None:
        """Fill what comes from the first parameters."""
        self._first.run()

    def finish(self) -> None:
        """Fill everything else."""
        self._pack.run()
        works = dist.batch_isend_irecv(self._posts) if self._posts else []
        self._soon.run()
        for work in works:
            work.wait()
        self._gather.run()
        if self._merge is None:
            self._last.run()
        else:
            self._merge.run(self._last)

    def follow(self, moved: set[str]) -> bool:
        """Go after parameters that have moved; False if a captured graph is no longer good."""
        batches = (self._pack, self._first, self._soon, self._gather, self._last)
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
        for part, cargo in zip(message.parts, views, strict=True):
            yield self._packed(part, cargo)

    def _packed(self, part: Part, cargo: Sequence[torch.Tensor]) -> Feed:
        """What travels, made here: the elements as they are, cast, or codes and their scales."""
        move, source = part.move, self._source(part)
        if part.box is not None:
            codes, scales = cargo
            return Feed(codes, source, move.shift, own_scheme(part.box, scales))
        if part.is_ready:
            return Feed(cargo[0], source, move.shift, move.quant)
        return Feed(cargo[0], source)

    def _is_late(self, one: Wanted) -> bool:
        """True if something must arrive, or be gathered, before the tensor can be filled."""
        process = self._here.process
        return any(
            _by_matrix(move, parts)
            or any(process in part.takers or _is_staged(part, process) for part in parts)
            for move, parts in zip(one.planned.moves, one.parts, strict=True)
        )

    def _fill(self, one: Wanted, workspace: Workspace) -> Iterator[Feed]:
        for move, parts in zip(one.planned.moves, one.parts, strict=True):
            if _by_matrix(move, parts):
                yield self._by_way_of_a_matrix(move, parts, workspace)
                continue
            for part in parts:
                if part.box is not None:
                    yield from self._coded(part, part.box, workspace)
                elif len(parts) == 1:
                    yield self._feed(part, move.dst, move.quant)
                else:
                    yield self._feed(part, part.slice.dst, _scheme(move, part.slice.dst))

    def _feed(self, part: Part, view: torch.Tensor, scheme: Scheme | None) -> Feed:
        source, dst, quant = self._source(part), self._bound(view), self._quant(scheme)
        if isinstance(source, torch.Tensor) and part.is_ready:
            return Feed(dst, source)
        return Feed(dst, source, part.move.shift, quant)

    def _coded(self, part: Part, box: Box, workspace: Workspace) -> Iterator[Feed]:
        """Codes and scales of whole regions: as they have come, or made here."""
        dst, scales = self._bound(part.slice.dst), self._bound(scales_of(box))
        cargo = self._arrived.get(id(part))
        if cargo is None and not _is_staged(part, self._here.process):
            yield Feed(dst, self._source(part), part.move.shift, own_scheme(box, scales))
            return
        if cargo is None:
            cargo = carve(workspace.take(part.nbytes), part.cargo)
            self._gathered.append(self._packed(part, cargo))
        yield Feed(dst, cargo[0])
        yield Feed(scales, cargo[1])

    def _source(self, part: Part) -> Source | torch.Tensor:
        """What has arrived, or where it is in a parameter."""
        arrived = self._arrived.get(id(part))
        if arrived is not None:
            return arrived[0]
        return Source(part.source, part.slice.view(self._here.process))

    def _by_way_of_a_matrix(self, move: Move, parts: Sequence[Part], workspace: Workspace) -> Feed:
        """All parts of a source put together as they are; then the move itself."""
        buffer = workspace.take(move.src.numel() * move.src.dtype.itemsize)
        matrix = buffer.view(move.src.dtype).view(move.src.shape)
        for part in parts:
            # The destination of such a move is contiguous, as the matrix is.
            first = part.slice.dst.storage_offset() - elements_of(move).storage_offset()
            start = int(matrix.storage_offset() + first)
            dst = matrix.as_strided(part.slice.dst.shape, part.slice.dst.stride(), start)
            self._gathered.append(Feed(dst, self._source(part)))
        return Feed(self._bound(move.dst), matrix, move.shift, self._quant(move.quant))

    def _bound(self, view: torch.Tensor) -> torch.Tensor:
        return bind(view, self._real[storage_key(view)].view(-1), 0)

    def _quant(self, quant: Scheme | None) -> Scheme | None:
        return placed(quant, self._placed)

    def _placed(self, view: torch.Tensor) -> torch.Tensor:
        """A scale's view of the outputs, or an amax in scratch memory."""
        key = storage_key(view)
        if key not in self._real:
            self._real[key] = torch.empty_like(view, device=self._here.device)
        return self._bound(view)
