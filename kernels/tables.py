"""From moves to launches: descriptor rows, and the tile table.

Each move becomes a few rows of a descriptor table; a second table maps every tile to its row, so
a program finds its work with two loads and no search.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .kinds import SCHEMES, Kind, row_tile
from .move import ALIGNED, VECTOR, Box, Move, describe, is_vector
from .quant import GivenScale, NvScale, Regional, RowScale, TensorScale
from .regions import Job, whole_rows

Ints: TypeAlias = NDArray[np.int64]
# Fields of a descriptor that no pattern knows: dst, src, scale, job, amax, second scale, flag.
ADDRESSES = [0, 1, 14, 15, 16, 18, 19]


@dataclass(frozen=True)
class Launch:
    """One kind's tables on the device, ready to run any number of times."""

    kind: Kind
    descriptors: torch.Tensor
    tile_table: torch.Tensor

    @property
    def tiles(self) -> int:
        """Number of programs."""
        return self.tile_table.numel()


def build(
    jobs: Sequence[Job],
    given: Mapping[int, int],
    flags: torch.Tensor,
    device: torch.device,
    repeats: Sequence[tuple[Sequence[Job], Ints]] = (),
) -> tuple[Launch, ...]:
    """The launches of a batch.

    A model repeats a few patterns of strides in every layer: rows are made once for each pattern,
    and numpy puts the addresses of all its moves into copies of them.

    Args:
        jobs: the moves; those with a scale for each region are `regions.whole_rows`.
        given: job's index → address of the given scale.
        flags: int32, for each job's index: set by a kernel where the careful launch has to do
            the job again.
        device: where the tables go.
        repeats: jobs that are done several times, and [times, jobs, 7]: what each time adds to
            their `ADDRESSES`.
    """
    patterns, first_flag = _Patterns(), flags.data_ptr()
    which: list[int] = []
    tables: list[Ints] = []
    for own, steps in ((jobs, np.zeros((1, 1, len(ADDRESSES)), np.int64)), *repeats):
        if own:
            which += [patterns.number(job.move) for job in own] * len(steps)
            base = np.array([_addresses(job, given, first_flag) for job in own], dtype=np.int64)
            tables.append((base + steps).reshape(-1, len(ADDRESSES)))
    if not which:
        return ()
    numbers, addresses = np.array(which), np.concatenate(tables)
    kinds = dict.fromkeys(kind for rows in patterns.rows for kind, _ in rows)
    return tuple(
        _launch(kind, _of_kind(kind, patterns.rows), numbers, addresses, device) for kind in kinds
    )


class _Patterns:
    """The rows of each pattern that was met; addresses count from a move's own."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self.rows: list[list[tuple[Kind, list[int]]]] = []

    def number(self, move: Move) -> int:
        """Which of `rows` are a move's."""
        key = _pattern(move)
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            self.rows.append(_rows(move))
        return self._numbers[key]


def _pattern(move: Move) -> Hashable:
    """All that a move's rows depend on but addresses, which matter for their alignment alone."""
    dst, src, quant = move.dst, move.src, move.quant
    own = None
    if isinstance(quant, Regional):
        own = quant.columns, quant.first_row, quant.dequant_scale.shape
    return (
        src.shape, dst.stride(), src.stride(), dst.dtype, src.dtype, move.shift, type(quant), own,
        dst.data_ptr() % ALIGNED, src.data_ptr() % ALIGNED,
    )  # fmt: skip


def _addresses(job: Job, given: Mapping[int, int], first_flag: int) -> tuple[int, ...]:
    """What is added to a pattern's row in the fields `ADDRESSES`."""
    move, quant, index = job.move, job.move.quant, job.index
    scale = amax = second = 0
    if isinstance(quant, GivenScale):
        scale = given[index]
    elif quant is not None:
        scale = quant.dequant_scale.data_ptr()
    if isinstance(quant, (TensorScale, NvScale)):
        amax = quant.amax.data_ptr()
    if isinstance(quant, NvScale):
        second = quant.second_scale.data_ptr()
    return (
        move.dst.data_ptr(), move.src.data_ptr(), scale, index, amax, second,
        first_flag + 4 * index,
    )  # fmt: skip


def _of_kind(kind: Kind, patterns: Sequence[list[tuple[Kind, list[int]]]]) -> list[list[list[int]]]:
    """For each pattern, its rows of one kind."""
    return [[row for of, row in rows if of == kind] for rows in patterns]


def _rows(move: Move) -> list[tuple[Kind, list[int]]]:
    """A pattern's rows; addresses count from the move's own."""
    if isinstance(move.quant, Regional):
        boxes = whole_rows(move)
        assert boxes is not None
        made = [_region(move, box, move.quant) for box in boxes]
    else:
        made = [_plain(move, box) for box in describe(move.dst, move.src)]
    for kind, row in made:
        counts = _tile_counts(row, kind)
        row[11], row[12], row[20] = *counts[1:], math.prod(counts)
    return made


