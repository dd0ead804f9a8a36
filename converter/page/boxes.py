"""A move as rectangles: which rows and columns of the source become which ones of the target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from fuseport.kernels.move import Move

# More rectangles than this can't be told apart in a picture.
MOST = 256


@dataclass(frozen=True)
class Area:
    """Rows and columns of a matrix, from … to."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Box:
    """The same elements in the source and in the target; what is around them if not `exact`."""

    src: Area
    dst: Area
    exact: bool = True


@dataclass(frozen=True)
class _Dim:
    """One dimension on both sides: (size, stride), which differ in size where codes are packed."""

    dst: tuple[int, int]
    src: tuple[int, int]


def boxes(move: Move, src_first: int, src_columns: int, dst_columns: int) -> list[Box]:
    """The rectangles of a move; one around them all, if there are more than `MOST`.

    Args:
        move: any strides.
        src_first: where the source's matrix begins in its storage, in elements.
        src_columns, dst_columns: the lengths of the two matrices' rows, in elements.
    """
    sides = (zip(view.shape, view.stride(), strict=True) for view in (move.dst, move.src))
    dims = [_Dim(dst, src) for dst, src in zip(*sides, strict=True) if dst[0] != 1 or src[0] != 1]
    dims.sort(key=lambda dim: (dim.dst[1], dim.src[1]), reverse=True)
    first = int(move.dst.storage_offset()), int(move.src.storage_offset()) - src_first
    found = list(itertools.islice(_split(dims, *first, dst_columns, src_columns), MOST + 1))
    if len(found) <= MOST:
        return found
    around = _around(first[1], [dim.src for dim in dims], src_columns)
    return [Box(around, _around(first[0], [dim.dst for dim in dims], dst_columns), exact=False)]


def _around(first: int, dims: list[tuple[int, int]], width: int) -> Area:
    """All columns of the rows that strided elements begin and end in."""
    last = first + sum((size - 1) * stride for size, stride in dims)
    return Area(first // width, last // width + 1, 0, width)


def _split(dims: list[_Dim], dst: int, src: int, dst_width: int, src_width: int) -> Iterator[Box]:
    """One box if both sides are rectangles; else those of each step of the outermost dimension."""
    target = _area(dst, [dim.dst for dim in dims], dst_width)
    origin = _area(src, [dim.src for dim in dims], src_width)
    if target is not None and origin is not None:
        yield Box(origin, target)
        return
    outer, rest = dims[0], dims[1:]
    for index in range(outer.dst[0]):
        at = dst + index * outer.dst[1], src + index * outer.src[1]
        yield from _split(rest, *at, dst_width, src_width)


def _area(first: int, dims: list[tuple[int, int]], width: int) -> Area | None:
    """The rectangle that strided elements fill; None if they leave gaps in it."""
    top, left = divmod(first, width)
    bottom, right = top + 1, left + 1
    for size, stride in dims:
        down, across = divmod(stride, width)
        if not across:
            bottom += (size - 1) * down
        else:
            right += (size - 1) * stride
    count = math.prod(size for size, _ in dims)
    full = right <= width and (bottom - top) * (right - left) == count
    return Area(top, bottom, left, right) if full else None
