"""Why one correction is enough for a 16-bit source: see `numerics.quotient`.

After one correction the quotient q comes out as the fp32 nearest to q (1 + e), |e| < 2^-43. A code
can differ from that of the nearest fp32 only where the two lie on different sides of a tie between
neighbouring codes, or one of them on it: where q is within 2^-43 of the middle between the tie and
the next fp32. There are few such q, and all are looked at, in exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest


def e4m3(code: int) -> Fraction:
    """Its value (OCP OFP8 1.0)."""
    exponent, fraction = code >> 3, code & 7
    if exponent == 0:
        return Fraction(fraction, 512)
    return Fraction(8 + fraction, 8) * Fraction(2) ** (exponent - 7)


E4M3 = [e4m3(code) for code in range(127)]
E2M1 = [Fraction(half, 2) for half in (0, 1, 2, 3, 4, 6, 8, 12)]
NEAR = Fraction(1, 2**40)


def odd_part(value: Fraction) -> int:
    """The significand, an odd integer."""
    number = value.numerator
    while number % 2 == 0:
        number //= 2
    return number


def ties() -> list[int]:
    """Significands of all ties, and of 464, from which on e4m3 counts as saturated."""
    pairs = [*pairwise(E4M3), *pairwise(E2M1)]
    return sorted({odd_part((a + b) / 2) for a, b in pairs} | {odd_part(Fraction(464))})


def nearest(value: Fraction) -> Fraction:
    """The nearest fp32, ties to even; exponents without limit."""
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value))) - 23
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while abs(value) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    # Python rounds halves to even.
    return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent


def corrected(x: Fraction, scale: Fraction) -> Fraction:
    """What the kernel computes, each operation rounded once."""
    inverse = nearest(1 / scale)
    first = nearest(x * inverse)
    remainder = nearest(first * scale - x)
    return nearest(first - remainder * inverse)


def close_calls(bits: int) -> Iterator[tuple[Fraction, Fraction]]:
    """All (x, scale), up to powers of two, whose quotient is near the middle beside a tie.

    x has `bits` significant bits. Then scale · tie is so near to x that scale is a neighbour of
    x / tie.
    """
    for tie in ties():
        one = Fraction(tie, 2 ** (tie.bit_length() - 1))
        above = Fraction(1, 2**24) / one
        below = above if one > 1 else above / 2
        for significand in range(2 ** (bits - 1), 2**bits):
            for shift in (23, 24, 25, 26, 27, 28):
                x = significand * 2 ** (shift + tie.bit_length() - bits)
                for scale in range(x // tie - 2, x // tie + 4):
                    if 2**23 <= scale < 2**24:
                        off = Fraction(x - scale * tie, scale * tie)
                        if min(abs(off - above), abs(off + below)) < NEAR:
                            yield Fraction(x), Fraction(scale)


@pytest.mark.parametrize("bits", [8, 11])
def test_one_correction_decides_every_tie(bits: int) -> None:
    found = set(close_calls(bits))
    assert found == {(x, scale) for x, scale in found if corrected(x, scale) == nearest(x / scale)}
    # A power of two over the largest significand: half of a last bit above the tie, and a little.
    assert {scale for _, scale in found} == {Fraction(2**24 - 1)}


def test_the_error_of_one_correction() -> None:
    """What is not near a middle comes out as fp32's nearest, and ties are met exactly."""
    random = Random(1)
    for _ in range(20000):
        x, scale = Fraction(random.randrange(1, 2**11)), Fraction(random.randrange(2**23, 2**24))
        exact, found = x / scale, corrected(x, scale)
        bounds = {nearest(exact * (1 + sign * Fraction(1, 2**43))) for sign in (-1, 1)}
        assert found in bounds
    for tie in ties():
        for significand in (2**23 + 1, 2**23 + 8191, 2**24 - 1):
            assert corrected(Fraction(tie * significand), Fraction(significand)) == tie


def test_the_model_of_the_kernel() -> None:
    assert nearest(Fraction(2**24 + 1)) == 2**24
    assert nearest(Fraction(2**24 + 3)) == 2**24 + 4
    assert corrected(Fraction(7), Fraction(2)) == Fraction(7, 2)
    assert ties()[:3] == [1, 3, 5]
    assert max(ties()) == 31
