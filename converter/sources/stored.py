"""A tensor that lies somewhere, and how any range of it is brought into memory.

A source tensor may be one tensor in memory, or be put together from boxes: the chunks of a
torch_dist checkpoint, or the shards of several ranks. Both are `Stored`. Nothing is read before
`read_flat` asks for it, and then only the bytes that overlap the asked range. Files are read with
`preadv`, never mapped: a file that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..errors import CorruptSourceError

Shape = tuple[int, ...]

# Rows of a box at least this long are read each by itself; shorter ones in blocks.
_LONG_ROW_BYTES = 1 << 16
_BLOCK_BYTES = 4 << 20
_OPEN_FILES = 64


@dataclass(frozen=True)
class FileRange:
    """The first byte of a row-major array in a file. `offset` is in bytes.

    `crc` is the CRC-32 that the file keeps of the array's `nbytes` bytes; None if it keeps none.
    """

    path: Path
    offset: int
    nbytes: int = 0
    crc: int | None = None


@dataclass(frozen=True)
class Piece:
    """A box of a stored tensor: where it begins, its shape, and where its elements lie.

    `data` is either a tensor of that shape (memory, or a mapped file) or a `FileRange` of
    `prod(shape)` elements in row-major order.
    """

    offset: Shape
    shape: Shape
    data: torch.Tensor | FileRange


@dataclass(frozen=True)
class Stored:
    """A named source tensor of `shape` and `dtype`, put together from `pieces`.

    The pieces tile the shape exactly: the reader that made them has checked it. Where they are
    boxes only of another shape with the same elements in the same order, that shape is `grid`.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    grid: Shape | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    def read_flat(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill `out` with the elements [start, stop) of the row-major flattened tensor.

        Args:
            start, stop: element positions, 0 ≤ start ≤ stop ≤ numel.
            out: contiguous CPU tensor [stop - start] of the same dtype.

        Raises:
            CorruptSourceError: a file ends before the bytes asked for, or cannot be read.
            ValueError: `out` or the range does not fit this tensor.
        """
        self._check(start, stop, out)
        if start == stop:
            return
        for index in self._meeting(start, stop):
            _Box(self, self.pieces[index]).copy(start, stop, out)

    def _meeting(self, start: int, stop: int) -> list[int]:
        """The pieces whose spans meet [start, stop), without a look at all the others.

        A stack of experts has a piece for each of a layer's, and is read one expert at a time.
        """
        if len(self.pieces) == 1:
            return [0]
        order, first, last, reach = self._spans
        near = range(bisect.bisect_right(reach, start), bisect.bisect_left(first, stop))
        return [order[index] for index in near if last[index] > start]

    def _check(self, start: int, stop: int, out: torch.Tensor) -> None:
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"{self.name}: [{start}, {stop}) is not within {self.numel} elements")
        fits = out.dtype == self.dtype and out.shape == (stop - start,)
        if not fits or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"{self.name}: expected a contiguous CPU tensor [{stop - start}] of {self.dtype}, "
                f"found {out.dtype} {tuple(out.shape)} on {out.device}"
            )

    @functools.cached_property
    def _strides(self) -> Shape:
        """Row-major strides, in elements, of the shape that the pieces are boxes of."""
        shape = self.shape if self.grid is None else self.grid
        return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

    @functools.cached_property
    def _spans(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """The pieces' numbers by their first element's position, and that position.

        Then the one after the last element's, and the farthest of those so far.
        """
        strides = self._strides
        first = [sum(o * s for o, s in zip(p.offset, strides, strict=True)) for p in self.pieces]
        extent = [
            sum((size - 1) * stride for size, stride in zip(p.shape, strides, strict=True))
            for p in self.pieces
        ]
        order = sorted(range(len(first)), key=first.__getitem__)
        starts = [first[index] for index in order]
        ends = [first[index] + extent[index] + 1 for index in order]
        return order, starts, ends, list(itertools.accumulate(ends, max))


class _Box:
    """One piece as rows: runs of elements contiguous both in the piece and in the whole."""

    def __init__(self, stored: Stored, piece: Piece) -> None:
        self.name, self.dtype, self.data = stored.name, stored.dtype, piece.data
        strides, axis = stored._strides, len(piece.shape)
        run = 1
        # Axes that the piece spans wholly, and one more, make one contiguous run.
        while axis and (run == strides[axis - 1]):
            axis -= 1
            run *= piece.shape[axis]
        self.run, self.lead, self.strides = run, piece.shape[:axis], strides[:axis]
        self.base = sum(o * s for o, s in zip(piece.offset, strides, strict=True))
        self.rows = math.prod(self.lead)

    def position(self, row: int) -> int:
        """Where row `row` begins in the flattened whole."""
        at = self.base
        for size, stride in zip(reversed(self.lead), reversed(self.strides), strict=True):
            row, index = divmod(row, size)
            at += index * stride
        return at

    def copy(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Copy the elements within [start, stop) of the whole to their places in `out`."""
        rows = range(self.rows)
        row = bisect.bisect_right(rows, start - self.run, key=self.position)
        end = bisect.bisect_left(rows, stop, key=self.position)
        while row < end:
            count = self._block(row, end, start, stop)
            if count > 1:
                self._copy_block(row, count, start, out)
            else:
                self._copy_row(row, start, stop, out)
            row += max(count, 1)

    def _block(self, row: int, end: int, start: int, stop: int) -> int:
        """How many whole, short, evenly spaced rows from `row` on are worth one read."""
        if self.run * self.dtype.itemsize >= _LONG_ROW_BYTES or self.position(row) < start:
            return 0
        most = max(1, _BLOCK_BYTES // (self.run * self.dtype.itemsize))
        count = min(self.lead[-1] - row % self.lead[-1], most, end - row) if self.lead else 0
        return count - 1 if count and self.position(row + count - 1) + self.run > stop else count

    def _copy_block(self, row: int, count: int, start: int, out: torch.Tensor) -> None:
        size = self.dtype.itemsize
        block = _bytes(_elements(self, row * self.run, (row + count) * self.run))
        target = np.lib.stride_tricks.as_strided(
            _bytes(out[self.position(row) - start :]),
            (count, self.run * size),
            (self.strides[-1] * size, 1),
        )
        # torch would start its threads for each block, and the callers are threads already.
        np.copyto(target, block.reshape(target.shape))

    def _copy_row(self, row: int, start: int, stop: int, out: torch.Tensor) -> None:
        at = self.position(row)
        low, high = max(at, start), min(at + self.run, stop)
        inner = row * self.run - at
        _read(self, low + inner, high + inner, out[low - start : high - start])


def _elements(box: _Box, low: int, high: int) -> torch.Tensor:
    """Elements [low, high) of a piece, flattened; a view where the memory allows it."""
    if isinstance(box.data, torch.Tensor):
        return _flat_part(box.data, low, high)
    out = torch.empty(high - low, dtype=box.dtype, device="cpu")
    _read(box, low, high, out)
    return out


def _bytes(flat: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A contiguous 1-D CPU tensor's memory: numpy has no bf16 and no fp8, but it needs none."""
    array: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array


def _flat_part(data: torch.Tensor, low: int, high: int) -> torch.Tensor:
    data = data.detach()
    if data.is_contiguous():
        return data.view(-1)[low:high].cpu()
    # Flattening copies here, so only the slices of the first axis that are needed are flattened.
    inner = data.numel() // data.shape[0]
    first = low // inner
    flat = data[first : -(-high // inner)].contiguous().view(-1)
    return flat[low - first * inner : high - first * inner].cpu()


def _read(box: _Box, low: int, high: int, out: torch.Tensor) -> None:
    if isinstance(box.data, torch.Tensor):
        np.copyto(_bytes(out), _bytes(_flat_part(box.data, low, high)))
        return
    path, offset = box.data.path, box.data.offset + low * box.dtype.itemsize
    left = _bytes(out).data
    try:
        file = _open(path)
        while left:
            count = os.preadv(file.fd, [left], offset)
            if not count:
                raise CorruptSourceError(
                    f"{path}: tensor {box.name!r}: the file ends at byte {offset}, "
                    f"{len(left)} bytes early: truncated while it was read?"
                )
            left, offset = left[count:], offset + count
    except OSError as error:
        raise CorruptSourceError(f"{path}: tensor {box.name!r}: {error}") from error


class _File:
    """An open descriptor, closed when its last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _open(path: Path) -> _File:
    """Evicting a file does not close it under a thread that reads it: it holds a reference."""
    return _File(path)


def close_files() -> None:
    """Close the descriptors that `read_flat` keeps open between calls."""
    _open.cache_clear()
