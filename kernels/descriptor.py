"""A program's way from its number to its tile: see `tables` for the descriptor's fields.

What the compiler is told of a value (`tl.multiple_of`) it forgets when the value came out of a
helper: so sizes, strides and the two pointers are loaded where they are used.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(24)


@triton.jit
def find_tile(descriptors, tile_table):  # type: ignore[no-untyped-def]
    """(the descriptor's address, the tile's number within it)."""
    tile = tl.program_id(0).to(tl.int64)
    d = descriptors + tl.load(tile_table + tile).to(tl.int64) * FIELDS
    return d, tile - tl.load(d + 10)


@triton.jit
def place(d, local, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(outer index, first row, first column) of a tile.

    A launch has less than 2^31 tiles: dividing 32 bits is five times as fast as dividing 64.
    """
    row_tiles, col_tiles = tl.load(d + 11).to(tl.int32), tl.load(d + 12).to(tl.int32)
    # (A sum, since the interpreter's loops count with plain numbers.)
    tile = (local + 0 * row_tiles).to(tl.int32)
    down = tile // col_tiles
    outer = down // row_tiles
    row, col = down - outer * row_tiles, tile - down * col_tiles
    return outer.to(tl.int64), row.to(tl.int64) * ROWS, col.to(tl.int64) * COLS


@triton.jit
def pointer(d, FIELD: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """An address in the descriptor."""
    return tl.load(d + FIELD).to(tl.pointer_type(TYPE))
