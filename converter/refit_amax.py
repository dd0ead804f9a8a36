"""Scales that a refit's target ranks share, where processes fill different ranks.

Each process finds the amaxes of what it fills. All of them take the maximum of each amax that
ranks share before they quantise, so that a rank's codes and scales are those of the whole weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist

from .errors import RecipeError
from .feeds import Batch
from .shared_amax import amaxes_of, take_maxima
from .transfers import Wanted

# An amax of which target ranks, by its storage.
Shared = Mapping[int, Collection[int]]


def shared_amaxes(tensors: Sequence[Wanted]) -> Shared:
    """The amaxes that several target ranks share, in the plan's order, with these ranks."""
    ranks: dict[int, set[int]] = {}
    for one in tensors:
        for key in amaxes_of(one.planned):
            ranks.setdefault(key, set()).add(one.planned.rank)
    return {key: found for key, found in ranks.items() if len(found) > 1}


def takes_part(one: Wanted, shared: Shared) -> bool:
    """Whether a tensor has one of the shared amaxes."""
    return any(key in shared for key in amaxes_of(one.planned))


def check_filled(tensors: Sequence[Wanted], filled: Sequence[Collection[int]]) -> None:
    """Raise RecipeError if no process sees a part of what a shared scale is for.

    `filled` are the target's ranks that each process fills.
    """
    seen = set().union(*filled)
    for ranks in shared_amaxes(tensors).values():
        if missing := sorted(set(ranks) - seen):
            raise RecipeError(
                f"the target's ranks {sorted(ranks)} share scales that are computed, and no "
                f"process fills rank {missing[0]}; fill all of them, or give scales for the weights"
            )


class Merge:
    """Merges a pass's shared amaxes, between finding them and quantising.

    Args:
        shared: the pass's shared amaxes: the same on all processes.
        real: those that are found here, and others, by storage.
        group: the processes of the pass.
        device: where the amaxes are.
    """

    def __init__(
        self,
        shared: Shared,
        real: Mapping[int, torch.Tensor],
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        slots = [slot for slot, key in enumerate(shared) if key in real]
        self._own = [real[key] for key in shared if key in real]
        self._index = torch.tensor(slots, dtype=torch.int64, device=device)
        self._vector = torch.zeros(len(shared), dtype=torch.float32, device=device)
        self._group = group

    def run(self, batch: Batch) -> None:
        """Run the batch that finds this process's amaxes; without any, for the others' sake."""
        if self._own:
            batch.run(self)
        else:
            self(())
            batch.run()

    def __call__(self, amaxes: Sequence[torch.Tensor]) -> None:
        """As `FusedCopy.run` wants it; `amaxes` may have others beside the shared ones."""
        take_maxima(self._own, self._index, self._vector.zero_(), self._group)
