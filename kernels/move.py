"""What a kernel is asked to do: pairs of strided views, and how they become descriptor rows.

A `Move` says "make `dst` equal to `src`": two views of one shape, any strides. Split, concat,
de-interleave, slice, repeat (stride 0) and transpose are all such pairs, so one kernel serves
them. `coalesce` finds the fewest strided dimensions that describe a pair, and `describe` lays
those out as (outer, rows, columns) boxes that the kernel walks in tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .quant import GivenScale, NvScale, Regional, Scheme, TensorScale

__all__ = ["CASTS", "FLOATS", "Box", "Dim", "GivenScale", "Move", "coalesce", "describe"]

TILE_ROWS, TILE_COLS = 8, 512
TRANSPOSE_TILE = 128, 64
# Vector loads and stores need every length and stride to be a multiple of this many elements, and
# addresses to be one of this many bytes: those of the widest access.
VECTOR, ALIGNED = 16, 16
# A run of columns at least this long is folded into rows of TILE_COLS, which fills tiles better
# than a few very long rows do.
FOLD = 64 * TILE_COLS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CASTS = (*FLOATS, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Move:
    """`dst = downcast((src + shift) * quant_scale)`, element by element.

    `dst` and `src` are views of one shape with any strides (an `NvScale`'s `dst`, of two codes a
    byte, has half of `src`'s columns); `src` may repeat elements by stride 0. Equal dtypes without
    shift and quant are copied bit for bit; otherwise both must be floats: fp32, bf16 or fp16 in;
    fp32, bf16, fp16 or e4m3 out. The arithmetic is fp32 with one rounding.
    A `quant` says how the elements are scaled and what `dst` holds: see `quant`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the shapes differ, the dtypes have no conversion, or the scales do not fit.
    """

    dst: torch.Tensor
    src: torch.Tensor
    shift: float = 0.0
    quant: Scheme | None = None

    def __post_init__(self) -> None:
        # A look at the types beforehand would cost as much as all else here.
        try:
            self._check()
        except AttributeError as error:
            found = ", ".join(type(one).__name__ for one in (self.dst, self.src, self.quant))
            raise TypeError(
                f"a move takes two tensors and a scheme such as GivenScale or None, found {found}"
            ) from error

    def _check(self) -> None:
        expected: tuple[int, ...] = self.src.shape
        if isinstance(self.quant, NvScale) and expected:
            expected = (*expected[:-1], expected[-1] // 2)
        if self.dst.shape != expected:
            raise ValueError(
                f"a move needs views of one shape (two codes a byte count as two): "
                f"dst {tuple(self.dst.shape)}, src {tuple(self.src.shape)}"
            )
        if self.quant is not None:
            _check_quant(self.dst, self.src, self.quant)
        elif not self.is_bit_copy and (self.src.dtype not in FLOATS or self.dst.dtype not in CASTS):
            raise ValueError(f"no conversion from {self.src.dtype} to {self.dst.dtype}")

    @property
    def is_bit_copy(self) -> bool:
        """True if no value changes: the bits go over as they are."""
        return self.src.dtype == self.dst.dtype and self.shift == 0.0 and self.quant is None


def _check_quant(dst: torch.Tensor, src: torch.Tensor, quant: Scheme) -> None:
    scheme = type(quant).__name__
    if dst.dtype is not quant.codes or src.dtype not in FLOATS:
        raise ValueError(f"{scheme} makes {quant.codes} of a float, not {dst.dtype} of {src.dtype}")
    if isinstance(quant, Regional):
        count = src.numel()
        if not dst.is_contiguous() or count % quant.columns:
            raise ValueError(
                f"{scheme} fills whole rows of {quant.columns} elements one after the other, found "
                f"{count} elements with strides {dst.stride()}"
            )
        last = quant.first_row + count // quant.columns
        if quant.first_row < 0 or last > quant.rows:
            raise ValueError(
                f"{scheme} has scales for {quant.rows} rows, found rows {quant.first_row} to {last}"
            )


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
    return merge(dst.shape, dst.stride(), src.stride())


def merge(shape: Sequence[int], dst: Sequence[int], src: Sequence[int]) -> list[Dim]:
    """`coalesce` for a shape and two sets of strides, in elements."""
    if 0 in shape:
        return []
    dims = [Dim(n, d, s) for n, d, s in zip(shape, dst, src, strict=True) if n != 1]
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
        yield from unroll(dims, 0, "transposed")
    else:
        yield from unroll(dims, 0, "strided")


def _straight(dims: list[Dim]) -> Iterator[Box]:
    """Fold a long run of columns into rows; what does not fill a row becomes a box of its own."""
    run = dims[-1].size
    foldable = run >= FOLD if run % TILE_COLS == 0 else len(dims) == 1 and run > TILE_COLS
    if not foldable:
        yield from unroll(dims, 0, "straight")
        return
    rows, rest = divmod(run, TILE_COLS)
    folded = [Dim(rows, TILE_COLS, TILE_COLS), Dim(TILE_COLS, 1, 1)]
    yield from unroll([*dims[:-1], *folded], 0, "straight")
    if rest:
        yield from unroll([Dim(rest, 1, 1)], rows * TILE_COLS, "straight")


def unroll(dims: list[Dim], start: int, order: str) -> Iterator[Box]:
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
    aligned = dst_pointer % ALIGNED == 0 and src_pointer % ALIGNED == 0
    return aligned and all(value % VECTOR == 0 for value in multiples)


def distinct_amaxes(moves: Iterable[Move]) -> list[torch.Tensor]:
    """The groups' amaxes, each once, in the order of the moves."""
    found = (m.quant.amax for m in moves if isinstance(m.quant, (TensorScale, NvScale)))
    return list({amax.data_ptr(): amax for amax in found}.values())
