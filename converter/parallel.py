"""A rank's place in a sharded model, from Megatron's state, from groups, or as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from .errors import RecipeError
from .facts import is_whole


def check_groups(**groups: object) -> None:
    """Raise RecipeError for the first of these that is given and is no process group."""
    for name, group in groups.items():
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise RecipeError(
                f"{name} must be a process group that this process is in, as "
                f"torch.distributed.new_group makes one, found {group!r}"
            )


@dataclass(frozen=True)
class Parallel:
    """A rank's place: tensor, pipeline and expert parallel sizes and ranks.

    `tp_group` is needed only where rows of other tensor-parallel ranks are, and `pp_group`, the
    ranks of one pipeline in order, only where virtual pipeline chunks are. Experts are split by
    expert over `ep_size` ranks, which must divide tp, and inside each over tp / ep.

    Raises:
        RecipeError: a rank is outside its size, or ep does not divide tp.
    """

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    ep_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        for kind in ("tp", "pp"):
            check_rank(kind, getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size"))
        check_groups(tp_group=self.tp_group, pp_group=self.pp_group)
        if not is_whole(self.ep_size) or self.ep_size < 1 or self.tp_size % self.ep_size:
            raise RecipeError(f"ep_size {self.ep_size!r} does not divide tp_size {self.tp_size}")

    @classmethod
    def from_groups(
        cls,
        tp_group: dist.ProcessGroup,
        pp_group: dist.ProcessGroup | None = None,
        ep_size: int = 1,
    ) -> Parallel:
        """From plain `torch.distributed` groups."""
        check_groups(tp_group=tp_group, pp_group=pp_group)
        if not dist.is_initialized():
            raise RecipeError(
                "torch.distributed is not initialised; call init_process_group, or say where this "
                "rank is with Parallel(…)"
            )
        return cls(
            dist.get_world_size(tp_group),
            dist.get_rank(tp_group),
            1 if pp_group is None else dist.get_world_size(pp_group),
            0 if pp_group is None else dist.get_rank(pp_group),
            ep_size,
            tp_group,
            pp_group,
        )


def check_rank(kind: str, rank: int, size: int) -> None:
    """Raise RecipeError unless `rank` is one of `size`; `kind` goes before both in messages."""
    if not (is_whole(rank) and is_whole(size)):
        raise RecipeError(
            f"{kind}_rank and {kind}_size must be whole numbers, found {rank!r} and {size!r}"
        )
    if not 0 <= rank < size:
        raise RecipeError(f"{kind}_rank {rank} is outside {kind}_size {size}")


def current_parallel() -> Parallel:
    """This rank's place by Megatron's `parallel_state`.

    Raises:
        RecipeError: Megatron-Core is not installed or its parallel state is not initialised.
    """
    try:
        from megatron.core import parallel_state as state
    except ImportError as error:
        raise RecipeError(
            "Megatron-Core is not installed; say where this rank is with parallel=Parallel(…)"
        ) from error
    try:
        return Parallel(
            state.get_tensor_model_parallel_world_size(),
            state.get_tensor_model_parallel_rank(),
            state.get_pipeline_model_parallel_world_size(),
            state.get_pipeline_model_parallel_rank(),
            tp_group=state.get_tensor_model_parallel_group(),
            pp_group=state.get_pipeline_model_parallel_group(check_initialized=False),
        )
    except AssertionError as error:
        raise RecipeError(
            f"Megatron's parallel state is not initialised ({error}); initialise it, or say where "
            f"this rank is with parallel=Parallel(…)"
        ) from error
