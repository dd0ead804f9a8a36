"""Which part of a view lies in a piece of the tensor that it is a view of.

A rule's view may take every third row group, exchange axes or repeat an element; a piece is a box
of the whole tensor. Each dimension of such a view steps along one axis of the tensor, so a piece's
share of it is a few boxes of the view: one where the cut falls between whole steps, more where it
falls into the middle of one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .layout import Shape
from .shards import Piece, Whole


@dataclass(frozen=True)
class View:
    """A view of a process's own tensor: strides and first element, in elements."""

    shape: Shape
    strides: Shape
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view over `tensor`'s memory."""
        start = tensor.storage_offset() + self.offset
        return tensor.detach().as_strided(self.shape, self.strides, start)


@dataclass(frozen=True)
class Slice:
    """What a piece holds of a move's source: `dst` is the part of the move's that it fills."""

    dst: torch.Tensor
    piece: Piece
    steps: tuple[Step | None, ...]
    first: Shape

    def view(self, process: int) -> View:
        """Where the elements are in a holder's tensor."""
        local = self.piece.holders[process]
        strides = (0 if one is None else one.step * local.strides[one.axis] for one in self.steps)
        places = zip(self.first, self.piece.start, local.strides, strict=True)
        offset = local.offset + sum((at - start) * stride for at, start, stride in places)
        return View(tuple(self.dst.shape), tuple(strides), offset)


@dataclass(frozen=True)
class Step:
    """A dimension of a view: `count` steps of `step` elements along an axis of the tensor."""

    axis: int
    step: int
    count: int


# A dimension's (first step, number of steps).
Span = tuple[int, int]


def slices(dst: torch.Tensor, src: torch.Tensor, whole: Whole) -> Iterator[Slice]:
    """The slices that make up a move's source, in the order of the tensor's pieces.

    Args:
        dst, src: a move's views of one shape; `src` is of a contiguous tensor of `whole.grid`.
        whole: that tensor.
    """
    if not src.numel():
        return
    start = _position(int(src.storage_offset()), whole.grid)
    steps, covered = tuple(map(_Stepper(whole.grid), src.shape, src.stride())), 0
    for piece in whole.meeting(*_rows(steps, start)):
        for spans in _spans(steps, start, piece.start, piece.shape):
            part, first = dst, list(start)
            for dim, (begin, count) in spans.items():
                step = steps[dim]
                assert step is not None
                first[step.axis] += begin * step.step
                if count != step.count:
                    part = part.narrow(dim, begin, count)
            covered += part.numel()
            yield Slice(part, piece, steps, tuple(first))
    assert covered == src.numel(), "a view's dimension runs over the end of its tensor's axis"


def _strides(grid: Shape) -> list[int]:
    return [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]


def _position(offset: int, grid: Shape) -> Shape:
    pairs = zip(_strides(grid), grid, strict=True)
    return tuple(offset // stride % size for stride, size in pairs)


def _rows(steps: Sequence[Step | None], start: Shape) -> Span:
    """[first, stop) of the tensor's first axis that a view is within; of a scalar its element."""
    first = start[0] if start else 0
    return first, first + 1 + sum((s.count - 1) * s.step for s in steps if s and not s.axis)


class _Stepper:
    """Turns a view's (size, stride) into steps along an axis; None where it stays in place."""

    def __init__(self, grid: Shape) -> None:
        self.axes = [(axis, s) for axis, s in enumerate(_strides(grid)) if grid[axis] > 1]

    def __call__(self, size: int, stride: int) -> Step | None:
        if size == 1 or stride == 0:
            return None
        axis, unit = next((axis, unit) for axis, unit in self.axes if unit <= stride)
        assert stride % unit == 0, "a view's dimension steps along two axes of its tensor"
        return Step(axis, stride // unit, size)


# Layers and experts are cut alike: of tens of thousands of calls a few dozen differ.
@functools.lru_cache(maxsize=4096)
def _spans(
    steps: tuple[Step | None, ...], start: Shape, corner: Shape, shape: Shape
) -> tuple[Mapping[int, Span], ...]:
    """Boxes of the view in a piece at `corner`: dimension → span; others are whole or stay."""
    choices: list[list[dict[int, Span]]] = []
    for axis, begin in enumerate(start):
        dims = [(d, s) for d, s in enumerate(steps) if s is not None and s.axis == axis]
        dims.sort(key=lambda pair: -pair[1].step)
        low, high = corner[axis] - begin, corner[axis] + shape[axis] - begin
        boxes = list(_inside([step for _, step in dims], low, high))
        numbers = [dim for dim, _ in dims]
        choices.append([dict(zip(numbers, box, strict=True)) for box in boxes])
    return tuple(
        {dim: span for one in chosen for dim, span in one.items()}
        for chosen in itertools.product(*choices)
    )


def _inside(steps: Sequence[Step], low: int, high: int) -> Iterator[tuple[Span, ...]]:
    """Boxes of the steps, the longest first, whose sums of positions are in [low, high)."""
    if not steps:
        if low <= 0 < high:
            yield ()
        return
    step, rest = steps[0], steps[1:]
    reach = sum((one.count - 1) * one.step for one in rest)
    first, stop = _range(low, high - reach, step)
    if first < stop:
        yield ((first, stop - first), *((0, one.count) for one in rest))
    # Where the cut falls into the middle of a step.
    for index in range(*_range(low - reach, high, step)):
        if not first <= index < stop:
            at = index * step.step
            for box in _inside(rest, low - at, high - at):
                yield ((index, 1), *box)


def _range(low: int, high: int, step: Step) -> Span:
    """[first, stop) of the indices whose position is in [low, high)."""
    first = max(0, -(-low // step.step))
    return first, max(first, min(step.count, -(-high // step.step)))
