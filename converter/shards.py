"""A model that training has split over processes: which box of each whole tensor is where.

Each process says what it holds, by its own names. From that all compute the same table of whole
tensors, so that nothing else has to be agreed on. Megatron-Core's cuts are in `sources/cuts.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .errors import RecipeError, ShapeError
from .facts import is_whole
from .layout import Shape
from .model import ModelSpec
from .parallel import check_rank
from .sources.cuts import Cut, cut_of, numbered_expert
from .sources.megatron_names import IGNORED, layer_name, layer_of, unwrapped
from .sources.tiling import check_tiling


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is in a model that training has split; by default it has all of it.

    Expert `e` of expert rank r is expert `r · experts of a rank + e`, and inside each expert
    `expert_tp_size` ranks share its width (by default the tensor parallel ones). Layers are
    numbered from 0 in their pipeline stage; `first_layer` is the stage's first in the whole model,
    by default as if all stages were equal. Any number of processes may be in one place.

    Raises:
        RecipeError: a rank is outside its size.
    """

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    expert_tp_size: int | None = None
    expert_tp_rank: int | None = None
    first_layer: int | None = None

    def __post_init__(self) -> None:
        if (self.expert_tp_size is None) != (self.expert_tp_rank is None):
            raise RecipeError("expert_tp_size and expert_tp_rank go together; give both")
        for kind, (rank, size) in {
            "tp": (self.tp_rank, self.tp_size),
            "pp": (self.pp_rank, self.pp_size),
            "ep": (self.ep_rank, self.ep_size),
            "expert_tp": self.share(True),
        }.items():
            check_rank(kind, rank, size)
        if self.first_layer is not None and not (
            is_whole(self.first_layer) and self.first_layer >= 0
        ):
            raise RecipeError(f"first_layer must be a layer's number, found {self.first_layer!r}")

    def share(self, expert: bool) -> tuple[int, int]:
        """(rank, size) of those who share an expert's tensor, or any other."""
        if expert and self.expert_tp_size is not None and self.expert_tp_rank is not None:
            return self.expert_tp_rank, self.expert_tp_size
        return self.tp_rank, self.tp_size

    def layer(self, spec: ModelSpec) -> int:
        """The number of the first layer here in the whole model."""
        if self.first_layer is not None or self.pp_size == 1:
            return self.first_layer or 0
        if spec.num_layers % self.pp_size:
            raise RecipeError(
                f"{spec.num_layers} layers on pp_size = {self.pp_size} stages: which stage has "
                f"which is not known; give first_layer"
            )
        return self.pp_rank * (spec.num_layers // self.pp_size)


@dataclass(frozen=True)
class Kind:
    """What others have to know of a tensor; strides in elements."""

    shape: Shape
    strides: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Held:
    """What a process has: its place and its tensors by their own names."""

    place: Place
    kinds: Mapping[str, Kind]


@dataclass(frozen=True)
class Local:
    """A box in its holder's tensor: strides and first element, in elements."""

    strides: Shape
    offset: int


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor's grid, and the processes that hold it."""

    start: Shape
    shape: Shape
    holders: dict[int, Local] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    """A whole tensor of `shape`, whose memory is `grid`, cut into pieces."""

    shape: Shape
    grid: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def meeting(self, first: int, stop: int) -> list[Piece]:
        """The pieces with some of [first, stop) of the first axis, in order.

        All experts of a layer may be one tensor, of which a move reads one.
        """
        bands = self._bands.items()
        near = [n for (low, high), own in bands if low < stop and first < high for n in own]
        return [self.pieces[number] for number in sorted(near)]

    @functools.cached_property
    def _bands(self) -> dict[tuple[int, int], list[int]]:
        """The pieces' numbers by their ranges of the first axis."""
        found: dict[tuple[int, int], list[int]] = {}
        for number, piece in enumerate(self.pieces):
            low, size = (piece.start[0], piece.shape[0]) if piece.start else (0, 1)
            found.setdefault((low, low + size), []).append(number)
        return found


def kinds_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Kind]:
    """A state dict's tensors, without their contents."""
    return {
        name: Kind(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        for name, tensor in tensors.items()
    }


def whole_names(held: Held, spec: ModelSpec) -> dict[str, str]:
    """Name in the whole model → the process's own name."""
    experts = spec.num_moe_experts // held.place.ep_size
    result = {}
    for own in held.kinds:
        name = unwrapped(own)
        if (place := layer_of(name)) is not None:
            name = layer_name(held.place.layer(spec) + place[0], place[1])
        result[numbered_expert(name, held.place.ep_rank * experts, experts)] = own
    return {name: own for name, own in result.items() if not any(one in name for one in IGNORED)}


def whole_tensors(processes: Sequence[Held], spec: ModelSpec) -> dict[str, Whole]:
    """The whole model's tensors. Copies that several processes hold are taken to be equal.

    Raises:
        CorruptSourceError: a tensor's pieces leave holes: a rank is missing.
        ShapeError: pieces of one tensor do not fit together.
        UnknownTensorError: no rule says how a tensor is cut.
    """
    found: dict[str, _Found] = {}
    for process, held in enumerate(processes):
        for name, own in whole_names(held, spec).items():
            box = _box(name, held.kinds[own], held.place, spec)
            one = found.setdefault(name, _Found(box.shape, box.grid, held.kinds[own].dtype))
            one.add(name, process, box, held.kinds[own].dtype)
    return {name: one.whole(name) for name, one in found.items()}


@dataclass(frozen=True)
class _Box:
    """A process's share of a whole tensor: (start, shape, where it is) of each of its parts."""

    shape: Shape
    grid: Shape
    parts: tuple[tuple[Shape, Shape, Local], ...]


class _Found:
    def __init__(self, shape: Shape, grid: Shape, dtype: torch.dtype) -> None:
        self.shape, self.grid, self.dtype = shape, grid, dtype
        self.pieces: dict[tuple[Shape, Shape], Piece] = {}

    def add(self, name: str, process: int, box: _Box, dtype: torch.dtype) -> None:
        if (box.grid, dtype) != (self.grid, self.dtype):
            raise ShapeError(
                f"{name}: process {process} has a share of {box.grid} {dtype}, others of "
                f"{self.grid} {self.dtype}; all must split one model alike"
            )
        for start, shape, local in box.parts:
            piece = self.pieces.setdefault((start, shape), Piece(start, shape))
            piece.holders[process] = local

    def whole(self, name: str) -> Whole:
        check_tiling(name, self.grid, list(self.pieces))
        return Whole(self.shape, self.grid, self.dtype, tuple(self.pieces.values()))


def _box(name: str, kind: Kind, place: Place, spec: ModelSpec) -> _Box:
    expert = ".experts." in name
    rank, size = place.share(expert)
    stacked = expert and (len(kind.shape) == 3 or "experts.weight" in name)
    split = size > 1 or (stacked and place.ep_size > 1)
    cut = cut_of(name) if split else Cut.REPLICATED
    shape, strides, axis = _memory(name, kind, cut, stacked, spec.num_moe_experts // place.ep_size)
    sizes, start = list(shape), [0] * len(shape)
    if stacked and split:
        sizes[0], start[0] = shape[0] * place.ep_size, shape[0] * place.ep_rank
    if cut is Cut.REPLICATED:
        size, rank = 1, 0
    halves = 2 if cut in (Cut.GATED, Cut.GROUPED_FC1) and spec.gated_linear_unit else 1
    width = shape[axis] // halves if shape else 1
    parts = []
    for half in range(halves):
        begin, box = list(start), list(shape)
        if shape:
            begin[axis] += (half * size + rank) * width
            box[axis] = width
        local = Local(strides, half * width * strides[axis] if shape else 0)
        parts.append((tuple(begin), tuple(box), local))
    if shape:
        sizes[axis] *= size
    grid = tuple(sizes)
    return _Box(_shape(grid, cut, kind), grid, tuple(parts))


def _memory(
    name: str, kind: Kind, cut: Cut, stacked: bool, experts: int
) -> tuple[Shape, Shape, int]:
    """A tensor's shape and strides as its memory has them, and the axis along which it is cut."""
    if cut in (Cut.GROUPED_FC1, Cut.GROUPED_FC2):
        rows = kind.shape[0] if cut is Cut.GROUPED_FC1 else kind.shape[0] // experts
        columns = kind.shape[1] // experts if cut is Cut.GROUPED_FC1 else kind.shape[1]
        if kind.strides != (kind.shape[1], 1) or experts * rows * columns != (
            kind.shape[0] * kind.shape[1]
        ):
            raise ShapeError(f"{name}: shape {kind.shape} cannot hold {experts} experts")
        axis = 2 if cut is Cut.GROUPED_FC1 else 1
        return (experts, rows, columns), (rows * columns, columns, 1), axis
    axis = 1 if cut is Cut.ROW else 0
    return kind.shape, kind.strides, axis + (1 if stacked and cut is not Cut.REPLICATED else 0)


def _shape(grid: Shape, cut: Cut, kind: Kind) -> Shape:
    """The shape under which a whole tensor goes by, where its memory has another."""
    if len(grid) == len(kind.shape):
        return grid
    experts, rows, columns = grid
    return (rows, experts * columns) if cut is Cut.GROUPED_FC1 else (experts * rows, columns)


def everywhere(tensor: torch.Tensor, processes: int) -> Whole:
    """A tensor that every process has whole."""
    shape, local = tuple(tensor.shape), Local(tuple(tensor.stride()), 0)
    piece = Piece((0,) * len(shape), shape, dict.fromkeys(range(processes), local))
    return Whole(shape, shape, tensor.dtype, (piece,))
