"""Which target tensors are filled in which round, and where they lie in the buffer of a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .feeds import Workspace, padded
from .plan import batches, storage_key
from .transfers import Wanted


def rounds(tensors: Sequence[Wanted], nbytes: int) -> list[list[Wanted]]:
    """Rounds of at most `nbytes` bytes for each target rank; all processes go through them alike.

    What shares scales stays together, and a tensor that is larger comes alone.
    """
    by_name = {id(one.planned): one for one in tensors}
    found: list[list[Wanted]] = []
    for rank in sorted({one.planned.rank for one in tensors}):
        own = [one.planned for one in tensors if one.planned.rank == rank]
        for number, batch in enumerate(batches(own, nbytes)):
            if number == len(found):
                found.append([])
            found[number] += [by_name[id(planned)] for planned in batch]
    return found


def filled(tensors: Sequence[Wanted], process: int) -> list[Wanted]:
    """Those that a process fills."""
    return [one for one in tensors if process in one.wanters]


def buffer_bytes(tensors: Sequence[Wanted], process: int) -> int:
    """Bytes of what a process fills in a round."""
    return sum(padded(one.planned.nbytes) for one in filled(tensors, process))


def laid_out(
    tensors: Sequence[Wanted], process: int, memory: Workspace
) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(storage key of the planned tensor, name, its place) of what a process fills."""
    memory.rewind()
    for one in filled(tensors, process):
        flat = memory.take(one.planned.nbytes).view(one.planned.dst.dtype)
        yield storage_key(one.planned.dst), one.planned.name, flat.view(one.planned.dst.shape)
