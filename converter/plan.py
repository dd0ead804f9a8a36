"""Source + recipe → the target's tensors, and the moves that fill them.

A plan is made of views only. Over real tensors its moves can be run as they are; over meta tensors
(a checkpoint that has not been read) `bind` puts them on real memory, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from fuseport.kernels.move import GivenScale, Move

from .layout import Shape, pairs, shape_of
from .targets.parts import TargetTensor

_Item = TypeVar("_Item")


class Allocate(Protocol):
    """Makes a target tensor: `torch.empty`, or a tensor's own `new_empty`."""

    def __call__(self, size: Shape, /, *, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `size` and `dtype`; its contents do not matter."""
        ...


@dataclass(frozen=True)
class Planned:
    """One tensor of one rank's file, with the moves that fill it completely.

    What shares a `group` is filled together; scales have no moves, but those of their weight.
    `unquantised` is the module's name of a weight that might have been quantised.
    """

    rank: int
    name: str
    dst: torch.Tensor
    moves: tuple[Move, ...]
    group: str = ""
    unquantised: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dst.numel() * self.dst.element_size()


def build(targets: Iterable[TargetTensor], allocate: Allocate) -> list[Planned]:
    """Allocate every target tensor and pair it with its sources."""
    return [plain(target, allocate) for target in targets]


def plain(target: TargetTensor, allocate: Allocate) -> Planned:
    """A tensor that is filled by its own moves alone."""
    return filled(target, target.dtype, target.quant, allocate)


def filled(
    target: TargetTensor, dtype: torch.dtype, quant: GivenScale | None, allocate: Allocate
) -> Planned:
    """`plain` with another dtype and scheme."""
    dst = allocate(shape_of(target.layout), dtype=dtype)
    moves = tuple([Move(d, s, target.shift, quant) for d, s in pairs(dst, target.layout)])
    unquantised = "" if quant else target.module
    return Planned(target.rank, target.name, dst, moves, unquantised=unquantised)


def moves_of(plan: Iterable[Planned]) -> list[Move]:
    """All moves of a plan, in its order."""
    return [move for planned in plan for move in planned.moves]


def on_meta(shape: Shape, *, dtype: torch.dtype) -> torch.Tensor:
    """Allocate nothing: a tensor of shape and strides only."""
    return torch.empty(shape, dtype=dtype, device="meta")


def storage_key(tensor: torch.Tensor) -> int:
    """The same for all views of one tensor, real or meta."""
    return int(tensor.untyped_storage()._cdata)


def extent(view: torch.Tensor) -> tuple[int, int]:
    """[first, last + 1) element of its storage that a non-empty view touches."""
    span = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    first = int(view.storage_offset())
    return first, first + int(span) + 1


def span(view: torch.Tensor) -> tuple[int, int]:
    """[first, last + 1) byte of memory that a non-empty view touches."""
    base, size = view.untyped_storage().data_ptr(), view.element_size()
    first, stop = extent(view)
    return base + first * size, base + stop * size


@dataclass(frozen=True)
class Interval:
    """Elements [start, stop) of one storage."""

    start: int
    stop: int


def intervals(views: Iterable[torch.Tensor]) -> dict[int, list[Interval]]:
    """For each storage, the merged ranges that the views touch: what has to be read."""
    touched: dict[int, list[tuple[int, int]]] = {}
    for view in views:
        if view.numel():
            touched.setdefault(storage_key(view), []).append(extent(view))
    return {key: list(_merge(sorted(spans))) for key, spans in touched.items()}


def _merge(spans: list[tuple[int, int]]) -> Iterator[Interval]:
    start, stop = spans[0]
    for low, high in spans[1:]:
        if low > stop:
            yield Interval(start, stop)
            start, stop = low, high
        stop = max(stop, high)
    yield Interval(start, stop)


def bind(view: torch.Tensor, memory: torch.Tensor, first: int) -> torch.Tensor:
    """The view over real memory: `memory` is 1-D and begins at element `first` of its storage."""
    offset = memory.storage_offset() + view.storage_offset() - first
    return memory.as_strided(view.shape, view.stride(), offset)


def batched(
    items: Iterable[_Item], cost: Callable[[_Item], int], limit: int
) -> Iterator[list[_Item]]:
    """Consecutive items that cost at most `limit` together; one that costs more comes alone."""
    batch: list[_Item] = []
    total = 0
    for item in items:
        own = cost(item)
        if batch and total + own > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += own
    if batch:
        yield batch


def batches(plan: Iterable[Planned], limit: int) -> Iterator[list[Planned]]:
    """Consecutive tensors of at most `limit` bytes together; a larger one comes alone.

    A group stays together, however large it is.
    """
    for units in batched(_units(list(plan)), _nbytes, limit):
        yield [planned for unit in units for planned in unit]


def _nbytes(unit: Iterable[Planned]) -> int:
    return sum(planned.nbytes for planned in unit)


def _units(tensors: list[Planned]) -> Iterator[list[Planned]]:
    """Tensors by themselves, and runs of tensors in which groups begin and end."""
    last = {planned.group: index for index, planned in enumerate(tensors) if planned.group}
    unit: list[Planned] = []
    end = 0
    for index, planned in enumerate(tensors):
        unit.append(planned)
        end = max(end, last.get(planned.group, index))
        if index == end:
            yield unit
            unit, end = [], index + 1
