"""Tensors of a plan made again in plain torch, a piece at a time: what a result is compared with.

It shares no cutting and no streaming with the engine, so that a mistake there shows: a matrix with
scales is gone through by its rows, any other tensor along its axes, and what is read is halved
until it is small. Memory depends on the bound alone, not on the size of a tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import BlockScale, MxScale, NvScale, Regional, RowScale, TensorScale
from fuseport.kernels.reference import fused_copy_ref

from .errors import RecipeError
from .limits import BASE, Limits
from .plan import Planned, extent, storage_key
from .sources.stored import Stored

# Elements of a piece where the bound allows them, and the most bytes that one of them takes:
# what is read around it, fp32 values, indices and codes.
_PIECE, _TAKES = 4 << 20, 64

Grouped = TensorScale | NvScale
Matrix = RowScale | BlockScale | MxScale | NvScale


@dataclass(frozen=True)
class Piece:
    """A part of a target tensor: a meta view of its `dst`, and what its elements should be."""

    planned: Planned
    view: torch.Tensor
    expected: torch.Tensor


class Rederive:
    """Makes a plan's tensors again.

    Args:
        tensors: the plan's, over meta tensors.
        stored: what they are made of, by storage.
        limits: of which `host_memory` counts.
    """

    def __init__(
        self, tensors: Iterable[Planned], stored: Mapping[int, Stored], limits: Limits
    ) -> None:
        self._stored = stored
        self._most = (limits.host_memory - BASE) // _TAKES
        self._size = min(_PIECE, self._most)
        self._scales: dict[int, Planned] = {}
        self._groups: dict[int, list[Move]] = {}
        self._amaxes: dict[int, torch.Tensor] = {}
        # Scales that many pieces make, and that are compared once.
        self._seen: set[tuple[int, int]] = set()
        for one in tensors:
            self._scales[storage_key(one.dst)] = one
            for move in one.moves:
                if isinstance(move.quant, Grouped):
                    self._groups.setdefault(storage_key(move.quant.amax), []).append(move)

    def pieces(self, planned: Planned) -> Iterator[Piece]:
        """All of a tensor, with the scales that its moves write.

        Raises:
            RecipeError: the smallest piece does not fit the bound.
        """
        matrices: dict[tuple[int, int], list[Move]] = {}
        for move in planned.moves:
            if isinstance(move.quant, Regional):
                scale = move.quant.dequant_scale
                key = storage_key(scale), int(scale.storage_offset())
                matrices.setdefault(key, []).append(move)
            elif move.dst.numel():
                yield from self._plain(planned, move)
        for moves in matrices.values():
            yield from self._matrix(planned, moves)

    def _plain(self, planned: Planned, move: Move) -> Iterator[Piece]:
        quant = move.quant
        if isinstance(quant, TensorScale):
            quant = TensorScale(_number(), _number())
        for dst, src in _split(move.dst, move.src, self._size):
            expected = torch.empty(dst.shape, dtype=dst.dtype, device="cpu")
            self._run(Move(expected, self._read(src), move.shift, quant), move)
            yield Piece(planned, dst, expected)
            if isinstance(move.quant, TensorScale) and isinstance(quant, TensorScale):
                yield from self._once(move.quant.dequant_scale, quant.dequant_scale)

    def _matrix(self, planned: Planned, moves: list[Move]) -> Iterator[Piece]:
        """By its rows, as many at a time as fill whole regions."""
        quant = moves[0].quant
        assert isinstance(quant, Matrix)
        columns, height = quant.columns, quant.region[0]
        width = columns // 2 if isinstance(quant, NvScale) else columns
        start = int(moves[0].dst.storage_offset()) - quant.first_row * width
        rows = sum(move.src.numel() for move in moves) // columns
        step = max(1, self._size // (columns * height)) * height
        if min(step, rows) * columns > self._most:
            raise RecipeError(
                f"{planned.name}: {height} rows of {columns} elements are looked at together; give "
                f"more host_memory (--host-memory)"
            )
        for first in range(0, rows, step):
            stop = min(first + step, rows)
            views = (view for move in moves for view in _rows(move, columns, first, stop))
            source = torch.cat([self._read(view).view(-1, columns) for view in views])
            codes = torch.empty(stop - first, width, dtype=planned.dst.dtype, device="cpu")
            scales = quant.dequant_scale[first // height : -(-stop // height)]
            real = _on_host(quant, torch.empty(scales.shape, dtype=scales.dtype, device="cpu"))
            self._run(Move(codes, source, moves[0].shift, real), moves[0])
            flat = planned.dst.view(-1)[start + first * width : start + stop * width]
            yield Piece(planned, flat, codes.view(-1))
            yield Piece(self._scales[storage_key(scales)], scales, real.dequant_scale)
            if isinstance(quant, NvScale) and isinstance(real, NvScale):
                yield from self._once(quant.second_scale, real.second_scale)

    def _once(self, view: torch.Tensor, expected: torch.Tensor) -> Iterator[Piece]:
        place = storage_key(view), int(view.storage_offset())
        if place not in self._seen and place[0] in self._scales:
            self._seen.add(place)
            yield Piece(self._scales[place[0]], view, expected.view(view.shape))

    def _run(self, move: Move, planned: Move) -> None:
        """Fill a piece, with the amax of all that shares its scale."""
        if not isinstance(planned.quant, Grouped):
            fused_copy_ref([move])
            return
        amax = self._amax(planned.quant)
        fused_copy_ref([move], reduce=lambda amaxes: amaxes[0].copy_(amax))

    def _amax(self, quant: Grouped) -> torch.Tensor:
        key = storage_key(quant.amax)
        if key not in self._amaxes:
            found = torch.zeros((), dtype=torch.float32, device="cpu")
            for move in self._groups[key]:
                for _, src in _split(move.src, move.src, self._size):
                    values = self._read(src).float() + move.shift
                    finite = torch.where(torch.isfinite(values), values.abs(), 0.0)
                    found = torch.maximum(found, finite.max())
            self._amaxes[key] = found
        return self._amaxes[key]

    def _read(self, view: torch.Tensor) -> torch.Tensor:
        return read_view(self._stored[storage_key(view)], view, self._size)


def read_view(stored: Stored, view: torch.Tensor, size: int) -> torch.Tensor:
    """A meta view's elements, contiguous, read in ranges of few more than `size` elements."""
    out = torch.empty(view.shape, dtype=view.dtype, device="cpu")
    _fill(stored, view, out, size)
    return out


