"""Tiles of pieces of rows: 32 elements that share an E8M0 (MXFP8), 16 that share an e4m3 (NVFP4).

A step is [rows, elements of a piece, pieces]. A thread holds whole pieces, so that an amax needs no
other thread and a scale is found once. A tile is walked in steps of 4096 or 8192 elements: the way
to it is then short beside the work, and few registers are needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .descriptor import box, place, pointer
from .numerics import (
    INF_BITS,
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
from .tally import add_saturated, count, exceeds, measure_power, slot

# Rows of a step: where the source is transposed, a warp's.
STRAIGHT_STEP, TRANSPOSED_STEP = tl.constexpr(8), tl.constexpr(64)
# What the compiler is told that a transposed source's strides are multiples of: loads of two rows.
# Wider ones would leave a piece to several warps (measured on an H100: half as fast).
TWO_ROWS = tl.constexpr(2)
E4M3_LARGEST = tl.constexpr(0x43E80000)
E2M1_LARGEST = tl.constexpr(0x40E00000)


@triton.jit
def magnitudes(value, CAREFUL: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the tile's amax is the maximum of; CAREFUL leaves NaN and Inf out."""
    return finite_magnitude(upcast(value)) if CAREFUL else source_magnitudes(value)


@triton.jit
def amax_of(peaks, SRC: tl.constexpr, CAREFUL: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 bits of `magnitudes`' maxima."""
    return peaks if CAREFUL else peak_bits(peaks, SRC)


@triton.jit
def mx_pieces(  # type: ignore[no-untyped-def]
    d, local, counters, power, SRC: tl.constexpr, ORDER: tl.constexpr, VECTOR: tl.constexpr,
    COUNT: tl.constexpr, POWER: tl.constexpr, NATIVE: tl.constexpr, CAREFUL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Pieces of 32; a tile is walked in steps."""
    STEP: tl.constexpr = TRANSPOSED_STEP if ORDER == "transposed" else STRAIGHT_STEP
    dst, src, rows, cols, dst_outer, src_outer, dst_row, src_row, src_col = box(
        d, tl.uint8, SRC, ORDER, VECTOR, TWO_ROWS
    )
    outer_rows = tl.load(d + 8)
    outer, row0, col0 = place(d, local, ROWS, COLS)
    row, piece = tl.arange(0, STEP), tl.arange(0, COLS // 32)
    r = row[:, None, None].to(tl.int64)
    c = tl.arange(0, 32)[None, :, None] + 32 * piece[None, None, :]
    src_at = src + outer * src_outer + row0 * src_row + col0 * src_col
    dst_at = dst + outer * dst_outer + row0 * dst_row + col0
    src_tile = src_at + r * src_row + c.to(tl.int64) * src_col
    dst_tile = dst_at + r * dst_row + c
    scale_row = tl.load(d + 17)
    first_scale = (outer * outer_rows + row0) * scale_row + col0 // 32
    scale_at = first_scale + row[:, None].to(tl.int64) * scale_row + piece[None, :]
    saturated = row[:, None] * piece[None, :] * 0

    for step in range(0, ROWS, STEP):
        present = (row[:, None] < rows - row0 - step) & (32 * piece[None, :] < cols - col0)
        mask = present[:, None, :]
        value = tl.load(src_tile + step * src_row, mask, other=0)
        amax = amax_of(tl.max(magnitudes(value, CAREFUL), 1), SRC, CAREFUL)
        e8m0 = e8m0_of(amax)
        inverse = inverse_of_e8m0(e8m0)[:, None, :]
        x = upcast(value)
        q = x * inverse
        scales = pointer(d, 14, tl.uint8) + scale_at + step * scale_row
        tl.store(scales, e8m0.to(tl.uint8), present)
        tl.store(dst_tile + step * dst_row, to_e4m3_bits(q, NATIVE), mask)
        if COUNT and CAREFUL:
            count(x, q, mask, slot(counters, tl.load(d + 15)), E4M3_LARGEST)
        if not CAREFUL:
            tl.store(pointer(d, 19, tl.int32) + e8m0 * 0, 1, amax >= INF_BITS)
            if COUNT:
                saturated += tl.sum(exceeds(q, 464.0), 1)
        if POWER:
            back = rounded(q) * tl.div_rn(inverse * 0 + 1.0, inverse)
            measure_power(x, back, mask, slot(power, tl.load(d + 15)))
    if COUNT and not CAREFUL:
        add_saturated(saturated, slot(counters, tl.load(d + 15)))


@triton.jit
def _pairs(  # type: ignore[no-untyped-def]
    first, src_col, mask, SRC: tl.constexpr, ORDER: tl.constexpr, VECTOR: tl.constexpr
):
    """16 elements from each of `first`: the even ones, and the odd ones, [rows, 8, pieces]."""
    WIDTH: tl.constexpr = SRC.primitive_bitwidth
    ELEMENT: tl.constexpr = tl.uint16 if WIDTH == 16 else tl.uint32
    PAIR: tl.constexpr = tl.uint32 if WIDTH == 16 else tl.uint64
    i = tl.arange(0, 8)[None, :, None]
    if VECTOR and ORDER == "straight":
        # One load of both: a thread then has whole pieces.
        pair = tl.load(first.to(tl.pointer_type(PAIR)) + i, mask, other=0)
        low = pair.to(ELEMENT).to(SRC, bitcast=True)
        high = (pair >> WIDTH).to(ELEMENT).to(SRC, bitcast=True)
    elif ORDER == "transposed":
        # All in one load: it is under way longer than the work on a half of it takes.
        both = tl.load(first + tl.arange(0, 16)[None, :, None] * src_col, mask, other=0)
        pairs = tl.reshape(both, (both.shape[0], 8, 2, both.shape[2]))
        low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    else:
        low = tl.load(first + 2 * i, mask, other=0)
        high = tl.load(first + 2 * i + 1, mask, other=0)
    return low, high


@triton.jit
def nv_pieces(  # type: ignore[no-untyped-def]
    d, local, counters, power, SRC: tl.constexpr, ORDER: tl.constexpr, VECTOR: tl.constexpr,
    COUNT: tl.constexpr, POWER: tl.constexpr, CAREFUL: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Pieces of 16, the even elements apart from the odd ones; a tile is walked in steps."""
    STEP: tl.constexpr = TRANSPOSED_STEP if ORDER == "transposed" else STRAIGHT_STEP
    dst, src, rows, cols, dst_outer, src_outer, dst_row, src_row, src_col = box(
        d, tl.uint8, SRC, ORDER, VECTOR, TWO_ROWS
    )
    outer_rows = tl.load(d + 8)
    outer, row0, col0 = place(d, local, ROWS, COLS)
    second = _second_scale(d, local)
    row, piece = tl.arange(0, STEP), tl.arange(0, COLS // 16)
    r, p = row[:, None, None].to(tl.int64), piece[None, None, :]
    src_at = src + outer * src_outer + row0 * src_row + col0 * src_col
    dst_at = dst + outer * dst_outer + row0 * dst_row + col0 // 2
    src_piece = src_at + r * src_row + 16 * p.to(tl.int64) * src_col
    dst_tile = dst_at + r * dst_row + tl.arange(0, 8)[None, :, None] + 8 * p
    scale_row = tl.load(d + 17)
    first_scale = (outer * outer_rows + row0) * scale_row + col0 // 16
    scale_at = first_scale + row[:, None].to(tl.int64) * scale_row + piece[None, :]
    smallest = row[:, None] * piece[None, :] * 0 + 8

    for step in range(0, ROWS, STEP):
        present = (row[:, None] < rows - row0 - step) & (16 * piece[None, :] < cols - col0)
        mask = present[:, None, :]
        low, high = _pairs(src_piece + step * src_row, src_col, mask, SRC, ORDER, VECTOR)
        peaks = tl.maximum(magnitudes(low, CAREFUL), magnitudes(high, CAREFUL))
        scale = _nv_scale(amax_of(tl.max(peaks, 1), SRC, CAREFUL), second)
        scales = pointer(d, 14, tl.uint8) + scale_at + step * scale_row
        tl.store(scales, scale.to(tl.uint8), present)
        smallest = tl.minimum(smallest, tl.where(present, scale, 8))
        each = (from_e4m3_bits(scale) * second)[:, None, :]
        low_code = _nv_codes(low, each, mask, d, counters, power, SRC, COUNT, POWER, CAREFUL)
        high_code = _nv_codes(high, each, mask, d, counters, power, SRC, COUNT, POWER, CAREFUL)
        tl.store(dst_tile + step * dst_row, (low_code | (high_code << 4)).to(tl.uint8), mask)
    # A scale below 2^-6 is so coarse that it may be too small for its piece: to be counted.
    if COUNT and not CAREFUL:
        tl.store(pointer(d, 19, tl.int32), 1, tl.min(smallest) < 8)


@triton.jit
def _nv_codes(  # type: ignore[no-untyped-def]
    value, each, mask, d, counters, power, SRC: tl.constexpr, COUNT: tl.constexpr,
    POWER: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """e2m1 codes of a source's values, which stand for code · each; counts them."""
    x = upcast(value)
    q = quotient(x, each, SRC == tl.float32, CAREFUL)
    code = to_e2m1_bits(x, q)
    if COUNT and CAREFUL:
        count(x, q, mask, slot(counters, tl.load(d + 15)), E2M1_LARGEST)
    if POWER:
        sums = slot(power, tl.load(d + 15))
        measure_power(x, from_e2m1_bits(code) * each, mask, sums)
    return code


@triton.jit
def _second_scale(d, local):  # type: ignore[no-untyped-def]
    """The group's scale; the first tile stores it."""
    second = dequant_of(tl.load(pointer(d, 16, tl.int32)), 2688.0)
    if local == 0:
        tl.store(pointer(d, 18, tl.float32), second)
    return second


@triton.jit
def _nv_scale(amax_bits, second):  # type: ignore[no-untyped-def]
    """e4m3 bits (int32): amax / 6 / second; never zero.

    0x38 is 1.0, for a piece of zeros; one too small for e4m3 gets its smallest scale.
    """
    amax = amax_bits.to(tl.float32, bitcast=True)
    sixth = quotient(amax, second * 0 + 6.0, True, False)
    bits = to_e4m3_bits(quotient(sixth, second, True, False), False).to(tl.int32)
    return tl.where(amax_bits == 0, 0x38, tl.maximum(bits, 1))
