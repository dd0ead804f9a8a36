"""Whether boxes tile a shape exactly: every element covered once, in bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import CorruptSourceError

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
_Array = npt.NDArray[np.int64]


def check_tiling(name: str, shape: Shape, boxes: Sequence[Box]) -> None:
    """Raise CorruptSourceError unless the (offset, shape) `boxes` tile `shape` exactly.

    Boxes that are in bounds, do not meet and have the right total volume leave no hole.
    """
    for offset, size in boxes:
        _check_bounds(name, shape, offset, size)
    volume = sum(math.prod(size) for _, size in boxes)
    if volume > math.prod(shape):
        raise CorruptSourceError(f"{name}: its chunks overlap: {volume} elements for {shape}")
    if volume < math.prod(shape):
        raise CorruptSourceError(f"{name}: its chunks leave holes: {volume} elements for {shape}")
    filled = [box for box in boxes if math.prod(box[1])]
    if len(filled) > 1 and not _is_grid(filled):
        _check_disjoint(name, filled)


def _check_bounds(name: str, shape: Shape, offset: Shape, size: Shape) -> None:
    inside = len(offset) == len(size) == len(shape) and all(
        min(o, s) >= 0 and o + s <= whole for o, s, whole in zip(offset, size, shape, strict=True)
    )
    if not inside:
        raise CorruptSourceError(
            f"{name}: a chunk at {offset} of shape {size} is not inside {shape}"
        )


def _is_grid(boxes: Sequence[Box]) -> bool:
    """Whether all boxes are different cells of one regular grid: the usual case, and quick."""
    cell = boxes[0][1]
    cells = set()
    for offset, size in boxes:
        if size != cell or any(o % c for o, c in zip(offset, cell, strict=True)):
            return False
        cells.add(offset)
    return len(cells) == len(boxes)


def _check_disjoint(name: str, boxes: Sequence[Box]) -> None:
    """Sweep along the axis with the most starts; compare only boxes that meet along it."""
    starts = np.array([offset for offset, _ in boxes], dtype=np.int64)
    stops = starts + np.array([size for _, size in boxes], dtype=np.int64)
    axis = int(np.argmax([len(np.unique(column)) for column in starts.T]))
    order = np.argsort(starts[:, axis], kind="stable")
    starts, stops = starts[order], stops[order]
    ends: _Array = np.searchsorted(starts[:, axis], stops[:, axis], side="left")
    for i, end in enumerate(ends.tolist()):
        if end <= i + 1:
            continue
        meets = (starts[i + 1 : end] < stops[i]) & (stops[i + 1 : end] > starts[i])
        if meets.all(axis=1).any():
            raise CorruptSourceError(f"{name}: its chunks overlap near {tuple(starts[i].tolist())}")