def _fill(stored: Stored, view: torch.Tensor, out: torch.Tensor, size: int) -> None:
    if not view.numel():
        return
    first, stop = extent(view)
    if stop - first <= size or view.numel() == 1:
        buffer = torch.empty(stop - first, dtype=view.dtype, device="cpu")
        stored.read_flat(first, stop, buffer)
        out.copy_(buffer.as_strided(view.shape, view.stride()))
        return
    axes = [axis for axis in range(view.ndim) if view.shape[axis] > 1]
    axis = max(axes, key=lambda one: view.stride(one))
    half = view.shape[axis] // 2
    for begin, count in ((0, half), (half, view.shape[axis] - half)):
        _fill(stored, view.narrow(axis, begin, count), out.narrow(axis, begin, count), size)


def _split(
    dst: torch.Tensor, src: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A pair of views in parts of at most `size` elements, along their first axes."""
    if dst.numel() <= size:
        if dst.numel():
            yield dst, src
        return
    inner = dst.numel() // dst.shape[0]
    if inner > size:
        for index in range(dst.shape[0]):
            yield from _split(dst[index], src[index], size)
        return
    yield from zip(dst.split(size // inner), src.split(size // inner), strict=True)


def _rows(move: Move, columns: int, first: int, stop: int) -> Iterator[torch.Tensor]:
    """The views of a move's source that are rows [first, stop) of its matrix."""
    assert isinstance(move.quant, Regional)
    own, count = move.quant.first_row, move.src.numel() // columns
    lead = move.src.ndim
    while math.prod(move.src.shape[lead:]) < columns:
        lead -= 1
    begin, end = max(first - own, 0), min(stop - own, count)
    if begin < end:
        yield from _leading(move.src, lead, begin, end)


def _leading(view: torch.Tensor, lead: int, begin: int, end: int) -> Iterator[torch.Tensor]:
    """The parts of a view whose first `lead` axes, read as one, are [begin, end)."""
    inner = math.prod(view.shape[1:lead])
    if lead == 0 or not (begin % inner or end % inner):
        yield view.narrow(0, begin // inner, (end - begin) // inner) if lead else view
        return
    for index in range(begin // inner, -(-end // inner)):
        low, high = max(begin - index * inner, 0), min(end - index * inner, inner)
        yield from _leading(view[index], lead - 1, low, high)


def _on_host(quant: Matrix, scales: torch.Tensor) -> Matrix:
    """A matrix's scheme for some of its rows, which become a matrix of their own."""
    real = {"dequant_scale": scales, "first_row": 0}
    if isinstance(quant, NvScale):
        real |= {"second_scale": _number(), "amax": _number()}
    return dataclasses.replace(quant, **real)  # type: ignore[arg-type]


def _number() -> torch.Tensor:
    return torch.empty(1, dtype=torch.float32, device="cpu")
