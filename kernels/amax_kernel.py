"""The first of two passes: the largest finite magnitude of every group that shares a scale."""

from __future__ import annotations

import triton
import triton.language as tl

from .descriptor import FIELDS, box, find_tile, place, pointer
from .numerics import (
    finite_magnitude,
    magnitude_bits,
    peak_bits,
    source_magnitudes,
    upcast,
)

# Descriptors of a program that clears.
CLEARED = 256


@triton.jit
def clear_kernel(descriptors, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zero to every descriptor's amax: thousands of tensors of one element, in one launch."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    amax = tl.load(descriptors + index.to(tl.int64) * FIELDS + 16, mask, other=0)
    tl.store(amax.to(tl.pointer_type(tl.int32)), 0, mask)


@triton.jit
def amax_kernel(  # type: ignore[no-untyped-def]
    descriptors, tile_table, SRC: tl.constexpr, ORDER: tl.constexpr, VECTOR: tl.constexpr,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of the tables that the second pass walks: its largest finite magnitude.

    It goes to field 16; that there is a NaN or Inf goes to field 19.
    """
    d, local = find_tile(descriptors, tile_table)
    _, src, rows, cols, _, src_outer, _, src_row, src_col = box(d, tl.uint8, SRC, ORDER, VECTOR, 16)
    amax = pointer(d, 16, tl.int32)
    outer, row0, col0 = place(d, local, ROWS, COLS)
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    mask = (r < rows - row0) & (c < cols - col0)
    at = src + outer * src_outer + row0 * src_row + col0 * src_col
    tile = at + r.to(tl.int64) * src_row + c.to(tl.int64) * src_col
    value = tl.load(tile, mask, other=0)
    if SHIFT:
        shift = tl.load(d + 13).to(tl.int32).to(tl.float32, bitcast=True)
        peak = tl.max(magnitude_bits(tl.where(mask, upcast(value) + shift, 0.0)))
    else:
        peak = peak_bits(tl.max(source_magnitudes(value)), SRC)
    if peak >= 0x7F800000:
        tl.store(pointer(d, 19, tl.int32), 1)
        x = upcast(tl.load(tile, mask, other=0))
        if SHIFT:
            x = tl.where(mask, x + shift, 0.0)
        peak = tl.max(finite_magnitude(x))
    # The value only grows, so one that is out of date costs an atomic and nothing else. Most
    # tiles see that they need none.
    if peak > tl.load(amax):
        tl.atomic_max(amax, peak)
