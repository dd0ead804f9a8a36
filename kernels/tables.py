"""From moves to launches: descriptor rows, the tile table, and what the compiled code depends on.

Each move becomes a few rows of a descriptor table; a second table maps every tile to its row, so
a program finds its work with two loads and no search.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .move import Box, describe, is_vector, tile_shape
from .quant import (
    BlockScale,
    GivenScale,
    MxScale,
    NvScale,
    Regional,
    RowScale,
    TensorScale,
)
from .regions import Job, whole_rows

SCHEMES = {
    type(None): "none",
    GivenScale: "given",
    TensorScale: "tensor",
    RowScale: "row",
    BlockScale: "block",
    MxScale: "mx",
    NvScale: "nv",
}
# Schemes whose amax takes a pass of its own.
TWO_PASSES = ("tensor", "nv")
BLOCK_TILE, PIECE_TILE = (128, 128), (32, 512)
# Rows up to this many elements are held in one tile; longer ones are walked in tiles of LOOP_TILE.
LONGEST_ROW, ROW_TILE, LOOP_TILE = 16384, 4096, 8192


@dataclass(frozen=True)
class Kind:
    """What the compiled code depends on; moves of one kind share a launch.

    `row_tile` is the width of a tile that holds whole rows, 0 for every other scheme.
    """

    src: torch.dtype
    dst: torch.dtype
    order: str
    vector: bool
    bit_copy: bool = False
    shift: bool = False
    scheme: str = "none"
    row_tile: int = 0

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of a tile."""
        if self.scheme == "row":
            return max(1, ROW_TILE // abs(self.row_tile)), abs(self.row_tile)
        if self.scheme == "block":
            return BLOCK_TILE
        return PIECE_TILE if self.scheme in ("mx", "nv") else tile_shape(self.order)


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


def row_tile(columns: int) -> int:
    """Width of the tile for rows of so many elements; negative where rows are walked in several."""
    if columns > LONGEST_ROW:
        return -LOOP_TILE
    return max(256, 1 << (columns - 1).bit_length())


def build(
    jobs: Iterable[Job], given: Mapping[int, int], flags: torch.Tensor, device: torch.device
) -> tuple[Launch, ...]:
    """The launches of a batch.

    Args:
        jobs: the moves; those with a scale for each region are `regions.whole_rows`.
        given: job's index → address of the given scale.
        flags: int32, for each job's index: set by a kernel where the careful launch has to do
            the job again.
        device: where the tables go.
    """
    rows: dict[Kind, list[list[int]]] = defaultdict(list)
    tiles: dict[Kind, list[int]] = defaultdict(list)
    for job in jobs:
        for kind, row in _rows(job, given.get(job.index, 0)):
            counts = _tile_counts(row, kind)
            row[11], row[12] = counts[1:]
            row[19] = flags.data_ptr() + 4 * job.index
            row[20] = math.prod(counts)
            rows[kind].append(row)
            tiles[kind].append(math.prod(counts))
    return tuple(_launch(kind, rows[kind], tiles[kind], device) for kind in rows)


def _tile_counts(row: list[int], kind: Kind) -> tuple[int, int, int]:
    """Tiles along (outer, rows, columns); the outer size waits in the field of the first tile."""
    rows, cols = kind.tile
    across = 1 if kind.scheme == "row" else -(-row[3] // cols)
    return row[10], -(-row[2] // rows), across


def _rows(job: Job, given: int) -> Iterable[tuple[Kind, list[int]]]:
    move, quant = job.move, job.move.quant
    if isinstance(quant, Regional):
        boxes = whole_rows(move)
        assert boxes is not None
        return [_region(job, box, quant) for box in boxes]
    return [_plain(job, box, given) for box in describe(move.dst, move.src)]


def _row(job: Job, box: Box, dst: int, src: int, scale: int) -> list[int]:
    """A descriptor: addresses, and sizes and strides in elements, by field.

    0 dst, 1 src, 2 rows, 3 columns, 4 to 9 strides of (dst, src): outer, row, column; for regions
    8 is an outer step in rows of the matrix; 10 the first tile (the outer size until the launch's
    rows are known), 11 and 12 tiles along rows and columns, 13 the shift's bits, 14 the scale,
    15 the job's index, 16 the amax, 17 a step in rows of the scales, 18 the second scale, 19 the
    flag, 20 the number of tiles; the rest keeps a descriptor a multiple of 64 bytes.
    """
    quant = job.move.quant
    shift = struct.unpack("<i", struct.pack("<f", job.move.shift))[0]
    amax = quant.amax.data_ptr() if isinstance(quant, (TensorScale, NvScale)) else 0
    second = quant.second_scale.data_ptr() if isinstance(quant, NvScale) else 0
    return [
        dst, src, box.rows.size, box.cols.size, box.outer.dst, box.outer.src,
        box.rows.dst, box.rows.src, box.cols.dst, box.cols.src,
        box.outer.size, 0, 0, shift, scale, job.index, amax, 0, second, 0, 0, 0, 0, 0,
    ]  # fmt: skip


def _plain(job: Job, box: Box, given: int) -> tuple[Kind, list[int]]:
    move, quant = job.move, job.move.quant
    dst = move.dst.data_ptr() + box.dst_offset * move.dst.element_size()
    src = move.src.data_ptr() + box.src_offset * move.src.element_size()
    scale = quant.dequant_scale.data_ptr() if isinstance(quant, TensorScale) else given
    kind = Kind(
        move.src.dtype, move.dst.dtype, box.order, is_vector(box, dst, src),
        move.is_bit_copy, move.shift != 0.0, SCHEMES[type(quant)],
    )  # fmt: skip
    return kind, _row(job, box, dst, src, scale)


def _region(job: Job, box: Box, quant: Regional) -> tuple[Kind, list[int]]:
    """A box of whole rows: `dst` strides in bytes, and where its scales are."""
    move, per_byte = job.move, 2 if isinstance(quant, NvScale) else 1
    height, width = quant.region
    first = quant.first_row + box.dst_offset // quant.columns
    grid = quant.dequant_scale
    scale_row = grid.shape[1] if width else 1
    scale = grid.data_ptr() + first // height * scale_row * grid.element_size()
    dst = move.dst.data_ptr() + box.dst_offset // per_byte
    src = move.src.data_ptr() + box.src_offset * move.src.element_size()
    row = _row(job, box, dst, src, scale)
    row[4], row[6] = row[4] // per_byte, row[6] // per_byte
    row[8], row[17] = box.outer.dst // quant.columns, scale_row
    vector = is_vector(box, dst, src) and row[4] % 16 == 0 and row[6] % 16 == 0
    wide = row_tile(quant.columns) if isinstance(quant, RowScale) else 0
    return Kind(
        move.src.dtype, move.dst.dtype, box.order, vector, False, False,
        SCHEMES[type(quant)], wide,
    ), row  # fmt: skip


def _launch(
    kind: Kind, rows: Sequence[list[int]], tiles: Sequence[int], device: torch.device
) -> Launch:
    table = np.array(rows, dtype=np.int64)
    counts = np.array(tiles, dtype=np.int64)
    table[:, 10] = np.cumsum(counts) - counts
    descriptors = torch.from_numpy(table).to(device)
    # The tile table is the larger one, so it is expanded where it is used.
    tile_table = torch.repeat_interleave(
        torch.arange(len(rows), dtype=torch.int32, device=device),
        torch.from_numpy(counts).to(device),
        output_size=int(counts.sum()),
    )
    return Launch(kind, descriptors, tile_table)
