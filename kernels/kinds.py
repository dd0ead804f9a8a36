"""What the compiled code of a move depends on: its kind, and the tiles that a kind is walked in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .move import tile_shape
from .quant import (
    BlockScale,
    GivenScale,
    MxScale,
    NvScale,
    RowScale,
    TensorScale,
)

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
# Of a transposed source: many rows, since they are what is contiguous; of MXFP8 and NVFP4 with four
# pieces each.
TRANSPOSED_TILES = {"row": (64, 128), "block": BLOCK_TILE, "mx": (256, 128), "nv": (256, 64)}
# Rows up to this many elements are held in one tile; longer ones are walked in tiles of LOOP_TILE,
# and those of a transposed source always, in its tiles.
LONGEST_ROW, ROW_TILE, LOOP_TILE = 16384, 4096, 8192


@dataclass(frozen=True)
class Kind:
    """What the compiled code depends on; moves of one kind share a launch.

    `row_tile` is the width of a tile of rows, negative where they are walked; 0 for other schemes.
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
        if self.order == "transposed" and self.scheme in TRANSPOSED_TILES:
            return TRANSPOSED_TILES[self.scheme]
        if self.scheme == "row":
            return max(1, ROW_TILE // abs(self.row_tile)), abs(self.row_tile)
        if self.scheme == "block":
            return BLOCK_TILE
        return PIECE_TILE if self.scheme in ("mx", "nv") else tile_shape(self.order)


def row_tile(columns: int, order: str) -> int:
    """Width of the tile for rows of so many elements; negative where rows are walked in several."""
    if order == "transposed":
        return -TRANSPOSED_TILES["row"][1]
    if columns > LONGEST_ROW:
        return -LOOP_TILE
    return max(256, 1 << (columns - 1).bit_length())
