"""A pipeline stage out of virtual pipeline chunks: layers come from the ranks that hold them.

Interleaved training gives pipeline rank r the chunks r, pp + r, 2·pp + r, … of a model that is cut
into equal ones; a serving engine wants one run of consecutive layers on each stage. The ranks first
tell each other the names, shapes and dtypes that they hold. From that each computes the same table
of transfers, and only layers that change their rank travel, whole and unconverted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .arguments import check_kinds
from .errors import MissingTensorError, RecipeError, UnknownTensorError
from .exchange import operation, run_operations
from .parallel import Parallel
from .sources.megatron_names import layer_name, layer_of
from .targets.trtllm_config import pp_layers


@dataclass(frozen=True)
class Kind:
    """What a receiver has to know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


# One rank's chunks, each by Megatron-Core's names.
Chunks = Sequence[Mapping[str, torch.Tensor]]
Held = Sequence[Mapping[str, Kind]]


@dataclass(frozen=True)
class Passed:
    """Tensor `name` of chunk `chunk` goes from `holder` to `wanter`, where it is `result`."""

    holder: int
    chunk: int
    name: str
    wanter: int
    result: str
    kind: Kind


def gather_stage(chunks: Chunks, num_layers: int, place: Parallel) -> dict[str, torch.Tensor]:
    """This rank's stage, layers numbered from its first. Collective over the pipeline group.

    Tensors that the rank holds itself are the caller's own, not copies.

    Args:
        chunks: the rank's chunks in order, each with its layers numbered from 0.
        num_layers: layers of the whole model.
        place: with `pp_group` where `pp_size` exceeds 1.

    Raises:
        RecipeError: there is no fitting group, or the model is not cut into equal chunks.
        MissingTensorError: a rank has no tensors.
        UnknownTensorError: a stage would have one tensor twice.
    """
    held = [{name: _kind(tensor) for name, tensor in chunk.items()} for chunk in chunks]
    moves = table(_tell(held, place), num_layers)
    device = next(tensor.device for chunk in chunks for tensor in chunk.values())
    rank, result, operations = place.pp_rank, dict[str, torch.Tensor](), list[dist.P2POp]()
    for one in moves:
        if one.holder == rank == one.wanter:
            result[one.result] = chunks[one.chunk][one.name]
        elif one.holder == rank:
            source = _bytes(chunks[one.chunk][one.name].contiguous())
            operations.append(operation(dist.isend, source, one.wanter, place.pp_group))
        elif one.wanter == rank:
            target = torch.empty(one.kind.shape, dtype=one.kind.dtype, device=device)
            result[one.result] = target
            operations.append(operation(dist.irecv, _bytes(target), one.holder, place.pp_group))
    run_operations(operations)
    return result


def chunks_as_one(
    chunks: Sequence[Mapping[str, torch.Tensor]], num_layers: int, *, pp_rank: int, pp_size: int
) -> dict[str, torch.Tensor]:
    """A pipeline rank's chunks as one state dict, layers by their numbers in the whole model.

    A refit takes it with `Place(pp_size=…, pp_rank=…, first_layer=0)`. The tensors are the
    caller's own.

    Args:
        chunks: the rank's chunks in order, each with its layers numbered from 0.
        num_layers: layers of the whole model.

    Raises:
        RecipeError: the model is not cut into equal chunks, or the rank is outside its size.
        SourceError: a chunk is no state dict.
        UnknownTensorError: two chunks have one tensor.
    """
    check_kinds(chunks=chunks, num_layers=num_layers)
    for one in chunks:
        check_kinds(state_dict=one)
    # It looks at the numbers.
    Parallel(pp_size=pp_size, pp_rank=pp_rank)
    if not chunks or num_layers % (pp_size * len(chunks)):
        raise RecipeError(
            f"{num_layers} layers in {len(chunks)} chunks on each of {pp_size} pipeline ranks: "
            f"the number of chunks must divide them"
        )
    size = num_layers // (pp_size * len(chunks))
    result: dict[str, torch.Tensor] = {}
    for chunk, tensors in enumerate(chunks):
        for name in _checked(tensors, pp_rank, chunk, size):
            place, first = layer_of(name), (chunk * pp_size + pp_rank) * size
            whole = name if place is None else layer_name(first + place[0], place[1])
            if whole in result:
                raise UnknownTensorError(
                    f"{name} is in two chunks of pipeline rank {pp_rank}; only one can have it"
                )
            result[whole] = tensors[name]
    return result


