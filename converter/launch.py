"""A window's moves on real memory, and how amaxes travel between windows."""

from __future__ import annotations

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import Scheme, placed

from .backend import Reduce
from .cuts import Run
from .loads import key_of
from .plan import bind, extent, storage_key
from .windows import Window


def bound_moves(
    window: Window, slab: torch.Tensor, device: torch.device
) -> tuple[list[Move], torch.Tensor]:
    """The moves over a slab on `device`, and the number of each one's cut (int64)."""
    binder = _Binder(window, slab, device)
    moves: list[Move] = []
    owners: list[int] = []
    for index, cut in enumerate(window.cuts):
        moves += [binder.move(move) for move in cut.moves]
        owners += [index] * len(cut.moves)
    return moves, torch.tensor(owners, dtype=torch.int64, device="cpu")


class _Binder:
    """Finds real memory for meta views; scales and amaxes without a run get scratch memory."""

    def __init__(self, window: Window, slab: torch.Tensor, device: torch.device) -> None:
        self.window, self.slab, self.device = window, slab, device
        self.runs: dict[int, list[tuple[Run, int]]] = {}
        for run in window.runs:
            key = storage_key(run.planned.dst)
            self.runs.setdefault(key, []).append((run, window.places[key, run.start]))
        self.scratch: dict[tuple[int, int], torch.Tensor] = {}

    def move(self, move: Move) -> Move:
        quant: Scheme | None = placed(move.quant, self.target)
        return Move(self.target(move.dst), self.source(move.src), move.shift, quant)

    def source(self, view: torch.Tensor) -> torch.Tensor:
        if view.is_meta and view.numel():
            return self.window.loads.placed[key_of(view)].on(self.slab)
        if view.is_meta:
            return torch.empty_like(view, device=self.device)
        return view.to(self.device)

    def target(self, view: torch.Tensor) -> torch.Tensor:
        if not view.numel():
            return torch.empty_like(view, device=self.device)
        first, stop = extent(view)
        for run, place in self.runs.get(storage_key(view), ()):
            if run.start <= first and stop <= run.stop:
                flat = self.slab[place : place + run.nbytes].view(view.dtype)
                return bind(view, flat, run.start)
        key = storage_key(view), first
        if key not in self.scratch:
            self.scratch[key] = torch.empty(stop - first, dtype=view.dtype, device=self.device)
        return bind(view, self.scratch[key], first)


def reducer(window: Window, device: torch.device) -> Reduce | None:
    """What happens to a window's amaxes between the passes; None where they are its own."""
    shared = window.shared
    if shared is None:
        return None
    found = {storage_key(one): one for cut in window.cuts for one in cut.amaxes}
    running = [shared.of(amax, device) for amax in found.values()]

    def merge(amaxes: tuple[torch.Tensor, ...]) -> None:
        for own, most in zip(amaxes, running, strict=True):
            if window.measures:
                torch.maximum(most, own, out=most)
            own.copy_(most)

    return merge