def _tile_counts(row: list[int], kind: Kind) -> tuple[int, int, int]:
    """Tiles along (outer, rows, columns); the outer size waits in the field of the first tile."""
    rows, cols = kind.tile
    across = 1 if kind.scheme == "row" else -(-row[3] // cols)
    return row[10], -(-row[2] // rows), across


def _row(move: Move, box: Box, dst: int, src: int, scale: int) -> list[int]:
    """A descriptor: addresses, and sizes and strides in elements, by field.

    0 dst, 1 src, 2 rows, 3 columns, 4 to 9 strides of (dst, src): outer, row, column; for regions
    8 is an outer step in rows of the matrix; 10 the first tile (the outer size until the launch's
    rows are known), 11 and 12 tiles along rows and columns, 13 the shift's bits, 14 the scale,
    15 the job's index, 16 the amax, 17 a step in rows of the scales, 18 the second scale, 19 the
    flag, 20 the number of tiles; the rest keeps a descriptor a multiple of 64 bytes.
    """
    shift = struct.unpack("<i", struct.pack("<f", move.shift))[0]
    return [
        dst, src, box.rows.size, box.cols.size, box.outer.dst, box.outer.src,
        box.rows.dst, box.rows.src, box.cols.dst, box.cols.src,
        box.outer.size, 0, 0, shift, scale, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]  # fmt: skip


def _is_vector(move: Move, box: Box, dst: int, src: int) -> bool:
    """`is_vector` for a box that begins so many bytes behind its move."""
    return is_vector(box, move.dst.data_ptr() % ALIGNED + dst, move.src.data_ptr() % ALIGNED + src)


def _plain(move: Move, box: Box) -> tuple[Kind, list[int]]:
    dst = box.dst_offset * move.dst.element_size()
    src = box.src_offset * move.src.element_size()
    kind = Kind(
        move.src.dtype, move.dst.dtype, box.order, _is_vector(move, box, dst, src),
        move.is_bit_copy, move.shift != 0.0, SCHEMES[type(move.quant)],
    )  # fmt: skip
    return kind, _row(move, box, dst, src, 0)


def _region(move: Move, box: Box, quant: Regional) -> tuple[Kind, list[int]]:
    """A box of whole rows: `dst` strides in bytes, and where its scales are."""
    per_byte = 2 if isinstance(quant, NvScale) else 1
    height, width = quant.region
    first = quant.first_row + box.dst_offset // quant.columns
    grid = quant.dequant_scale
    scale_row = grid.shape[1] if width else 1
    scale = first // height * scale_row * grid.element_size()
    dst = box.dst_offset // per_byte
    src = box.src_offset * move.src.element_size()
    row = _row(move, box, dst, src, scale)
    row[4], row[6] = row[4] // per_byte, row[6] // per_byte
    row[8], row[17] = box.outer.dst // quant.columns, scale_row
    vector = _is_vector(move, box, dst, src) and row[4] % VECTOR == 0 and row[6] % VECTOR == 0
    wide = row_tile(quant.columns, box.order) if isinstance(quant, RowScale) else 0
    return Kind(
        move.src.dtype, move.dst.dtype, box.order, vector, False, False,
        SCHEMES[type(quant)], wide,
    ), row  # fmt: skip


def _launch(
    kind: Kind, patterns: list[list[list[int]]], which: Ints, addresses: Ints, device: torch.device
) -> Launch:
    """One kind's tables: each job's rows, in the order of the jobs.

    Args:
        patterns: each pattern's rows of this kind.
        which: [jobs], the pattern of each.
        addresses: [jobs, len(ADDRESSES)].
    """
    rows = np.array([row for pattern in patterns for row in pattern], dtype=np.int64)
    sizes = np.array([len(pattern) for pattern in patterns])
    first = (np.cumsum(sizes) - sizes)[which]
    job = np.repeat(np.arange(len(which)), sizes[which])
    # A job's rows follow one another, so counting from its first one gives each of them.
    within = np.arange(len(job)) - (np.cumsum(sizes[which]) - sizes[which])[job]
    table = rows[first[job] + within]
    table[:, ADDRESSES] += addresses[job]
    tiles = table[:, 20].copy()
    table[:, 10] = np.cumsum(tiles) - tiles
    descriptors = _upload(table, device)
    # The tile table is the larger one, so it is expanded where it is used.
    tile_table = torch.repeat_interleave(
        torch.arange(len(table), dtype=torch.int32, device=device),
        _upload(tiles, device),
        output_size=int(tiles.sum()),
    )
    return Launch(kind, descriptors, tile_table)


def _upload(values: Ints, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what runs there: pageable memory would."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
