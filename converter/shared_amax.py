"""Scales that tensor-parallel ranks share: their amaxes are reduced, one number for each group.

A per-tensor scale belongs to the whole weight, and a rank sees its shard. Between finding the
amaxes and quantising, all ranks take the maximum of each group's: one all-reduce of a vector, and
no weight travels. The bits are those of the whole model converted in one place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fuseport.kernels.quant import NvScale, TensorScale

from .backend import Reduce
from .errors import RecipeError
from .parallel import Parallel
from .plan import Planned, storage_key


def reducer(plan: Sequence[Planned], place: Parallel) -> Reduce | None:
    """What merges a batch's amaxes over the ranks that share them; None if there are none.

    Every rank of the group must run it, and have the same plan but for its share of the experts.

    Args:
        plan: a rank's tensors, over real memory.
        place: the rank's, with its `tp_group`. Ranks with other experts take part, in places of
            the vector that are not theirs.

    Raises:
        RecipeError: there are amaxes to share, and no group.
    """
    slots, size = _slots(plan, place)
    if place.tp_size == 1 or not slots:
        return None
    if place.tp_group is None:
        raise RecipeError(
            f"scales are computed over {place.tp_size} tensor-parallel ranks, and the group of "
            f"these ranks is not known; give tp_group, or scales for the weights"
        )

    def reduce(amaxes: tuple[torch.Tensor, ...]) -> None:
        own = [slots[storage_key(amax)] for amax in amaxes]
        index = torch.tensor(own, dtype=torch.int64, device=amaxes[0].device)
        take_maxima(amaxes, index, amaxes[0].new_zeros(size), place.tp_group)

    return reduce


def take_maxima(
    amaxes: Sequence[torch.Tensor],
    index: torch.Tensor,
    vector: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> None:
    """Set each amax to the largest of all processes'. Collective over the group.

    Args:
        amaxes: fp32 [1] each, of this process.
        index: int64 [amaxes], their places in the vector.
        vector: fp32 zeros, of one length on all processes.
        group: the processes.
    """
    if amaxes:
        vector.index_copy_(0, index, torch.cat(list(amaxes)))
    dist.all_reduce(vector, dist.ReduceOp.MAX, group=group)
    for amax, most in zip(amaxes, vector[index].split(1), strict=False):
        amax.copy_(most)


def _slots(plan: Sequence[Planned], place: Parallel) -> tuple[dict[int, int], int]:
    """Storage of an amax → its place in the vector that all ranks make, and the vector's length."""
    slots: dict[int, int] = {}
    size = 0
    # Ranks run expert-parallel fastest.
    ep_rank = place.tp_rank % place.ep_size
    for planned in plan:
        new = [one for one in amaxes_of(planned) if one not in slots]
        of_experts = planned.dst.ndim == 3
        first = size + ep_rank * len(new) * of_experts
        slots |= {key: first + number for number, key in enumerate(new)}
        size += len(new) * (place.ep_size if of_experts else 1)
    return slots, size


def amaxes_of(planned: Planned) -> list[int]:
    """The storages of a tensor's amaxes, each once: of one, or of one for each expert."""
    quants = [move.quant for move in planned.moves]
    found = [one.amax for one in quants if isinstance(one, (TensorScale, NvScale))]
    return list(dict.fromkeys(map(storage_key, found)))
