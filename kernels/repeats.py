"""The same moves over other memory, any number of times: a model's layers, its experts.

Views, checks and descriptors are made once; for every further time addresses alone are computed,
all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .move import Move
from .quant import GivenScale, NvScale, Scheme, TensorScale, placed
from .regions import stage


class Time(NamedTuple):
    """The memory of one time, in the order of a `Repeat`'s own.

    Attributes:
        outputs: what the moves write to.
        sources: what they read.
        quant_scale: the given scale of all moves, where they have one.
    """

    outputs: Sequence[torch.Tensor]
    sources: Sequence[torch.Tensor]
    quant_scale: float = 1.0


@dataclass(frozen=True)
class Repeat:
    """Moves that are done over the memory of each of `times`, and not over their own.

    A time's tensors have the shapes, strides and dtypes of the moves' own, and their addresses
    modulo 16.

    Attributes:
        moves: at least one; none is empty. A given scale is a float.
        outputs: the contiguous tensors that the moves write to: their codes, scales and amaxes.
        sources: the tensors that they read.
        reads: for each move, the number of the source that its own is a view of.
        times: at least one.
    """

    moves: Sequence[Move]
    outputs: Sequence[torch.Tensor]
    sources: Sequence[torch.Tensor]
    reads: Sequence[int]
    times: Sequence[Time]

    def is_staged(self) -> bool:
        """True if a matrix must be gathered first, for which each time needs memory."""
        return bool(stage(self.moves)[0])

    def written_out(self) -> Iterator[Move]:
        """The moves of every time, one by one."""
        for time in self.times:
            for move, number in zip(self.moves, self.reads, strict=True):
                src = again(move.src, self.sources[number], time.sources[number])
                yield self._at(move, src, time)

    def _at(self, move: Move, src: torch.Tensor, time: Time) -> Move:
        def place(view: torch.Tensor) -> torch.Tensor:
            number = self._output(view)
            return again(view, self.outputs[number], time.outputs[number])

        quant: Scheme | None = GivenScale(time.quant_scale)
        if not isinstance(move.quant, GivenScale):
            quant = placed(move.quant, place)
        return Move(place(move.dst), src, move.shift, quant)

    def _output(self, view: torch.Tensor) -> int:
        """Which of the outputs a view lies in."""
        at = view.data_ptr()
        return next(
            index
            for index, one in enumerate(self.outputs)
            if one.data_ptr() <= at < one.data_ptr() + one.nbytes
        )

    def steps(self) -> NDArray[np.int64]:
        """[times, moves, 7]: what each time adds to the fields `tables.ADDRESSES` of a move."""
        own = _pointers(0, len(self.moves), self.outputs, self.sources)
        each = np.array([
            _pointers(number, len(self.moves), time.outputs, time.sources)
            for number, time in enumerate(self.times)
        ])  # fmt: skip
        steps: NDArray[np.int64] = (each - np.array(own))[:, self._columns()]
        return steps

    def _columns(self) -> NDArray[np.int64]:
        """[moves, 7]: which of `_pointers` each field of a move goes with."""
        first_source = len(self.outputs)
        index, flag, fixed = (first_source + len(self.sources) + more for more in range(3))
        columns = []
        for number, move in zip(self.reads, self.moves, strict=True):
            quant = move.quant
            scale = amax = second = fixed
            if isinstance(quant, GivenScale):
                scale = flag
            elif quant is not None:
                scale = self._output(quant.dequant_scale)
            if isinstance(quant, (TensorScale, NvScale)):
                amax = self._output(quant.amax)
            if isinstance(quant, NvScale):
                second = self._output(quant.second_scale)
            dst, src = self._output(move.dst), first_source + number
            columns.append((dst, src, scale, index, amax, second, flag))
        return np.array(columns)


def again(view: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A view of `own`, as the same view of `other`, which is laid out alike."""
    first = int(view.storage_offset() - own.storage_offset())
    return other.as_strided(view.shape, view.stride(), int(other.storage_offset()) + first)


def _pointers(
    time: int, moves: int, outputs: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
) -> list[int]:
    """Addresses; a move's index, that of 4 bytes (a flag, a given scale) for each move, and 0."""
    pointers = [*map(torch.Tensor.data_ptr, outputs), *map(torch.Tensor.data_ptr, sources)]
    return [*pointers, time * moves, 4 * time * moves, 0]
