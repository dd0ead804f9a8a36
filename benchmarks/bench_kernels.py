"""Each kernel, dtype and family of shapes by itself.

    python -m benchmarks.run kernels

One launch (or two, where a scheme reads its source twice: the bytes count that) over the moves of a
family. The first moves are compared with the reference bit for bit before a figure is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from fuseport.kernels.fused_copy import FusedCopy
from fuseport.kernels.move import Move

from .conftest import Bench, Timed
from .kernel_cases import (
    BF16,
    CASTS,
    FAMILIES,
    FP16,
    FP32,
    QUANTISED,
    cast,
    is_equal,
    nbytes,
    quantised,
    sources,
)
from .measure import median_seconds

ON_GPU = torch.cuda.is_available()
# The edge of the largest matrix, and how often a family is there: of a small batch, what a launch
# takes would be a large part.
SIZE, TIMES = (16384, 4) if ON_GPU else (128, 1)
# Scales belong to matrices; a vector has none.
QUANTISED_FAMILIES = ("whole", "column slices", "query groups", "transposed", "experts")
TOY_FAMILIES = ("query groups", "odd")
CAST_FAMILIES = tuple(FAMILIES) if ON_GPU else TOY_FAMILIES
# Triton's interpreter takes seconds for the last two.
SCHEMES = tuple(QUANTISED) if ON_GPU else tuple(QUANTISED)[:4]
SCHEME_FAMILIES = QUANTISED_FAMILIES if ON_GPU else TOY_FAMILIES[:1]


def measure(
    family: str, label: str, dtype: torch.dtype, make: Callable[[torch.Tensor], Move],
    timed: Timed, bench: Bench, reads: int = 1,
) -> None:  # fmt: skip
    """Check and time one batch."""
    moves = [make(source) for source in sources(family, dtype, bench.device, SIZE, TIMES)]
    batch = FusedCopy(moves)
    batch.run()
    if not is_equal(make, moves):
        pytest.fail("RED: not equal to the reference; no figure")
    details: dict[str, float] = {"moves": len(moves)}
    if ON_GPU and family == "whole":
        details["seconds_counting"] = median_seconds(partial(batch.run, count=True))
    timed(family, label, "kernel", nbytes(moves, reads), batch.run, details)


def short(dtype: torch.dtype) -> str:
    """As it is shown."""
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


@pytest.mark.parametrize(("src", "dst"), CASTS, ids=lambda dtype: short(dtype))
@pytest.mark.parametrize("family", CAST_FAMILIES)
def test_cast(family: str, src: torch.dtype, dst: torch.dtype, timed: Timed, bench: Bench) -> None:
    """A copy, or a cast."""
    measure(family, f"{short(src)} to {short(dst)}", src, partial(cast, dst), timed, bench)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", SCHEME_FAMILIES)
@pytest.mark.parametrize("src", [BF16, FP32] if ON_GPU else [BF16], ids=short)
def test_quantised(src: torch.dtype, family: str, scheme: str, timed: Timed, bench: Bench) -> None:
    """A scheme's codes and scales."""
    if src is FP32 and family != SCHEME_FAMILIES[0]:
        pytest.skip("one family is enough to see what the dtype does")
    label, make = f"{short(src)} {scheme}", partial(quantised, scheme)
    measure(family, label, src, make, timed, bench, QUANTISED[scheme])
