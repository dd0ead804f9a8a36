"""Drives fuseport's drop-in converters, all tensor-parallel ranks in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch

from fuseport.converter import exchange, megatron

from .cases import Case
from .megatron_reference import given_scales, shard_of, stage_of, transformer_config
from .small_models import STACKED_EXPERTS, State, random_state


def shards(case: Case, tp: int, pp: int = 1, pp_rank: int = 0, ep: int = 1) -> list[State]:
    """A stage's tensor-parallel shards of the case's random state; experts split `ep` ways."""
    held = stage_of(random_state(case), case, pp, pp_rank)
    experts = {name: value for name, value in held.items() if STACKED_EXPERTS in name}
    dense = {name: value for name, value in held.items() if name not in experts}
    result = []
    for rank in range(tp):
        # Ranks run expert-parallel fastest.
        local = {name: value.chunk(ep)[rank % ep] for name, value in experts.items()}
        sliced = shard_of(local, case, tp // ep, rank // ep)
        result.append(shard_of(dense, case, tp, rank) | sliced)
    return result


def convert_stage(
    held: Sequence[State],
    config: Any,
    vocab: int,
    dtype: str = "float32",
    *,
    pp: int = 1,
    pp_rank: int = 0,
    ep: int = 1,
    scales: Mapping[str, float] | None = None,
    names: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[State]:
    """What `DistributedTRTLLMModelWeightsConverter` makes of a stage, rank by rank."""
    tp, result = len(held), []
    with one_process(held):
        for rank, shard in enumerate(held):
            converter = megatron.DistributedTRTLLMModelWeightsConverter(
                config,
                dtype,
                scales=given_scales(scales),
                parallel=megatron.Parallel(tp, rank, pp, pp_rank, ep),
                **options,
            )
            converter.convert(shard, names or {}, vocab)
            result.append(dict(converter.trtllm_model_weights))
    return result


def convert_case(
    case: Case, tp: int, pp: int = 1, pp_rank: int = 0, ep: int = 1, **options: Any
) -> list[State]:
    """The same for a stage of the case's random state."""
    held = shards(case, tp, pp, pp_rank, ep)
    stage: dict[str, Any] = {"pp": pp, "pp_rank": pp_rank, "ep": ep}
    return convert_stage(held, transformer_config(case), case.vocab, **stage, **options)


@contextlib.contextmanager
def one_process(held: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """Ranks find each other's rows in `held`, the state dicts of all of them, without a group."""

    def rows_of_all(
        tensor: torch.Tensor,
        wanted: Sequence[Sequence[exchange.Rows]],
        *,
        rank: int,
        rows: int,
        group: None,
    ) -> torch.Tensor:
        moved = exchange.transfers(tensor.shape[0], wanted)
        if all(one.holder == one.wanter for one in moved):
            return exchange.exchange_rows(tensor, wanted, rank=rank, rows=rows, group=group)
        key = next(k for k, v in held[rank].items() if v.data_ptr() == tensor.data_ptr())
        whole = torch.cat([shard[key] for shard in held])
        found = torch.cat([whole[start:stop] for start, stop in wanted[rank]])
        padding = found.new_zeros((rows - found.shape[0], *found.shape[1:]))
        return torch.cat([found, padding])

    with mock.patch.object(megatron, "exchange_rows", rows_of_all):
        yield
