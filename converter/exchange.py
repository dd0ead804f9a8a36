"""Rows of a sharded tensor that other ranks hold: sent between just the ranks that need them.

Each rank holds an equal run of a global tensor's rows and wants some row ranges of it. Every rank
computes the same table of transfers from that, so nothing is negotiated, and only wanted rows
travel: no gather of whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .errors import RecipeError

Rows = tuple[int, int]


@dataclass(frozen=True)
class Transfer:
    """Global rows [start, stop) from `holder` to `wanter`, where they go to row `place`."""

    holder: int
    wanter: int
    start: int
    stop: int
    place: int


def transfers(own_rows: int, wanted: Sequence[Sequence[Rows]]) -> list[Transfer]:
    """Every transfer, the ones that stay on their rank included.

    Args:
        own_rows: rows that each rank holds; rank r holds those from r · own_rows on.
        wanted: for each rank, the global row ranges that it wants, in the order of its result.
    """
    return [one for rank, ranges in enumerate(wanted) for one in _to(rank, ranges, own_rows)]


def _to(wanter: int, ranges: Sequence[Rows], own_rows: int) -> Iterator[Transfer]:
    place = 0
    for start, stop in ranges:
        while start < stop:
            holder = start // own_rows
            end = min(stop, (holder + 1) * own_rows)
            yield Transfer(holder, wanter, start, end, place)
            place += end - start
            start = end


def exchange_rows(
    tensor: torch.Tensor,
    wanted: Sequence[Sequence[Rows]],
    *,
    rank: int,
    rows: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """This rank's wanted rows, zeros behind them up to `rows` rows. Collective over `group`.

    Returns a view of `tensor` where the wanted rows are one run of its own.

    Args:
        tensor: [own rows, …], the rank's shard.
        wanted: for each rank of the group, its global row ranges.
        rank: this rank's number in the group.
        rows: rows of the result.
        group: who exchanges; not needed if nobody wants another's rows.

    Raises:
        RecipeError: rows of other ranks are wanted and there is no group.
    """
    own = tensor.shape[0]
    mine = [one for one in transfers(own, wanted) if rank in (one.holder, one.wanter)]
    if all(one.holder == one.wanter for one in transfers(own, wanted)):
        if len(mine) == 1 and mine[0].stop - mine[0].start == rows:
            return tensor.narrow(0, mine[0].start - rank * own, rows)
    elif group is None:
        raise RecipeError(
            "rows that other tensor-parallel ranks hold are needed (a vocabulary that tp does not "
            "divide, or more ranks than KV heads); give tp_group, or convert the whole model"
        )
    result = tensor.new_zeros((rows, *tensor.shape[1:]))
    _run(tensor, result, mine, rank, group)
    return result


def _run(
    tensor: torch.Tensor,
    result: torch.Tensor,
    mine: Sequence[Transfer],
    rank: int,
    group: dist.ProcessGroup | None,
) -> None:
    operations: list[dist.P2POp] = []
    first = rank * tensor.shape[0]
    for one in mine:
        count = one.stop - one.start
        source = tensor.narrow(0, one.start - first, count) if one.holder == rank else None
        place = result.narrow(0, one.place, count) if one.wanter == rank else None
        if source is not None and place is not None:
            place.copy_(source)
        elif source is not None:
            operations.append(operation(dist.isend, source.contiguous(), one.wanter, group))
        elif place is not None:
            operations.append(operation(dist.irecv, place, one.holder, group))
    run_operations(operations)


def run_operations(operations: Sequence[dist.P2POp]) -> None:
    """Start all sends and receives, and wait for them. Peers list theirs in one order."""
    if operations:
        for work in dist.batch_isend_irecv(list(operations)):
            work.wait()


def operation(
    kind: object, tensor: torch.Tensor, peer: int, group: dist.ProcessGroup | None
) -> dist.P2POp:
    """A send (`dist.isend`) to rank `peer` of the group, or a receive (`dist.irecv`) from it."""
    assert group is not None
    return dist.P2POp(kind, tensor, dist.get_global_rank(group, peer), group)  # type: ignore[arg-type]


def kv_ranges(
    heads: int, groups: int, head: int, tp: int, name: str = "linear_qkv"
) -> list[list[Rows]]:
    """Rows of an interleaved linear_qkv that each rank wants when tp exceeds the KV heads.

    For each rank: its share of one group's query rows, then that group's key and value rows.

    Raises:
        RecipeError: ranks cannot share them; names the tensor.
    """
    if tp % groups or heads % tp:
        raise RecipeError(
            f"{name}: {heads} heads and {groups} query groups on tp = {tp}: tp must be a multiple "
            f"of the groups and divide the heads"
        )
    queries = heads // groups
    share = heads // tp
    ranges = []
    for rank in range(tp):
        group, place = divmod(rank * share, queries)
        first = group * (queries + 2) * head
        key = first + queries * head
        start = first + place * head
        ranges.append([(start, start + share * head), (key, key + 2 * head)])
    return ranges


def vocabulary_ranges(size: int, tp: int) -> list[list[Rows]]:
    """Embedding rows that each rank wants: equal shares of the vocabulary without padding."""
    share = -(-size // tp)
    return [[(min(r * share, size), min((r + 1) * share, size))] for r in range(tp)]
