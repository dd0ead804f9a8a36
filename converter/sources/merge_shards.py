"""Whole tensors from the shards of tensor-, pipeline- and expert-parallel ranks.

`cuts.RULES` says which tensor is cut along which axis. Nothing is concatenated: each whole
tensor is a `Stored` whose pieces are views of the ranks' shards.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import (
    CorruptSourceError,
    MissingTensorError,
    ShapeError,
    UnsupportedOptionError,
)
from .cuts import Cut, cut_of, is_expert, numbered_expert
from .megatron_names import unwrapped
from .merge_fp8 import merge_fp8
from .stored import Piece, Shape, Stored
from .stored_fp8 import StoredFp8
from .tiling import check_tiling

# Tensor-, pipeline- and expert-parallel rank.
Rank = tuple[int, int, int]
Shard = torch.Tensor | StoredFp8
Shards = dict[Rank, dict[str, Shard]]

_GROUPED_STATE = re.compile(r"\.experts\.linear_fc[12]\._extra_state$")
_TIED = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class _Grid:
    """Sizes of the three kinds of parallelism, and the facts that the cuts depend on."""

    tp: int
    pp: int
    ep: int
    facts: Mapping[str, object]

    @property
    def gated(self) -> bool:
        names = ("swiglu", "gated_linear_unit", "quick_geglu")
        if all(self.facts.get(name) is None for name in names):
            raise UnsupportedOptionError(
                "the arguments do not say whether MLPs are gated, and tensor-parallel shards "
                "cannot be put together without: give swiglu (or gated_linear_unit)"
            )
        return any(bool(self.facts.get(name)) for name in names)

    def local_experts(self, name: str) -> int:
        for fact in ("num_moe_experts", "num_experts"):
            count = self.facts.get(fact)
            if isinstance(count, int) and count > 0 and count % self.ep == 0:
                return count // self.ep
        raise UnsupportedOptionError(
            f"{name}: num_moe_experts must be given and divisible by the {self.ep} expert ranks"
        )


def merge_shards(shards: Shards, facts: Mapping[str, object]) -> dict[str, Stored]:
    """One `Stored` per whole tensor, by its name in an unsharded Megatron-Core model.

    Args:
        shards: (tp, pp, ep) rank → name → tensor; layer numbers are global, expert numbers local.
        facts: the run's arguments: swiglu, num_experts, untie_embeddings_and_output_weights, …

    Raises:
        CorruptSourceError: copies that must be equal differ.
        MissingTensorError: a rank, or a rank's shard of a tensor, is missing.
        ShapeError: shards do not fit together.
        UnknownTensorError: no rule says how a tensor is cut.
        UnsupportedOptionError: a fact is missing, or experts are cut otherwise than the rest.
    """
    grid = _grid(shards, facts)
    stages: dict[str, dict[Rank, Shard]] = defaultdict(dict)
    for rank in sorted(shards):
        for name, tensor in shards[rank].items():
            stages[_global_name(unwrapped(name), rank[2], grid)][rank] = tensor
    _drop_tied_output(stages, grid)
    return {name: _whole(name, by_rank, grid) for name, by_rank in stages.items()}


def _whole(name: str, by_rank: Mapping[Rank, Shard], grid: _Grid) -> Stored:
    tensors = {rank: one for rank, one in by_rank.items() if isinstance(one, torch.Tensor)}
    if len(tensors) == len(by_rank):
        return _merge(name, tensors, grid)
    return merge_fp8(name, by_rank, lambda parts: _merge(name, parts, grid))


def merge_states(
    states: Mapping[Rank, Mapping[str, object]], facts: Mapping[str, object]
) -> list[dict[str, object]]:
    """For each tensor-parallel rank its module states, by their names in the whole model.

    A grouped linear's state is one for all experts of an expert rank; behind `_extra_state` its
    name has the number of their first, unless that is 0.

    Raises:
        MissingTensorError, UnsupportedOptionError, ShapeError: as `merge_shards`.
    """
    grid = _grid(states, facts)
    ranks: list[dict[str, object]] = [{} for _ in range(grid.tp)]
    for tp, pp, ep in sorted(states):
        for name, state in states[tp, pp, ep].items():
            # Expert ranks are data-parallel ones to all that is no expert: they hold copies.
            ranks[tp].setdefault(_state_name(unwrapped(name), ep, grid), state)
    return ranks


def _state_name(name: str, ep_rank: int, grid: _Grid) -> str:
    if ep_rank and _GROUPED_STATE.search(name):
        return f"{name}{ep_rank * grid.local_experts(name)}"
    return _global_name(name, ep_rank, grid)


def _grid(shards: Collection[Rank], facts: Mapping[str, object]) -> _Grid:
    if not shards:
        raise MissingTensorError("no rank was given")
    tp, pp, ep = (max(axis) + 1 for axis in zip(*shards, strict=True))
    if tp * pp * ep != len(shards):
        raise MissingTensorError(f"{len(shards)} ranks, expected {tp} × {pp} × {ep}")
    expert_tp = facts.get("expert_tensor_parallel_size")
    if facts.get("num_experts") and expert_tp not in (None, tp):
        raise UnsupportedOptionError(
            f"expert_tensor_parallel_size {expert_tp} differs from the tensor parallel size {tp}"
        )
    return _Grid(tp, pp, ep, facts)


def _global_name(name: str, ep_rank: int, grid: _Grid) -> str:
    """Expert e of expert rank r is expert r × (experts of a rank) + e of the model."""
    if grid.ep == 1 or not is_expert(name):
        return name
    count = grid.local_experts(name)
    return numbered_expert(name, ep_rank * count, count)


def _drop_tied_output(stages: dict[str, dict[Rank, Shard]], grid: _Grid) -> None:
    """Tied embeddings: the last stage's copy must be the first's, and is then left out."""
    if grid.facts.get("untie_embeddings_and_output_weights") is not False:
        return
    for rank, tensor in stages.pop(_OUTPUT, {}).items():
        first = stages.get(_TIED, {}).get((rank[0], 0, rank[2]))
        if not isinstance(first, torch.Tensor) or not isinstance(tensor, torch.Tensor):
            raise MissingTensorError(f"{_TIED}: no plain tensor on all pipeline stages, but tied")
        _check_equal(_OUTPUT, (rank[0], 0, rank[2]), first, rank, tensor)


def _check_equal(name: str, one: Rank, a: torch.Tensor, other: Rank, b: torch.Tensor) -> None:
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
        raise CorruptSourceError(
            f"{name}: the copies of (tp, pp, ep) ranks {one} and {other} must be equal and differ"
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: NaN equals itself, and 0 differs from -0."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _merge(name: str, by_rank: dict[Rank, torch.Tensor], grid: _Grid) -> Stored:
    cut = cut_of(name)
    grouped = cut in (Cut.GROUPED_FC1, Cut.GROUPED_FC2)
    # Each expert rank has experts of its own; of anything else all hold the same.
    copies: dict[tuple[int, int], tuple[Rank, torch.Tensor]] = {}
    for rank, tensor in by_rank.items():
        slot = (rank[0], rank[2] if grouped else 0)
        if cut is Cut.REPLICATED:
            slot = (0, 0)
        first = copies.setdefault(slot, (rank, tensor))
        if first[1] is not tensor:
            _check_equal(name, *first, rank, tensor)
    found = {slot: tensor for slot, (_, tensor) in copies.items()}
    if cut is Cut.REPLICATED:
        _check_tp(name, {rank[0] for rank in by_rank}, grid)
        return _stored(name, [_whole_piece(found[0, 0])], tuple(found[0, 0].shape))
    _check_tp(name, {tp for tp, _ in found}, grid)
    if grouped:
        return _merge_grouped(name, found, cut, grid)
    shards = [found[tp, 0] for tp in range(grid.tp)]
    return _merge_dense(name, shards, cut, grid)


def _check_tp(name: str, found: set[int], grid: _Grid) -> None:
    missing = sorted(set(range(grid.tp)) - found)
    if missing:
        raise MissingTensorError(f"{name}: not on tensor-parallel ranks {missing}")


def _whole_piece(tensor: torch.Tensor) -> Piece:
    return Piece((0,) * tensor.dim(), tuple(tensor.shape), tensor)


def _stored(name: str, pieces: list[Piece], grid: Shape, shape: Shape | None = None) -> Stored:
    check_tiling(name, grid, [(piece.offset, piece.shape) for piece in pieces])
    dtypes = {piece.data.dtype for piece in pieces if isinstance(piece.data, torch.Tensor)}
    if len(dtypes) != 1:
        raise ShapeError(f"{name}: its shards have different dtypes: {dtypes}")
    return Stored(name, shape or grid, dtypes.pop(), tuple(pieces), grid if shape else None)


def _merge_dense(name: str, shards: Sequence[torch.Tensor], cut: Cut, grid: _Grid) -> Stored:
    axis = 1 if cut is Cut.ROW else 0
    if shards[0].dim() <= axis or len({tensor.shape for tensor in shards}) > 1:
        shapes = [tuple(tensor.shape) for tensor in shards]
        raise ShapeError(f"{name}: shards of shapes {shapes} do not fit together along axis {axis}")
    shape = list(shards[0].shape)
    shape[axis] *= grid.tp
    return _stored(name, _side_by_side(name, shards, axis, cut, grid), tuple(shape))


def _side_by_side(
    name: str, shards: Sequence[torch.Tensor], axis: int, cut: Cut, grid: _Grid
) -> list[Piece]:
    """The ranks' shards at their places along `axis`."""
    if cut in (Cut.GATED, Cut.GROUPED_FC1) and grid.tp > 1 and grid.gated:
        return _halves(name, shards, axis)
    width = shards[0].shape[axis]
    return [_at(tensor, axis, tp * width) for tp, tensor in enumerate(shards)]


