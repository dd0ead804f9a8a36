"""Moves whose sources are parameters that live on, and the memory that passes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import Scheme

from .backend import Make, Reduce
from .slices import View

ALIGNMENT = 256


@dataclass(frozen=True)
class Source:
    """A part of a parameter, by the parameter's name in the whole model."""

    name: str
    view: View


@dataclass(frozen=True)
class Feed:
    """A move whose source is a place in a live parameter, or memory that stays where it is."""

    dst: torch.Tensor
    src: Source | torch.Tensor
    shift: float = 0.0
    quant: Scheme | None = None

    def move(self, live: Mapping[str, torch.Tensor]) -> Move:
        """Over the parameters as they are now."""
        src = self.src
        if isinstance(src, Source):
            src = src.view.of(live[src.name])
        return Move(self.dst, src, self.shift, self.quant)


class Batch:
    """Feeds that run together; none is no work."""

    def __init__(self, feeds: Sequence[Feed], live: Mapping[str, torch.Tensor], make: Make) -> None:
        self._feeds, self._make = tuple(feeds), make
        self._moves = [feed.move(live) for feed in feeds]
        self._copy = make(self._moves) if feeds else None

    def run(self, reduce: Reduce | None = None) -> None:
        """Launch every kind once; `reduce` merges amaxes, if there are any."""
        if self._copy is not None:
            self._copy.run(reduce=reduce)

    def follow(self, moved: set[str], live: Mapping[str, torch.Tensor]) -> bool:
        """Go after parameters that have moved; False if a captured graph is no longer good."""
        touched = False
        for index, feed in enumerate(self._feeds):
            if isinstance(feed.src, Source) and feed.src.name in moved:
                self._moves[index], touched = feed.move(live), True
        if not touched or (self._copy is not None and self._copy.follow(self._moves)):
            return True
        self._copy = self._make(self._moves)
        return False


class Workspace:
    """Memory that passes share, one after the other: each takes from its beginning."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._used = 0

    def rewind(self) -> None:
        """Begin anew: what was taken before will be overwritten."""
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], aligned."""
        begin = self._used
        self._used += padded(nbytes)
        return self._memory[begin : begin + nbytes]


def padded(nbytes: int) -> int:
    """The bytes that are taken for so many."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
