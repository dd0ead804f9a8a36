"""Parts of a quantised matrix that hold whole regions: they can be quantised by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fuseport.kernels.move import Move, coalesce
from fuseport.kernels.quant import BlockScale, MxScale, RowScale

Coded = RowScale | BlockScale | MxScale


@dataclass(frozen=True)
class Box:
    """Rows and columns of a matrix whose scheme is `quant`, beginning at (row, column)."""

    quant: Coded
    row: int
    column: int
    rows: int
    columns: int

    @property
    def is_whole(self) -> bool:
        """True if no region is cut."""
        height, width = self.quant.region
        stop, end = self.row + self.rows, self.column + self.columns
        # A part that ends in the last rows of regions is taken to end with the matrix: where it
        # does not, the part behind it begins inside a region.
        low = stop % height == 0 or stop > (self.quant.dequant_scale.shape[0] - 1) * height
        right = end == self.quant.columns or (width > 0 and end % width == 0)
        left = self.column == 0 or (width > 0 and self.column % width == 0)
        return self.row % height == 0 and low and left and right


def box_of(move: Move, dst: torch.Tensor) -> Box | None:
    """The box that a part of a move's destination is; None if it is none of whole regions."""
    quant = move.quant
    if not isinstance(quant, (RowScale, BlockScale, MxScale)):
        return None
    *outer, run = coalesce(dst, dst)
    offset = int(dst.storage_offset() - move.dst.storage_offset())
    row, column = divmod(offset, quant.columns)
    row += quant.first_row
    if not outer and run.size % quant.columns == 0 and column == 0:
        box = Box(quant, row, 0, run.size // quant.columns, quant.columns)
    elif len(outer) == 1 and outer[0].dst == quant.columns and run.dst == 1:
        box = Box(quant, row, column, outer[0].size, run.size)
    else:
        return None
    return box if box.is_whole else None


def scales_of(box: Box) -> torch.Tensor:
    """The box's part of the matrix's scales."""
    height, width = box.quant.region
    rows = box.quant.dequant_scale[box.row // height : -(-(box.row + box.rows) // height)]
    end = box.column + box.columns
    return rows[:, box.column // width : -(-end // width)] if width else rows


def own_scheme(box: Box, scales: torch.Tensor) -> Coded:
    """The box as a matrix of its own, whose scales land in `scales`, contiguous."""
    return type(box.quant)(scales, box.columns)
