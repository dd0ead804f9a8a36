"""A program's way from its number to its tile: see `tables` for the descriptor's fields."""

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


@triton.jit
def box(  # type: ignore[no-untyped-def]
    d, DST: tl.constexpr, SRC: tl.constexpr, ORDER: tl.constexpr, VECTOR: tl.constexpr,
    ALONG: tl.constexpr,
):  # fmt: skip
    """(dst, src, rows, cols, dst_outer, src_outer, dst_row, src_row, src_col) of a descriptor.

    What `is_vector` has checked is told to the compiler, which then makes 16-byte accesses; of a
    transposed source's strides ALONG elements, at most 16.
    """
    dst = tl.load(d).to(tl.pointer_type(DST))
    src = tl.load(d + 1).to(tl.pointer_type(SRC))
    rows, cols = tl.load(d + 2), tl.load(d + 3)
    dst_outer, src_outer = tl.load(d + 4), tl.load(d + 5)
    dst_row, src_row = tl.load(d + 6), tl.load(d + 7)
    src_col = tl.load(d + 9)
    if VECTOR:
        dst, src = tl.multiple_of(dst, 16), tl.multiple_of(src, 16)
        cols = tl.multiple_of(cols, 16)
        dst_outer, src_outer = tl.multiple_of(dst_outer, 16), tl.multiple_of(src_outer, 16)
        dst_row = tl.multiple_of(dst_row, 16)
        if ORDER == "transposed":
            rows, src_col = tl.multiple_of(rows, ALONG), tl.multiple_of(src_col, ALONG)
        else:
            src_row = tl.multiple_of(src_row, 16)
    # Unit strides must be constants to be seen as contiguous.
    if ORDER == "transposed":
        src_row = 1
    if ORDER == "straight":
        src_col = 1
    return dst, src, rows, cols, dst_outer, src_outer, dst_row, src_row, src_col
