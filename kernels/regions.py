"""Which moves with a scale for each region can be quantised from where their source lies.

A region (a row, a block, a piece of a row) must belong to one program. That holds where a move
fills whole rows of its matrix from rows or (a transposed source) columns that are contiguous in the
source, and where blocks of 128 rows neither straddle two moves nor two runs of source rows.
Anything else is first gathered into a plain matrix (`stage`), which costs one more write and read
of those tensors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from .move import Box, Dim, Move, merge, unroll
from .quant import Regional


def whole_rows(move: Move) -> list[Box] | None:
    """Boxes of whole rows, offsets and strides in elements; None if the move must be staged."""
    quant = move.quant
    assert isinstance(quant, Regional)
    if move.shift:
        return None
    place = Place(quant.columns, quant.first_row, quant.region[0], quant.dequant_scale.shape[0])
    return _whole_rows(tuple(move.src.shape), move.src.stride(), place)


class Place(NamedTuple):
    """Where rows begin in their matrix, and the regions' height and number down the matrix."""

    columns: int
    first_row: int
    height: int
    regions: int


# A model's layers repeat a few shapes, and a move is asked twice.
@lru_cache(maxsize=4096)
def _whole_rows(shape: tuple[int, ...], strides: tuple[int, ...], place: Place) -> list[Box] | None:
    dims = merge(shape, _contiguous(shape), strides)
    if not dims:
        return []
    last, columns = dims[-1], place.columns
    if last.src == 1 and last.size % columns == 0:
        rows = Dim(last.size // columns, columns, columns)
        split = [*dims[:-1], Dim(columns, 1, 1)]
        if rows.size > 1 or not dims[:-1]:
            split.insert(-1, rows)
        boxes = list(unroll(split, 0, "straight"))
    elif last.size == columns and dims[:-1] and dims[-2].src == 1:
        boxes = list(unroll(dims, 0, "transposed"))
    else:
        return None
    return boxes if all(_is_aligned(box, place) for box in boxes) else None


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    """Strides of a contiguous tensor."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _is_aligned(box: Box, place: Place) -> bool:
    """True if every region of the box belongs to one program."""
    height = place.height
    first = place.first_row + box.dst_offset // place.columns
    stop = first + box.rows.size
    ends = stop % height == 0 or (box.outer.size == 1 and stop > (place.regions - 1) * height)
    return first % height == 0 and box.outer.dst // place.columns % height == 0 and ends


@dataclass(frozen=True)
class Job:
    """A move to run, and the index of the batch's move that its counters belong to."""

    index: int
    move: Move


def stage(moves: Sequence[Move]) -> tuple[list[Job], list[Job]]:
    """Copies that gather what must be staged, and then the batch itself.

    A staged matrix becomes one job: its counters are its first move's.

    Raises:
        ValueError: a matrix that must be staged is not filled without gaps.
    """
    matrices: dict[int, list[Job]] = defaultdict(list)
    gathers: list[Job] = []
    jobs: list[Job] = []
    for index, move in enumerate(moves):
        job = Job(index, move)
        if isinstance(move.quant, Regional):
            matrices[move.quant.dequant_scale.data_ptr()].append(job)
        else:
            jobs.append(job)
    for parts in matrices.values():
        if any(whole_rows(part.move) is None for part in parts):
            copies, job = _gather([part for part in parts if part.move.src.numel()])
            gathers += copies
            jobs.append(job)
        else:
            jobs += parts
    return gathers, jobs


def _gather(parts: list[Job]) -> tuple[list[Job], Job]:
    """The moves of one matrix by way of a plain matrix: the copies, and the job that is left."""
    parts.sort(key=lambda part: _quant(part).first_row)
    first, columns = parts[0], _quant(parts[0]).columns
    rows = [part.move.src.numel() // columns for part in parts]
    _check_adjacent(parts, rows)
    plain = all(part.move.shift == 0.0 for part in parts)
    dtypes = {part.move.src.dtype for part in parts}
    dtype = dtypes.pop() if plain and len(dtypes) == 1 else torch.float32
    matrix = torch.empty(sum(rows), columns, dtype=dtype, device=first.move.src.device)
    copies = [
        Job(part.index, Move(rows_of.view(part.move.src.shape), part.move.src, part.move.shift))
        for rows_of, part in zip(matrix.split(rows), parts, strict=True)
    ]
    width = first.move.dst.numel() // rows[0]
    dst = first.move.dst.as_strided((sum(rows), width), (width, 1))
    return copies, Job(first.index, Move(dst, matrix, 0.0, first.move.quant))


def _quant(part: Job) -> Regional:
    assert isinstance(part.move.quant, Regional)
    return part.move.quant


def _check_adjacent(parts: list[Job], rows: list[int]) -> None:
    for part, count, after in zip(parts, rows, parts[1:], strict=False):
        end = part.move.dst.data_ptr() + part.move.dst.nbytes
        if _quant(part).first_row + count != _quant(after).first_row or (
            end != after.move.dst.data_ptr()
        ):
            raise ValueError(
                f"moves with {type(part.move.quant).__name__} fill rows up to "
                f"{_quant(part).first_row + count} and from {_quant(after).first_row} on of one "
                f"matrix; such regions need the rows without gaps, in one batch"
            )
