"""A target tensor in cuts: runs of its elements, each with the moves that fill it.

What is larger than a window is cut along its rows. A region that shares a scale (a row, a block, a
piece of a row) is never cut, and a cut's scales come with it: they are a run of the scales' tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import GivenScale, NvScale, Regional, Scheme, TensorScale

from .plan import Planned, extent, storage_key

_R = TypeVar("_R", bound=Regional)

# A move's vector accesses need multiples of this many elements.
_GRAIN = 1024


@dataclass(frozen=True)
class Run:
    """Elements [start, stop) of a planned tensor, flattened."""

    planned: Planned
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return (self.stop - self.start) * self.planned.dst.element_size()


@dataclass(frozen=True)
class Cut:
    """What is filled together: a run of a tensor, then runs of its scales; `moves` are on meta."""

    runs: tuple[Run, ...]
    moves: tuple[Move, ...]

    @property
    def nbytes(self) -> int:
        """Bytes written, and bytes read at most."""
        written = sum(run.nbytes for run in self.runs)
        return written + sum(read_bytes(move.src) for move in self.moves)

    @property
    def amaxes(self) -> list[torch.Tensor]:
        """The amaxes that its moves share with others, in the moves' order, each once."""
        found = (m.quant.amax for m in self.moves if isinstance(m.quant, (TensorScale, NvScale)))
        return list({storage_key(amax): amax for amax in found}.values())


def read_bytes(view: torch.Tensor) -> int:
    """Bytes of a meta view's different elements; none for a tensor that is already in memory."""
    if not view.is_meta:
        return 0
    sizes = (n for n, stride in zip(view.shape, view.stride(), strict=True) if stride)
    return math.prod(sizes) * view.element_size()


Scales = Mapping[int, Planned]


def cuts(planned: Planned, scales: Scales, count: int, seen: set[tuple[int, int]]) -> Iterator[Cut]:
    """A tensor in about `count` cuts.

    Args:
        planned: the tensor; its `dst` is on meta.
        scales: the tensors that moves write scales into, by storage.
        count: how many; a scheme's regions may make it fewer.
        seen: single scales, by storage and offset, that an earlier cut writes; added to.
    """
    for matrix in _matrices(planned):
        step = -(-(matrix.stop - matrix.start) // (count * matrix.grain)) * matrix.grain
        for start in range(matrix.start, matrix.stop, max(step, 1)):
            stop = min(start + step, matrix.stop)
            moves = tuple(matrix.within(start, stop))
            own = Run(planned, start, stop)
            yield Cut((own, *_scale_runs(moves, scales, seen)), moves)


@dataclass(frozen=True)
class _Matrix:
    """Elements [start, stop) that may be cut at multiples of `grain` from `start` on."""

    start: int
    stop: int
    grain: int
    moves: tuple[Move, ...]

    def within(self, start: int, stop: int) -> Iterator[Move]:
        """The parts of the moves that fill [start, stop)."""
        for move in self.moves:
            for dst, src in clip(move.dst, move.src, start, stop):
                quant: Scheme | None = move.quant
                if isinstance(quant, Regional):
                    done = int(dst.storage_offset() - move.dst.storage_offset())
                    quant = self._region(quant, done, start - self.start, stop - self.start)
                yield Move(dst, src, move.shift, quant)

    @staticmethod
    def _region(quant: _R, done: int, start: int, stop: int) -> _R:
        """The scheme for a part that begins `done` elements after its move does."""
        width, height = _width(quant), quant.region[0]
        first, last = start // width // height, -(-(stop // width) // height)
        row = quant.first_row + done // width - start // width
        part = quant.dequant_scale[first:last]
        return dataclasses.replace(quant, dequant_scale=part, first_row=row)


def _width(quant: Regional) -> int:
    """Elements of `dst` in a row; two codes of NVFP4 are one."""
    return quant.columns // 2 if isinstance(quant, NvScale) else quant.columns


def _matrices(planned: Planned) -> Iterator[_Matrix]:
    """Matrices that have scales of their own; any other tensor is one."""
    groups: dict[tuple[int, int], list[Move]] = {}
    for move in planned.moves:
        if isinstance(move.quant, Regional):
            scale = move.quant.dequant_scale
            groups.setdefault((storage_key(scale), int(scale.storage_offset())), []).append(move)
    if not groups:
        size = planned.dst.numel()
        row = planned.dst.shape[-1] if planned.dst.ndim > 1 else 1
        yield _Matrix(0, size, row if row >= _GRAIN else row * -(-_GRAIN // row), planned.moves)
    for moves in groups.values():
        quant = moves[0].quant
        assert isinstance(quant, Regional)
        width = _width(quant)
        start = int(moves[0].dst.storage_offset()) - quant.first_row * width
        size = sum(move.dst.numel() for move in moves)
        yield _Matrix(start, start + size, width * quant.region[0], tuple(moves))


def _scale_runs(
    moves: tuple[Move, ...], scales: Scales, seen: set[tuple[int, int]]
) -> Iterator[Run]:
    """The runs of scales' tensors that the moves write, those written before left out."""
    for move in moves:
        for view in scale_views(move.quant):
            place = storage_key(view), int(view.storage_offset())
            if place[0] in scales and place not in seen and view.numel():
                seen.add(place)
                yield Run(scales[place[0]], place[1], place[1] + view.numel())


def scale_views(quant: Scheme | None) -> Iterator[torch.Tensor]:
    """The tensors that a scheme writes."""
    if quant is not None and not isinstance(quant, GivenScale):
        for field in dataclasses.fields(quant):
            value = getattr(quant, field.name)
            if isinstance(value, torch.Tensor):
                yield value


def clip(
    dst: torch.Tensor, src: torch.Tensor, lo: int, hi: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The parts of a pair of views whose `dst` elements lie within [lo, hi) of their storage.

    `dst`'s axes are in the order of its memory, as views of a contiguous tensor are.
    """
    if not dst.numel():
        return
    first, stop = extent(dst)
    if lo <= first and stop <= hi:
        yield dst, src
        return
    if not dst.ndim or stop <= lo or hi <= first:
        return
    count, stride = dst.shape[0], max(dst.stride(0), 1)
    inner = stop - first - (count - 1) * stride
    low, high = max(0, (lo - first - inner) // stride + 1), min(count, -(-(hi - first) // stride))
    begin = min(max(low, -(-(lo - first) // stride)), high)
    end = max(begin, min(high, (hi - inner - first) // stride + 1))
    for index in range(low, begin):
        yield from clip(dst.select(0, index), src.select(0, index), lo, hi)
    if begin < end:
        yield dst.narrow(0, begin, end - begin), src.narrow(0, begin, end - begin)
    for index in range(end, high):
        yield from clip(dst.select(0, index), src.select(0, index), lo, hi)
