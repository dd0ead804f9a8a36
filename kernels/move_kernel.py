"""The one kernel body of straight, transposed and strided moves.

Which of the three a tile is, its dtypes and its arithmetic are constants, so each combination
compiles to its own code: one load, the conversion in fp32, one store.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .descriptor import FIELDS, box, find_tile, place, pointer
from .numerics import (
    dequant_of,
    downcast,
    magnitude_bits,
    quotient,
    rounded,
    upcast,
)
from .tally import count, measure_power, slot


@triton.jit
def _shifted(value, d, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 of a source, with the move's shift."""
    x = upcast(value)
    return x + tl.load(d + 13).to(tl.int32).to(tl.float32, bitcast=True) if SHIFT else x


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    x, d, local, SCHEME: tl.constexpr, WIDE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """(x as it is rounded, what that is multiplied by to give x again)."""
    back = 1.0
    if SCHEME == "given":
        scale = tl.load(pointer(d, 14, tl.float32))
        back = tl.div_rn(scale * 0 + 1.0, scale)
        x = x * scale
    if SCHEME == "tensor":
        amax = tl.load(pointer(d, 16, tl.int32))
        back = dequant_of(amax, 448.0)
        if local == 0:
            tl.store(pointer(d, 14, tl.float32), back)
        x = quotient(x, back, WIDE, CAREFUL)
    return x, back


@triton.jit
def _count_lost(  # type: ignore[no-untyped-def]
    scaled, source, mask, d, local, at, SHIFT: tl.constexpr, SCHEME: tl.constexpr,
    LARGEST_BITS: tl.constexpr,
):  # fmt: skip
    """As a rule there is nothing to count, and one maximum says so (NaN is above Inf).

    Else the tile is read again: its registers were not kept for that.
    """
    if tl.max(magnitude_bits(upcast(scaled))) > LARGEST_BITS:
        x = _shifted(tl.load(source, mask, other=0), d, SHIFT)
        beyond, _ = _scaled(x, d, local, SCHEME, True, True)
        count(x, beyond, mask, at, LARGEST_BITS)


@triton.jit
def _convert(  # type: ignore[no-untyped-def]
    dst_tile, src_tile, mask, d, local, counters, power, SRC: tl.constexpr, DST: tl.constexpr,
    DST_BITS: tl.constexpr, BIT_COPY: tl.constexpr, SHIFT: tl.constexpr, SCHEME: tl.constexpr,
    COUNT: tl.constexpr, POWER: tl.constexpr, LARGEST_BITS: tl.constexpr, NATIVE: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Load a tile, convert it, store it; count what is lost."""
    value = tl.load(src_tile, mask, other=0)
    at = slot(counters, tl.load(d + 15))
    if BIT_COPY:
        scaled = value
        tl.store(dst_tile, value.to(DST_BITS, bitcast=True), mask)
    else:
        x = _shifted(value, d, SHIFT)
        scaled, back = _scaled(x, d, local, SCHEME, SHIFT or SRC == tl.float32, CAREFUL)
        tl.store(dst_tile, downcast(scaled, DST, NATIVE), mask)
        if POWER:
            measure_power(x, rounded(scaled) * back, mask, slot(power, tl.load(d + 15)))
    # A scale that was computed saturates nothing finite: only a careful launch has to count.
    if COUNT and (SCHEME != "tensor" or CAREFUL):
        _count_lost(scaled, src_tile, mask, d, local, at, SHIFT, SCHEME, LARGEST_BITS)


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    d, local, counters, power, SRC: tl.constexpr, DST: tl.constexpr, DST_BITS: tl.constexpr,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, BIT_COPY: tl.constexpr, SHIFT: tl.constexpr,
    SCHEME: tl.constexpr, COUNT: tl.constexpr, POWER: tl.constexpr, LARGEST_BITS: tl.constexpr,
    NATIVE: tl.constexpr, CAREFUL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of one descriptor: load, convert, store."""
    dst, src, rows, cols, dst_outer, src_outer, dst_row, src_row, src_col = box(
        d, DST_BITS, SRC, ORDER, VECTOR, 16
    )
    dst_col = tl.load(d + 8) if ORDER == "strided" else 1
    outer, row0, col0 = place(d, local, ROWS, COLS)
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    mask = (r < rows - row0) & (c < cols - col0)
    dst_at = dst + outer * dst_outer + row0 * dst_row + col0 * dst_col
    src_at = src + outer * src_outer + row0 * src_row + col0 * src_col
    dst_tile = dst_at + r.to(tl.int64) * dst_row + c.to(tl.int64) * dst_col
    src_tile = src_at + r.to(tl.int64) * src_row + c.to(tl.int64) * src_col

    _convert(dst_tile, src_tile, mask, d, local, counters, power, SRC, DST, DST_BITS, BIT_COPY,
             SHIFT, SCHEME, COUNT, POWER, LARGEST_BITS, NATIVE, CAREFUL)  # fmt: skip


@triton.jit
def move_kernel(  # type: ignore[no-untyped-def]
    descriptors, tile_table, counters, power, SRC: tl.constexpr, DST: tl.constexpr,
    DST_BITS: tl.constexpr, ORDER: tl.constexpr, VECTOR: tl.constexpr, BIT_COPY: tl.constexpr,
    SHIFT: tl.constexpr, SCHEME: tl.constexpr, COUNT: tl.constexpr, POWER: tl.constexpr,
    LARGEST_BITS: tl.constexpr, NATIVE: tl.constexpr, CAREFUL: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """One tile; or, CAREFUL, all tiles of one descriptor if its flag is set."""
    if CAREFUL:
        d = descriptors + tl.program_id(0).to(tl.int64) * FIELDS
        if tl.load(pointer(d, 19, tl.int32)) != 0:
            for local in range(0, tl.load(d + 20)):
                _move(d, local, counters, power, SRC, DST, DST_BITS, ORDER, VECTOR, BIT_COPY, SHIFT,
                      SCHEME, COUNT, POWER, LARGEST_BITS, NATIVE, True, ROWS, COLS)  # fmt: skip
    else:
        d, local = find_tile(descriptors, tile_table)
        _move(d, local, counters, power, SRC, DST, DST_BITS, ORDER, VECTOR, BIT_COPY,
              SHIFT, SCHEME, COUNT, POWER, LARGEST_BITS, NATIVE, False, ROWS, COLS)  # fmt: skip
