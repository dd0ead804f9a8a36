"""The one kernel body of straight, transposed and strided moves.

Which of the three a tile is, its dtypes and its arithmetic are constants, so each combination
compiles to its own code: one load, the conversion in fp32, one store.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import downcast, magnitude_bits, upcast

FIELDS = tl.constexpr(16)


@triton.jit
def _count(value, x, mask, counter, LARGEST: tl.constexpr, LARGEST_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile's saturated and non-finite elements to its move's counters.

    One maximum over the magnitudes' bits (where NaN is above Inf, and Inf above all) says whether
    there is anything to count; as a rule there is not.
    """
    peak = tl.max(magnitude_bits(upcast(x)))
    if peak > LARGEST_BITS:
        finite = magnitude_bits(upcast(value)) < 0x7F800000
        beyond = (tl.abs(upcast(x)) > LARGEST) & finite & mask
        tl.atomic_add(counter, tl.sum(beyond.to(tl.int32)).to(tl.int64))
        strange = mask & (finite == 0)
        tl.atomic_add(counter + 1, tl.sum(strange.to(tl.int32)).to(tl.int64))


@triton.jit
def move_kernel(  # type: ignore[no-untyped-def]
    descriptors,
    tile_table,
    counters,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    DST_BITS: tl.constexpr,
    ORDER: tl.constexpr,
    VECTOR: tl.constexpr,
    BIT_COPY: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    COUNT: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile of one descriptor: load, convert, store. See `_row` for the descriptor's fields."""
    tile = tl.program_id(0).to(tl.int64)
    d = descriptors + tl.load(tile_table + tile).to(tl.int64) * FIELDS
    dst = tl.load(d).to(tl.pointer_type(DST_BITS))
    src = tl.load(d + 1).to(tl.pointer_type(SRC))
    rows, cols = tl.load(d + 2), tl.load(d + 3)
    dst_outer, src_outer = tl.load(d + 4), tl.load(d + 5)
    dst_row, src_row = tl.load(d + 6), tl.load(d + 7)
    dst_col, src_col = tl.load(d + 8), tl.load(d + 9)
    local = tile - tl.load(d + 10)
    row_tiles, col_tiles = tl.load(d + 11), tl.load(d + 12)
    # What `is_vector` has checked, told to the compiler: it then makes 16-byte accesses. (A hint
    # inside a helper function would be lost when the helper is inlined.)
    if VECTOR:
        dst, src = tl.multiple_of(dst, 16), tl.multiple_of(src, 16)
        cols = tl.multiple_of(cols, 16)
        dst_outer, src_outer = tl.multiple_of(dst_outer, 16), tl.multiple_of(src_outer, 16)
        dst_row = tl.multiple_of(dst_row, 16)
        if ORDER == "transposed":
            rows, src_col = tl.multiple_of(rows, 16), tl.multiple_of(src_col, 16)
        else:
            src_row = tl.multiple_of(src_row, 16)
    # Unit strides must be constants to be seen as contiguous.
    if ORDER != "strided":
        dst_col = 1
    if ORDER == "straight":
        src_col = 1
    if ORDER == "transposed":
        src_row = 1

    outer = local // (row_tiles * col_tiles)
    row0 = (local // col_tiles) % row_tiles * ROWS
    col0 = local % col_tiles * COLS
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    mask = (r < rows - row0) & (c < cols - col0)
    dst_at = dst + outer * dst_outer + row0 * dst_row + col0 * dst_col
    src_at = src + outer * src_outer + row0 * src_row + col0 * src_col
    dst_tile = dst_at + r.to(tl.int64) * dst_row + c.to(tl.int64) * dst_col
    src_tile = src_at + r.to(tl.int64) * src_row + c.to(tl.int64) * src_col

    value = tl.load(src_tile, mask, other=0)
    x = value
    if not BIT_COPY:
        x = upcast(value)
        if SHIFT:
            x = x + tl.load(d + 13).to(tl.int32).to(tl.float32, bitcast=True)
        if SCALE:
            x = x * tl.load(tl.load(d + 14).to(tl.pointer_type(tl.float32)))
        tl.store(dst_tile, downcast(x, DST, NATIVE), mask)
    else:
        tl.store(dst_tile, value.to(DST_BITS, bitcast=True), mask)
    if COUNT:
        _count(value, x, mask, counters + 2 * tl.load(d + 15), LARGEST, LARGEST_BITS)
