"""Moves whose scales are computed region by region, in the program that writes the codes.

A program's tile holds whole regions: a block of 128 × 128, pieces of rows (`piece_kernel`), or
rows, of which long or transposed ones are walked. The source is contiguous along its rows, or
(ORDER "transposed") along its columns. See `regions.whole_rows` for the moves that this serves,
and `tables` for the descriptor's fields.

NaN and Inf take no part in an amax, and are so rare that nothing is spent on them at first: a
move that has some sets its flag, and a second launch, CAREFUL, does it again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .descriptor import FIELDS, box, find_tile, place, pointer
from .numerics import INF_BITS, dequant_of, quotient, rounded, to_e4m3_bits, upcast
from .piece_kernel import E4M3_LARGEST, amax_of, magnitudes, mx_pieces, nv_pieces
from .tally import count, measure_power, slot


@triton.jit
def _tally(  # type: ignore[no-untyped-def]
    x, q, dequant, mask, d, counters, power, COUNT: tl.constexpr, POWER: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """What is counted and summed of a tile."""
    if COUNT and CAREFUL:
        count(x, q, mask, slot(counters, tl.load(d + 15)), E4M3_LARGEST)
    if POWER:
        measure_power(x, rounded(q) * dequant, mask, slot(power, tl.load(d + 15)))


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    d, local, counters, power, SRC: tl.constexpr, ORDER: tl.constexpr, VECTOR: tl.constexpr,
    COUNT: tl.constexpr, POWER: tl.constexpr, NATIVE: tl.constexpr, CAREFUL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A block of 128 × 128."""
    dst, src, rows, cols, dst_outer, src_outer, dst_row, src_row, src_col = box(
        d, tl.uint8, SRC, ORDER, VECTOR, 16
    )
    outer_rows = tl.load(d + 8)
    outer, row0, col0 = place(d, local, ROWS, COLS)
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    mask = (r < rows - row0) & (c < cols - col0)
    src_at = src + outer * src_outer + row0 * src_row + col0 * src_col
    dst_at = dst + outer * dst_outer + row0 * dst_row + col0
    src_tile = src_at + r.to(tl.int64) * src_row + c.to(tl.int64) * src_col

    value = tl.load(src_tile, mask, other=0)
    amax = amax_of(tl.max(magnitudes(value, CAREFUL)), SRC, CAREFUL)
    if not CAREFUL:
        tl.store(pointer(d, 19, tl.int32), 1, amax >= INF_BITS)
    dequant = dequant_of(amax, 448.0)
    scales = pointer(d, 14, tl.float32) + (outer * outer_rows + row0) // 128 * tl.load(d + 17)
    tl.store(scales + col0 // 128, dequant)
    x = upcast(value)
    q = quotient(x, dequant, SRC == tl.float32, CAREFUL)
    code = to_e4m3_bits(q, NATIVE)
    tl.store(dst_at + r.to(tl.int64) * dst_row + c, code, mask)
    _tally(x, q, dequant, mask, d, counters, power, COUNT, POWER, CAREFUL)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    d, local, counters, power, SRC: tl.constexpr, ORDER: tl.constexpr, VECTOR: tl.constexpr,
    COUNT: tl.constexpr, POWER: tl.constexpr, NATIVE: tl.constexpr, CAREFUL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Whole rows: in one tile, or (LOOP) in several that are read twice.

    The second time out of the cache, unless the source is transposed: a program then has 64 rows.
    """
    dst, src, rows, cols, dst_outer, src_outer, dst_row, src_row, src_col = box(
        d, tl.uint8, SRC, ORDER, VECTOR, 16
    )
    outer_rows = tl.load(d + 8)
    outer, row0, _ = place(d, local, ROWS, COLS)
    row = tl.arange(0, ROWS)
    r = row[:, None].to(tl.int64)
    c = tl.arange(0, COLS)[None, :]
    src_at = src + outer * src_outer + row0 * src_row + r * src_row + c.to(tl.int64) * src_col
    dst_at = dst + outer * dst_outer + row0 * dst_row + r * dst_row + c
    present = r < rows - row0

    mask = present & (c < cols)
    value = tl.load(src_at, mask, other=0)
    peaks = magnitudes(value, CAREFUL)
    if LOOP:
        for start in range(COLS, cols, COLS):
            more = tl.load(src_at + start * src_col, present & (c < cols - start), other=0)
            peaks = tl.maximum(peaks, magnitudes(more, CAREFUL))
    amax = amax_of(tl.max(peaks, 1), SRC, CAREFUL)
    if not CAREFUL:
        tl.store(pointer(d, 19, tl.int32) + row * 0, 1, amax >= INF_BITS)
    dequant = dequant_of(amax, 448.0)
    scales = pointer(d, 14, tl.float32) + outer * outer_rows + row0
    tl.store(scales + row, dequant, row < rows - row0)
    for col0 in range(0, cols if LOOP else 1, COLS):
        if LOOP:
            mask = present & (c < cols - col0)
            value = tl.load(src_at + col0 * src_col, mask, other=0)
        x = upcast(value)
        q = quotient(x, dequant[:, None], SRC == tl.float32, CAREFUL)
        code = to_e4m3_bits(q, NATIVE)
        tl.store(dst_at + col0, code, mask)
        _tally(x, q, dequant[:, None], mask, d, counters, power, COUNT, POWER, CAREFUL)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    d, local, counters, power, SCHEME: tl.constexpr, SRC: tl.constexpr, ORDER: tl.constexpr,
    VECTOR: tl.constexpr, COUNT: tl.constexpr, POWER: tl.constexpr, NATIVE: tl.constexpr,
    CAREFUL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    if SCHEME == "row":
        _rows(d, local, counters, power, SRC, ORDER, VECTOR, COUNT, POWER, NATIVE, CAREFUL, ROWS,
              COLS, LOOP)  # fmt: skip
    elif SCHEME == "block":
        _block(d, local, counters, power, SRC, ORDER, VECTOR, COUNT, POWER, NATIVE, CAREFUL, ROWS,
               COLS)  # fmt: skip
    elif SCHEME == "mx":
        mx_pieces(d, local, counters, power, SRC, ORDER, VECTOR, COUNT, POWER, NATIVE, CAREFUL,
                  ROWS, COLS)  # fmt: skip
    else:
        nv_pieces(d, local, counters, power, SRC, ORDER, VECTOR, COUNT, POWER, CAREFUL, ROWS,
                  COLS)  # fmt: skip


@triton.jit
def region_kernel(  # type: ignore[no-untyped-def]
    descriptors, tile_table, counters, power, SCHEME: tl.constexpr, SRC: tl.constexpr,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr, POWER: tl.constexpr,
    NATIVE: tl.constexpr, CAREFUL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """One tile; or, CAREFUL, all tiles of one descriptor if its flag is set."""
    if CAREFUL:
        d = descriptors + tl.program_id(0).to(tl.int64) * FIELDS
        if tl.load(pointer(d, 19, tl.int32)) != 0:
            for local in range(0, tl.load(d + 20)):
                _tile(d, local, counters, power, SCHEME, SRC, ORDER, VECTOR, COUNT, POWER, NATIVE,
                      True, ROWS, COLS, LOOP)  # fmt: skip
    else:
        d, local = find_tile(descriptors, tile_table)
        _tile(d, local, counters, power, SCHEME, SRC, ORDER, VECTOR, COUNT, POWER, NATIVE, False,
              ROWS, COLS, LOOP)  # fmt: skip
