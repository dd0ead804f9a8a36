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

import os

import numpy as np
import torch
import triton
import triton.language as tl

# Triton's interpreter runs the kernels on a CPU, and must be chosen before they are imported.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# No computed fp32 scale is smaller: what a smaller one would tell apart no model notices, and the
# remainders of a division by it would underflow.
SMALLEST_SCALE = tl.constexpr(2.0**-90)
REBIAS_E4M3 = tl.constexpr(2.0**120)
REBIAS_E2M1 = tl.constexpr(2.0**126)
# fp32 bits of Inf; a NaN's magnitude is above.
INF_BITS = tl.constexpr(0x7F800000)
ADD_AND_SIX = tl.constexpr(2.0**22 + 3.0)

# Largest fp32 magnitude that does not overflow (or saturate) in the format.
LARGEST_SOURCE: dict[torch.dtype, float] = {
    # Halfway to the next magnitude that e4m3's spacing would give, which rounds to 448.
    torch.float8_e4m3fn: 464.0,
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
def source_magnitudes(value):  # type: ignore[no-untyped-def]
    """int32 that order as a source's magnitudes do, NaN above Inf; see `peak_bits`.

    16-bit sources stay apart from their fp32 values, which then need no registers while a tile
    waits for its peak.
    """
    if value.dtype == tl.float32:
        magnitudes = magnitude_bits(value)
    else:
        magnitudes = value.to(tl.uint16, bitcast=True).to(tl.int32) & 0x7FFF
    return magnitudes


@triton.jit
def peak_bits(magnitudes, SRC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fp32 bits of `source_magnitudes` (a few of them: their maxima)."""
    if SRC == tl.bfloat16:
        bits = magnitudes << 16
    elif SRC == tl.float16:
        half = magnitudes.to(tl.uint16).to(tl.float16, bitcast=True)
        bits = half.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = magnitudes
    return bits


@triton.jit
def quotient(x, scale, WIDE: tl.constexpr, CAREFUL: tl.constexpr):  # type: ignore[no-untyped-def]
    """X / scale as a format here rounds it, each element by its own or by one scale.

    Newton corrections by fma: a third of the instructions of a general division. The first one
    leaves a relative error of 2^-43. That decides nothing for a 16-bit x, whose quotients come no
    closer than that to where fp32 rounds beside a tie of e4m3 or e2m1, all but one, which comes
    out right; WIDE x needs a second correction, which gives fp32's nearest (Markstein, IBM J. Res.
    Dev. 34-1, 1990). Right for quotients above 2^-20, and for smaller ones to more bits than any
    format here has, since no scale is below 2^-99. The signs are chosen so that -0 stays -0. NaN
    stays NaN; Inf becomes NaN unless CAREFUL.
    """
    if CAREFUL or INTERPRETED:
        # The interpreter rounds twice in an fma.
        result = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    else:
        inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
        negative, back = x * -1.0, inverse * -1.0
        result = x * inverse
        result = tl.fma(tl.fma(result, scale, negative), back, result)
        if WIDE:
            result = tl.fma(tl.fma(result, scale, negative), back, result)
    return result


@triton.jit
def to_e4m3_bits(x, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """e4m3 bits (uint8) of an fp32 tensor: saturating, nearest even, NaN → 0x7F."""
    if NATIVE:
        # The instruction saturates (Inf too) and makes every NaN 0x7F by itself.
        bits = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
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
        bits = tl.where(x != x, 0x7F, code | sign).to(tl.uint8)
    return bits


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


@triton.jit
def finite_magnitude(x):  # type: ignore[no-untyped-def]
    """`magnitude_bits`, with 0 for NaN and Inf: what an amax is taken over."""
    bits = magnitude_bits(x)
    return tl.where(bits < 0x7F800000, bits, 0)


@triton.jit
def dequant_of(amax_bits, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Amax / LARGEST in fp32, at least 2^-90; 1.0 where the amax is 0."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, tl.zeros_like(amax) + LARGEST), SMALLEST_SCALE)
    return tl.where(amax_bits == 0, 1.0, scale)


@triton.jit
def e8m0_of(amax_bits):  # type: ignore[no-untyped-def]
    """OCP MX: the exponent of the amax, rounded down, less e4m3's largest (8); 2^0 for amax 0."""
    code = tl.maximum((amax_bits >> 23) - 8, 0)
    return tl.where(amax_bits == 0, 127, code)


@triton.jit
def inverse_of_e8m0(code):  # type: ignore[no-untyped-def]
    """2^(127 - code) as fp32, exact: `e8m0_of` gives no more than 246."""
    return ((254 - code) << 23).to(tl.float32, bitcast=True)


@triton.jit
def from_e4m3_bits(bits):  # type: ignore[no-untyped-def]
    """fp32 of e4m3 bits other than NaN: exponent and mantissa moved, then rebiased by 2^120."""
    wide = bits.to(tl.uint32)
    mag = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * REBIAS_E4M3
    return tl.where(wide >= 0x80, -mag, mag)


@triton.jit
def rounded(x):  # type: ignore[no-untyped-def]
    """X as e4m3 holds it, in fp32; by the integer route.

    Decoding the hardware's conversion in the same kernel gave wrong values with Triton 3.6, while
    the codes that it stored were right.
    """
    return from_e4m3_bits(to_e4m3_bits(x, False))


@triton.jit
def from_e2m1_bits(bits):  # type: ignore[no-untyped-def]
    """fp32 of an e2m1 code (0 to 15)."""
    wide = bits.to(tl.uint32)
    mag = ((wide & 7) << 22).to(tl.float32, bitcast=True) * REBIAS_E2M1
    return tl.where(wide >= 8, -mag, mag)


@triton.jit
def to_e2m1_bits(x, q):  # type: ignore[no-untyped-def]
    """e2m1 code (0 to 15, as uint32) of |q| with x's sign: saturating at 6, nearest even.

    Adding 2^22 · 2^e leaves a ulp of half of 2^e, the spacing of the format from 2^e on (below
    1 it is that of e = 0), so the FPU rounds for us: into n, the sum's last bits. The code is
    n + 2e; the sum's exponent has 2e + 2 modulo 8 one bit higher, and 3 · 2^e adds 6 to n.
    """
    if INTERPRETED:
        bounded = tl.where(tl.abs(q) <= 6.0, tl.abs(q), 6.0)
    else:
        # The hardware's minimum of NaN and 6 is 6.
        bounded = tl.minimum(tl.abs(q), 6.0)
    binade = tl.maximum(bounded.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    steps = tl.fma(binade.to(tl.float32, bitcast=True), ADD_AND_SIX, bounded)
    bits = steps.to(tl.uint32, bitcast=True)
    return ((bits + (bits >> 22)) & 7) | ((x.to(tl.uint32, bitcast=True) >> 28) & 8)
