"""What a kernel counts and sums when it is asked to: elements that were lost, and errors.

Counters are spread over SLOTS copies, so that programs don't queue for one address; the caller
adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import magnitude_bits

SLOTS = 64
_SLOTS = tl.constexpr(SLOTS)


@triton.jit
def slot(counters, index):  # type: ignore[no-untyped-def]
    """A move's two counters, or sums, in one of the copies: [moves, SLOTS, 2]."""
    return counters + (index * _SLOTS + tl.program_id(0) % _SLOTS) * 2


@triton.jit
def is_strange(x):  # type: ignore[no-untyped-def]
    """True for NaN and Inf."""
    return magnitude_bits(x) >= 0x7F800000


@triton.jit
def count(x, q, mask, at, LARGEST_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile's saturated and non-finite elements.

    `x` are the source's values and `q` the scaled ones, of which those above a largest magnitude
    saturate.
    """
    lost = (mask & (magnitude_bits(q) > LARGEST_BITS)).to(tl.int32)
    both = tl.sum(tl.where(is_strange(x), lost << 16, lost))
    if both > 0:
        tl.atomic_add(at, (both & 0xFFFF).to(tl.int64))
        tl.atomic_add(at + 1, (both >> 16).to(tl.int64))


@triton.jit
def exceeds(q, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 where |q| > LARGEST: the sign bit of a difference, which adds up in one instruction."""
    return ((LARGEST - tl.abs(q)).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def add_saturated(saturated, at):  # type: ignore[no-untyped-def]
    """Add what the threads of a tile counted, where many tiles have some and no NaN."""
    total = tl.sum(saturated)
    if total > 0:
        tl.atomic_add(at, total.to(tl.int64))


@triton.jit
def measure_power(x, back, mask, at):  # type: ignore[no-untyped-def]
    """Add a tile's Σx² and Σ(x − back)², over finite elements, to its move's two sums (fp64)."""
    known = mask & (is_strange(x) == 0)
    signal = tl.where(known, x, 0.0)
    noise = tl.where(known, x - back, 0.0)
    tl.atomic_add(at, tl.sum(signal * signal).to(tl.float64))
    tl.atomic_add(at + 1, tl.sum(noise * noise).to(tl.float64))