def _kind(tensor: torch.Tensor) -> Kind:
    return Kind(tuple(tensor.shape), tensor.dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory: no backend knows every dtype."""
    return tensor.view(-1).view(torch.uint8)


def _tell(held: Held, place: Parallel) -> list[Held]:
    """What every rank of the pipeline holds."""
    if place.pp_size == 1:
        return [held]
    group = place.pp_group
    if group is None or dist.get_world_size(group) != place.pp_size:
        raise RecipeError(
            f"chunks on {place.pp_size} pipeline ranks: layers that other ranks hold are needed; "
            f"give pp_group, the group of these {place.pp_size} ranks"
        )
    every: list[Held] = [[]] * place.pp_size
    dist.all_gather_object(every, held, group)
    return every


def table(ranks: Sequence[Held], num_layers: int) -> list[Passed]:
    """Where each tensor goes, the ones that stay on their rank included.

    The same on every rank, errors too: nobody is left waiting for a rank that gave up.

    Args:
        ranks: what each pipeline rank holds.
        num_layers: layers of the whole model.

    Raises:
        RecipeError, MissingTensorError, UnknownTensorError: see `gather_stage`.
    """
    size = _chunk_size(ranks, num_layers)
    stages = [pp_layers(num_layers, len(ranks), stage) for stage in range(len(ranks))]
    moves = [
        _passed(rank, chunk, name, tensors[name], (chunk * len(ranks) + rank) * size, stages)
        for rank, chunks in enumerate(ranks)
        for chunk, tensors in enumerate(chunks)
        for name in _checked(tensors, rank, chunk, size)
    ]
    _once(moves)
    return moves


def _chunk_size(ranks: Sequence[Held], num_layers: int) -> int:
    counts = [len(chunks) for chunks in ranks]
    for rank, chunks in enumerate(ranks):
        if not any(chunks):
            raise MissingTensorError(
                f"the chunks of pipeline rank {rank} hold no tensors; give each rank's own "
                f"state dicts"
            )
    if len(set(counts)) > 1 or num_layers % sum(counts):
        raise RecipeError(
            f"{num_layers} layers in {counts} chunks on the pipeline ranks: every rank must give "
            f"as many chunks, and their number must divide the layers"
        )
    return num_layers // sum(counts)


def _checked(names: Iterable[str], rank: int, chunk: int, size: int) -> Iterator[str]:
    for name in names:
        place = layer_of(name)
        if place is not None and place[0] >= size:
            raise RecipeError(
                f"{name} in chunk {chunk} of pipeline rank {rank}: chunks have {size} layers, "
                f"numbered from 0; give chunks of equal sizes, each with its own numbers"
            )
        yield name


def _passed(
    holder: int, chunk: int, name: str, kind: Kind, first: int, stages: Sequence[range]
) -> Passed:
    """`first` is the number of the chunk's first layer in the whole model."""
    place = layer_of(name)
    if place is None:
        # Embeddings are in the very first chunk, final norm and output in the last: in place.
        return Passed(holder, chunk, name, holder, name, kind)
    layer = first + place[0]
    wanter, stage = next(pair for pair in enumerate(stages) if layer in pair[1])
    result = layer_name(layer - stage.start, place[1])
    return Passed(holder, chunk, name, wanter, result, kind)


def _once(moves: Sequence[Passed]) -> None:
    seen: dict[tuple[int, str], Passed] = {}
    for one in moves:
        other = seen.setdefault((one.wanter, one.result), one)
        if other is not one:
            raise UnknownTensorError(
                f"{one.name} is in chunks {other.chunk} and {one.chunk} of pipeline rank "
                f"{one.holder}; only one of a rank's chunks can have it"
            )
