"""One read, one write: moves whose scales are computed region by region, in the tile itself.

A tile holds whole regions: rows, a block of 128 × 128, or pieces of a row. See
`regions.whole_rows` for the moves that this serves, and `tables` for the descriptor's fields.

NaN and Inf take no part in an amax, and are so rare that nothing is spent on them at first: a
move that has some sets its flag, and a second launch, CAREFUL, does it again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .descriptor import FIELDS, find_tile, place, pointer
from .numerics import (
    dequant_of,
    e8m0_of,
    finite_magnitude,
    from_e2m1_bits,
    from_e4m3_bits,
    inverse_of_e8m0,
    peak_bits,
    quotient,
    rounded,
    source_magnitudes,
    to_e2m1_bits,
    to_e4m3_bits,
    upcast,
)
from .tally import count, measure_power, slot

E4M3_LARGEST = tl.constexpr(0x43E80000)
E2M1_LARGEST = tl.constexpr(0x40E00000)
INF = tl.constexpr(0x7F800000)


@triton.jit
def magnitudes(value, CAREFUL: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the tile's amax is the maximum of; CAREFUL leaves NaN and Inf out."""
    return finite_magnitude(upcast(value)) if CAREFUL else source_magnitudes(value)


@triton.jit
def amax_of(peaks, SRC: tl.constexpr, CAREFUL: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 bits of `magnitudes`' maxima."""
    return peaks if CAREFUL else peak_bits(peaks, SRC)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    d, local, counters, power, SRC: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr,
    POWER: tl.constexpr, NATIVE: tl.constexpr, CAREFUL: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """A block of 128 × 128."""
    dst = tl.load(d).to(tl.pointer_type(tl.uint8))
    src = tl.load(d + 1).to(tl.pointer_type(SRC))
    rows, cols = tl.load(d + 2), tl.load(d + 3)
    dst_outer, src_outer = tl.load(d + 4), tl.load(d + 5)
    dst_row, src_row, outer_rows = tl.load(d + 6), tl.load(d + 7), tl.load(d + 8)
    if VECTOR:
        dst, src = tl.multiple_of(dst, 16), tl.multiple_of(src, 16)
        cols = tl.multiple_of(cols, 16)
        dst_outer, src_outer = tl.multiple_of(dst_outer, 16), tl.multiple_of(src_outer, 16)
        dst_row, src_row = tl.multiple_of(dst_row, 16), tl.multiple_of(src_row, 16)
    outer, row0, col0 = place(d, local, ROWS, COLS)
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    mask = (r < rows - row0) & (c < cols - col0)
    src_at = src + outer * src_outer + row0 * src_row + col0
    dst_at = dst + outer * dst_outer + row0 * dst_row + col0

    value = tl.load(src_at + r.to(tl.int64) * src_row + c, mask, other=0)
    amax = amax_of(tl.max(magnitudes(value, CAREFUL)), SRC, CAREFUL)
    if not CAREFUL:
        tl.store(pointer(d, 19, tl.int32), 1, amax >= INF)
    dequant = dequant_of(amax, 448.0)
    scales = pointer(d, 14, tl.float32) + (outer * outer_rows + row0) // 128 * tl.load(d + 17)
    tl.store(scales + col0 // 128, dequant)
    x = upcast(value)
    q = quotient(x, dequant, amax, CAREFUL)
    code = to_e4m3_bits(q, NATIVE)
    tl.store(dst_at + r.to(tl.int64) * dst_row + c, code, mask)
    if COUNT and CAREFUL:
        count(x, q, mask, slot(counters, tl.load(d + 15)), E4M3_LARGEST)
    if POWER:
        measure_power(x, rounded(q) * dequant, mask, slot(power, tl.load(d + 15)))


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    d, local, counters, power, SRC: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr,
    POWER: tl.constexpr, NATIVE: tl.constexpr, CAREFUL: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Whole rows: in one tile, or (LOOP) in several that are read twice, then out of the cache."""
    dst = tl.load(d).to(tl.pointer_type(tl.uint8))
    src = tl.load(d + 1).to(tl.pointer_type(SRC))
    rows, cols = tl.load(d + 2), tl.load(d + 3)
    dst_outer, src_outer = tl.load(d + 4), tl.load(d + 5)
    dst_row, src_row, outer_rows = tl.load(d + 6), tl.load(d + 7), tl.load(d + 8)
    if VECTOR:
        dst, src = tl.multiple_of(dst, 16), tl.multiple_of(src, 16)
        cols = tl.multiple_of(cols, 16)
        dst_outer, src_outer = tl.multiple_of(dst_outer, 16), tl.multiple_of(src_outer, 16)
        dst_row, src_row = tl.multiple_of(dst_row, 16), tl.multiple_of(src_row, 16)
    outer, row0, _ = place(d, local, ROWS, COLS)
    row = tl.arange(0, ROWS)
    r = row[:, None].to(tl.int64)
    c = tl.arange(0, COLS)[None, :]
    src_at = src + outer * src_outer + row0 * src_row + r * src_row + c
    dst_at = dst + outer * dst_outer + row0 * dst_row + r * dst_row + c
    present = r < rows - row0

    mask = present & (c < cols)
    value = tl.load(src_at, mask, other=0)
    peaks = magnitudes(value, CAREFUL)
    if LOOP:
        for start in range(COLS, cols, COLS):
            more = tl.load(src_at + start, present & (c < cols - start), other=0)
            peaks = tl.maximum(peaks, magnitudes(more, CAREFUL))
    amax = amax_of(tl.max(peaks, 1), SRC, CAREFUL)
    if not CAREFUL:
        tl.store(pointer(d, 19, tl.int32) + row * 0, 1, amax >= INF)
    dequant = dequant_of(amax, 448.0)
    scales = pointer(d, 14, tl.float32) + outer * outer_rows + row0
    tl.store(scales + row, dequant, row < rows - row0)
    for col0 in range(0, cols if LOOP else 1, COLS):
        if LOOP:
            mask = present & (c < cols - col0)
            value = tl.load(src_at + col0, mask, other=0)
        x = upcast(value)
        q = quotient(x, dequant[:, None], amax[:, None], CAREFUL)
        code = to_e4m3_bits(q, NATIVE)
        tl.store(dst_at + col0, code, mask)
        if COUNT and CAREFUL:
            count(x, q, mask, slot(counters, tl.load(d + 15)), E4M3_LARGEST)
        if POWER:
            back = rounded(q) * dequant[:, None]
            measure_power(x, back, mask, slot(power, tl.load(d + 15)))


@triton.jit
def _pieces(  # type: ignore[no-untyped-def]
    d, local, counters, power, SRC: tl.constexpr, VECTOR: tl.constexpr, COUNT: tl.constexpr,
    POWER: tl.constexpr, NATIVE: tl.constexpr, CAREFUL: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pieces of rows, 32 (MXFP8) or 16 (NVFP4) elements: one below the other in the tile."""
    ACROSS: tl.constexpr = COLS // WIDTH
    dst = tl.load(d).to(tl.pointer_type(tl.uint8))
    src = tl.load(d + 1).to(tl.pointer_type(SRC))
    rows, cols = tl.load(d + 2), tl.load(d + 3)
    dst_outer, src_outer = tl.load(d + 4), tl.load(d + 5)
    dst_row, src_row, outer_rows = tl.load(d + 6), tl.load(d + 7), tl.load(d + 8)
    if VECTOR:
        dst, src = tl.multiple_of(dst, 16), tl.multiple_of(src, 16)
        dst_outer, src_outer = tl.multiple_of(dst_outer, 16), tl.multiple_of(src_outer, 16)
        dst_row, src_row = tl.multiple_of(dst_row, 16), tl.multiple_of(src_row, 16)
    outer, row0, col0 = place(d, local, ROWS, COLS)
    piece = tl.arange(0, ROWS * ACROSS)
    r = (piece // ACROSS).to(tl.int64)
    part = piece % ACROSS
    present = (r < rows - row0) & (part * WIDTH < cols - col0)
    mask = present[:, None]
    src_piece = outer * src_outer + row0 * src_row + col0 + r * src_row + part * WIDTH
    dst_piece = outer * dst_outer + row0 * dst_row + r * dst_row
    scale_at = (outer * outer_rows + row0 + r) * tl.load(d + 17) + col0 // WIDTH + part
    scales = pointer(d, 14, tl.uint8) + scale_at

    value = tl.load(src + src_piece[:, None] + tl.arange(0, WIDTH)[None, :], mask, other=0)
    amax = amax_of(tl.max(magnitudes(value, CAREFUL), 1), SRC, CAREFUL)
    x = upcast(value)
    flag = pointer(d, 19, tl.int32) + piece * 0
    if WIDTH == 32:
        scale, back, q = _mx_scaled(x, amax)
        code = to_e4m3_bits(q, NATIVE)
        dst_tile = (dst_piece + col0 + part * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
        again = amax >= INF
        decoded = rounded(q)
    else:
        scale, back, q = _nv_scaled(x, amax, d, local, CAREFUL)
        code = to_e2m1_bits(x, q)
        decoded = from_e2m1_bits(code)
        low, high = tl.split(tl.reshape(code, (ROWS * ACROSS, WIDTH // 2, 2)))
        code = (low | (high << 4)).to(tl.uint8)
        half = tl.arange(0, WIDTH // 2)[None, :]
        dst_tile = (dst_piece + col0 // 2 + part * (WIDTH // 2))[:, None] + half
        # A scale below 2^-6 is so coarse that it may be too small for its piece: to be counted.
        again = (scale < 8) & COUNT
    tl.store(scales, scale, present)
    tl.store(dst + dst_tile, code, mask)
    if not CAREFUL:
        tl.store(flag, 1, again)
    if COUNT and (CAREFUL or WIDTH == 32):
        at = slot(counters, tl.load(d + 15))
        count(x, q, mask, at, E4M3_LARGEST if WIDTH == 32 else E2M1_LARGEST)
    if POWER:
        measure_power(x, decoded * back, mask, slot(power, tl.load(d + 15)))


@triton.jit
def _mx_scaled(x, amax):  # type: ignore[no-untyped-def]
    """(E8M0 of each piece, what its codes are multiplied by, x as it is rounded)."""
    e8m0 = e8m0_of(amax)
    inverse = inverse_of_e8m0(e8m0)[:, None]
    return e8m0.to(tl.uint8), tl.div_rn(inverse * 0 + 1.0, inverse), x * inverse


@triton.jit
def _nv_scaled(x, amax, d, local, CAREFUL: tl.constexpr):  # type: ignore[no-untyped-def]
    """(e4m3 bits of each piece, what its codes are multiplied by, x as it is rounded)."""
    group = tl.load(pointer(d, 16, tl.int32))
    second = dequant_of(group, 2688.0)
    if local == 0:
        tl.store(pointer(d, 18, tl.float32), second)
    e4m3 = _nv_scale(amax, second, group)
    each = (from_e4m3_bits(e4m3) * second)[:, None]
    return e4m3, each, quotient(x, each, group, CAREFUL)


@triton.jit
def _nv_scale(amax_bits, second, group):  # type: ignore[no-untyped-def]
    """e4m3 bits: amax / 6 / second; never zero.

    0x38 is 1.0, for a piece of zeros; one too small for e4m3 gets its smallest scale.
    """
    amax = amax_bits.to(tl.float32, bitcast=True)
    sixth = quotient(amax, second * 0 + 6.0, group, False)
    bits = to_e4m3_bits(quotient(sixth, second, group, False), False)
    return tl.where(amax_bits == 0, 0x38, tl.maximum(bits, 1)).to(tl.uint8)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    d, local, counters, power, SCHEME: tl.constexpr, SRC: tl.constexpr, VECTOR: tl.constexpr,
    COUNT: tl.constexpr, POWER: tl.constexpr, NATIVE: tl.constexpr, CAREFUL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    if SCHEME == "row":
        _rows(d, local, counters, power, SRC, VECTOR, COUNT, POWER, NATIVE, CAREFUL, ROWS, COLS,
              LOOP)  # fmt: skip
    elif SCHEME == "block":
        _block(d, local, counters, power, SRC, VECTOR, COUNT, POWER, NATIVE, CAREFUL, ROWS, COLS)
    else:
        WIDTH: tl.constexpr = 32 if SCHEME == "mx" else 16
        _pieces(d, local, counters, power, SRC, VECTOR, COUNT, POWER, NATIVE, CAREFUL, ROWS, COLS,
                WIDTH)  # fmt: skip


@triton.jit
def region_kernel(  # type: ignore[no-untyped-def]
    descriptors, tile_table, counters, power, SCHEME: tl.constexpr, SRC: tl.constexpr,
    VECTOR: tl.constexpr, COUNT: tl.constexpr, POWER: tl.constexpr, NATIVE: tl.constexpr,
    CAREFUL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """One tile; or, CAREFUL, all tiles of one descriptor if its flag is set."""
    if CAREFUL:
        d = descriptors + tl.program_id(0).to(tl.int64) * FIELDS
        if tl.load(pointer(d, 19, tl.int32)) != 0:
            for local in range(0, tl.load(d + 20)):
                _tile(d, local, counters, power, SCHEME, SRC, VECTOR, COUNT, POWER, NATIVE, True,
                      ROWS, COLS, LOOP)  # fmt: skip
    else:
        d, local = find_tile(descriptors, tile_table)
        _tile(d, local, counters, power, SCHEME, SRC, VECTOR, COUNT, POWER, NATIVE, False,
              ROWS, COLS, LOOP)  # fmt: skip