def _halves(name: str, shards: Sequence[torch.Tensor], axis: int) -> list[Piece]:
    """Each shard is [gate; up] along `axis`: the whole is all gates, then all ups."""
    rows = shards[0].shape[axis]
    if rows % 2:
        raise ShapeError(f"{name}: {rows} rows of a gated MLP cannot be halved into gate and up")
    return [
        _at(half, axis, (number * len(shards) + tp) * (rows // 2))
        for tp, tensor in enumerate(shards)
        for number, half in enumerate(tensor.chunk(2, axis))
    ]


def _at(tensor: torch.Tensor, axis: int, start: int) -> Piece:
    offset = [0] * tensor.dim()
    offset[axis] = start
    return Piece(tuple(offset), tuple(tensor.shape), tensor)


def _merge_grouped(
    name: str, found: Mapping[tuple[int, int], torch.Tensor], cut: Cut, grid: _Grid
) -> Stored:
    """The parameter's shape is [H, E·2F] or [E·F, H]; its memory is [E, H, 2F] or [E, F, H]."""
    count = grid.local_experts(name)
    axis = 2 if cut is Cut.GROUPED_FC1 else 1
    pieces: list[Piece] = []
    for ep in range(grid.ep):
        shards = [_per_expert(name, found.get((tp, ep)), count, axis) for tp in range(grid.tp)]
        parts = _side_by_side(name, shards, axis, cut, grid)
        pieces += [Piece((ep * count, *p.offset[1:]), p.shape, p.data) for p in parts]
    box = list(shards[0].shape)
    box[0], box[axis] = count * grid.ep, box[axis] * grid.tp
    experts, rows, columns = box
    shape = (rows, experts * columns) if axis == 2 else (experts * rows, columns)
    return _stored(name, pieces, (experts, rows, columns), shape)


def _per_expert(name: str, tensor: torch.Tensor | None, count: int, axis: int) -> torch.Tensor:
    if tensor is None:
        raise MissingTensorError(f"{name}: missing on an expert-parallel rank")
    if tensor.dim() != 2 or tensor.shape[axis - 1] % count:
        raise ShapeError(f"{name}: shape {tuple(tensor.shape)} cannot hold {count} experts")
    rows = tensor.shape[0] if axis == 2 else tensor.shape[0] // count
    return tensor.reshape(count, rows, -1)
