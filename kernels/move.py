"""What a kernel is asked to do: pairs of strided views, and how they become descriptor rows.

A `Move` says "make `dst` equal to `src`": two views of one shape, any strides. Split, concat,
de-interleave, slice, repeat (stride 0) and transpose are all such pairs, so one kernel serves
them. `coalesce` finds the fewest strided dimensions that describe a pair, and `describe` lays
those out as (outer, rows, columns) boxes that the kernel walks in tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

TILE_ROWS, TILE_COLS = 8, 512
TRANSPOSE_TILE = 128, 64
# Vector loads and stores need every length, stride and pointer to be a multiple of this many
# elements (and pointers of 16 bytes).
VECTOR = 16
# A run of columns at least this long is folded into rows of TILE_COLS, which fills tiles better
# than a few very long rows do.
FOLD = 64 * TILE_COLS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASTS = (*FLOATS, torch.float8_e4m3fn)


@dataclass(frozen=True)
class GivenScale:
    """Quantise with a scale that is known beforehand: `dst = saturate(src * quant_scale)`.

    `quant_scale` is a Python float, or an fp32 tensor of one element on the device of the move
    (read by the kernel, so that no value has to come to the host).
    """

    quant_scale: float | torch.Tensor


@dataclass(frozen=True)
class Move:
    """`dst = downcast((src + shift) * quant_scale)`, element by element.

    `dst` and `src` are views of one shape with any strides; `src` may repeat elements by stride
    0. Equal dtypes without shift and quant are copied bit for bit; otherwise both must be floats:
    fp32, bf16 or fp16 in; fp32, bf16, fp16 or e4m3 out. The arithmetic is fp32 with one rounding.

    Raises:
        ValueError: the shapes differ, or the dtypes have no conversion.
    """

    dst: torch.Tensor
    src: torch.Tensor
    shift: float = 0.0
    quant: GivenScale | None = None

    def __post_init__(self) -> None:
        if self.dst.shape != self.src.shape:
            raise ValueError(
                f"a move needs views of one shape: dst {tuple(self.dst.shape)}, "
                f"src {tuple(self.src.shape)}"
            )
        if not self.is_bit_copy and (self.src.dtype not in FLOATS or self.dst.dtype not in CASTS):
            raise ValueError(f"no conversion from {self.src.dtype} to {self.dst.dtype}")
        if self.quant is not None and self.dst.dtype is not torch.float8_e4m3fn:
            raise ValueError(f"a quantised move fills float8_e4m3fn, not {self.dst.dtype}")

    @property
    def is_bit_copy(self) -> bool:
        """True if no value changes: the bits go over as they are."""
        return self.src.dtype == self.dst.dtype and self.shift == 0.0 and self.quant is None


@dataclass(frozen=True)
class Dim:
    """One strided dimension of a pair of views; strides in elements."""

    size: int
    dst: int
    src: int


@dataclass(frozen=True)
class Box:
    """(outer, rows, columns) of one descriptor, its two base offsets in elements, and its kind.

    `order` is "straight" (both views contiguous along columns), "transposed" (dst contiguous
    along columns, src along rows) or "strided" (neither: right, but slow).
    """

    outer: Dim
    rows: Dim
    cols: Dim
    dst_offset: int
    src_offset: int
    order: str


ONE = Dim(1, 0, 0)


def coalesce(dst: torch.Tensor, src: torch.Tensor) -> list[Dim]:
    """The pair's dimensions in the order of dst's memory, merged where both views allow it.

    Empty tensors give an empty list; a scalar gives one dimension of size 1.
    """
    if dst.numel() == 0:
        return []
    dims = [
        Dim(n, d, s)
        for n, d, s in zip(dst.shape, dst.stride(), src.stride(), strict=True)
        if n != 1
    ]
    dims.sort(key=lambda dim: (dim.dst, dim.src), reverse=True)
    merged: list[Dim] = []
    for dim in dims:
        last = merged[-1] if merged else None
        if last and last.dst == dim.dst * dim.size and last.src == dim.src * dim.size:
            merged[-1] = Dim(last.size * dim.size, dim.dst, dim.src)
        else:
            merged.append(dim)
    return merged or [Dim(1, 1, 1)]


def describe(dst: torch.Tensor, src: torch.Tensor) -> Iterator[Box]:
    """The boxes that cover a pair of views of one shape; none if they are empty."""
    dims = coalesce(dst, src)
    if not dims:
        return
    if dims[-1].dst == 1 and dims[-1].src == 1:
        yield from _straight(dims)
        return
    unit = next((i for i, dim in enumerate(dims[:-1]) if dim.src == 1), None)
    if dims[-1].dst == 1 and unit is not None:
        dims.insert(-1, dims.pop(unit))
        yield from _unroll(dims, 0, "transposed")
    else:
        yield from _unroll(dims, 0, "strided")


def _straight(dims: list[Dim]) -> Iterator[Box]:
    """Fold a long run of columns into rows; what does not fill a row becomes a box of its own."""
    run = dims[-1].size
    foldable = run >= FOLD if run % TILE_COLS == 0 else len(dims) == 1 and run > TILE_COLS
    if not foldable:
        yield from _unroll(dims, 0, "straight")
        return
    rows, rest = divmod(run, TILE_COLS)
    folded = [Dim(rows, TILE_COLS, TILE_COLS), Dim(TILE_COLS, 1, 1)]
    yield from _unroll([*dims[:-1], *folded], 0, "straight")
    if rest:
        yield from _unroll([Dim(rest, 1, 1)], rows * TILE_COLS, "straight")


def _unroll(dims: list[Dim], start: int, order: str) -> Iterator[Box]:
    """Boxes of three dimensions; of more dimensions than that, the smallest are unrolled."""
    *outers, rows, cols = [ONE] * max(0, 3 - len(dims)) + dims
    *far, outer = sorted(outers, key=lambda dim: dim.size)
    for index in itertools.product(*(range(dim.size) for dim in far)):
        dst = start + sum(i * dim.dst for i, dim in zip(index, far, strict=True))
        src = start + sum(i * dim.src for i, dim in zip(index, far, strict=True))
        yield Box(outer, rows, cols, dst, src, order)


def tile_shape(order: str) -> tuple[int, int]:
    """(rows, columns) of the tiles in which a box is walked."""
    if order == "transposed":
        return TRANSPOSE_TILE
    return TILE_ROWS, TILE_COLS


def tile_counts(box: Box) -> tuple[int, int, int]:
    """Number of tiles along (outer, rows, columns)."""
    rows, cols = tile_shape(box.order)
    return box.outer.size, math.ceil(box.rows.size / rows), math.ceil(box.cols.size / cols)


def is_vector(box: Box, dst_pointer: int, src_pointer: int) -> bool:
    """True if 16-byte loads and stores are possible throughout: everything is a multiple of 16.

    `dst_pointer` and `src_pointer` are the box's own addresses in bytes.
    """
    if box.order == "strided":
        return False
    along_src = box.rows if box.order == "transposed" else box.cols
    across_src = box.cols if box.order == "transposed" else box.rows
    multiples = (
        box.cols.size, along_src.size, box.outer.dst, box.outer.src, box.rows.dst, across_src.src,
    )  # fmt: skip
    aligned = dst_pointer % 16 == 0 and src_pointer % 16 == 0
    return aligned and all(value % VECTOR == 0 for value in multiples)
