"""Number formats: their limits, and one rounding from fp32 into each of them.

`downcast` rounds to nearest even and returns the destination's bits. A NaN becomes the format's
positive quiet NaN, so that every backend writes the same bits. e4m3 saturates at 448, Inf too;
bf16 and fp16 overflow to Inf as the IEEE cast does, because that is what `Tensor.to` gives.

Two routes lead to e4m3. The hardware's fp32 → e4m3 conversion is used where it rounds once
(sm_90 and later). Elsewhere Triton goes through fp16, which rounds twice, or has no conversion,
and its interpreter loses carries; there integer arithmetic does it (sources: OCP OFP8
specification rev. 1.0 for the format; IEEE 754 round to nearest even). bf16 always takes the
integer route: three operations, and the same on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)

# Largest fp32 magnitude that does not overflow (or saturate) in the format.
LARGEST_SOURCE: dict[torch.dtype, float] = {
    torch.float8_e4m3fn: 448.0,
    torch.float16: float(np.nextafter(np.float32(65520.0), np.float32(0.0))),
    torch.bfloat16: float(np.array(0x7F7F7FFF, np.uint32).view(np.float32)),
    torch.float32: float(np.finfo(np.float32).max),
}


@triton.jit
def upcast(value):  # type: ignore[no-untyped-def]
    """fp32 of a float tensor; bf16 by bits, since Triton's interpreter loses its subnormals."""
    if value.dtype == tl.bfloat16:
        wide = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        x = wide.to(tl.float32, bitcast=True)
    else:
        x = value.to(tl.float32)
    return x


@triton.jit
def magnitude_bits(x):  # type: ignore[no-untyped-def]
    """The bits of |x|, fp32, as int32: they order as the magnitudes do, NaN above Inf."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_e4m3_bits(x, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """e4m3 bits (uint8) of an fp32 tensor: saturating, nearest even, NaN → 0x7F."""
    if NATIVE:
        clamped = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
        bits = clamped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        raw = x.to(tl.uint32, bitcast=True)
        sign = (raw >> 24) & 0x80
        mag = raw & 0x7FFFFFFF
        # Normal: add half of the 20 bits that go, minus one, plus the last kept bit; rebias 127→7.
        normal = ((mag + 0x7FFFF + ((mag >> 20) & 1)) >> 20) - (120 << 3)
        # Subnormal (below 2^-6): adding 2^14 leaves a ulp of 2^-9, so the FPU rounds for us.
        shifted = (mag.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True)
        code = tl.where(mag < 0x3C800000, shifted - 0x46800000, normal)
        # 0x43E00000 is 448: at or above it everything is 0x7E.
        code = tl.where(mag >= 0x43E00000, 0x7E, code)
        bits = (code | sign).to(tl.uint8)
    return tl.where(x != x, 0x7F, bits).to(tl.uint8)


@triton.jit
def to_bf16_bits(x):  # type: ignore[no-untyped-def]
    """bf16 bits (uint16) of an fp32 tensor: nearest even, NaN → 0x7FC0."""
    raw = x.to(tl.uint32, bitcast=True)
    rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def to_fp16_bits(x):  # type: ignore[no-untyped-def]
    """fp16 bits (uint16) of an fp32 tensor: nearest even, NaN → 0x7E00."""
    bits = x.to(tl.float16).to(tl.uint16, bitcast=True)
    return tl.where(x != x, 0x7E00, bits).to(tl.uint16)


@triton.jit
def to_fp32_bits(x):  # type: ignore[no-untyped-def]
    """fp32 bits (uint32) of an fp32 tensor: NaN → 0x7FC00000."""
    return tl.where(x != x, 0x7FC00000, x.to(tl.uint32, bitcast=True)).to(tl.uint32)


@triton.jit
def downcast(x, DST: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of an fp32 tensor in the format DST, as an unsigned integer of its width."""
    if DST == tl.float8e4nv:
        bits = to_e4m3_bits(x, NATIVE)
    elif DST == tl.bfloat16:
        bits = to_bf16_bits(x)
    elif DST == tl.float16:
        bits = to_fp16_bits(x)
    else:
        bits = to_fp32_bits(x)
    return bits
