"""Planning by patterns: what looks alike is planned once, and repeated at other addresses.

A model's layers, and its experts, are the same tensors again and again. Views and moves are made
for the first of each; for the others memory, names and addresses are enough.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from fuseport.kernels.move import Move, distinct_amaxes
from fuseport.kernels.repeats import Repeat, Time

from . import collector
from .layout import Flat, Layout, leaves
from .quantise import Builder
from .targets.parts import TargetTensor

# Addresses modulo this decide which code runs.
ALIGNED = 16


@dataclass
class Work:
    """What fills some target tensors: moves, and moves that are repeated.

    `filled` are (rank, name, tensor).
    """

    filled: list[tuple[int, str, torch.Tensor]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)


@dataclass(frozen=True)
class _Pattern:
    """The first plan of a pattern, and what a further one needs memory for."""

    moves: Sequence[Move]
    outputs: Sequence[torch.Tensor]
    amaxes: Sequence[torch.Tensor]
    memory: Sequence[tuple[tuple[int, ...], torch.dtype]]


class Repeats:
    """Plans target tensors over real memory, run by run; patterns are kept from run to run."""

    def __init__(self, make: Builder) -> None:
        self._make = make
        self._patterns: dict[Hashable, _Pattern] = {}

    @collector.paused()
    def work(self, targets: Sequence[TargetTensor]) -> Work:
        """What fills some tensors; scales are shared among these alone.

        Raises:
            RecipeError: a weight's rows do not fit the scheme.
        """
        work = Work()
        times: dict[Hashable, list[Time]] = {}
        for target in targets:
            for part in self._make.parts(target):
                names = self._make.names(part)
                key = (len(names), part.dtype, part.shift, part.quant is None, _looks(part.layout))
                pattern = self._patterns.get(key)
                if pattern is None or not self._make.is_regular(part):
                    self._first(part, key, work)
                else:
                    time = self._again(part, names, pattern, work)
                    times.setdefault(key, []).append(time)
        for kind, own in times.items():
            one = self._patterns[kind]
            work.repeats.append(Repeat(one.moves, [*one.outputs, *one.amaxes], own))
        return work

    def _first(self, part: TargetTensor, key: Hashable, work: Work) -> None:
        """Plan a part, and keep that if it is what others can follow."""
        planned = list(self._make.planned(part))
        moves = [move for one in planned for move in one.moves]
        work.filled += [(one.rank, one.name, one.dst) for one in planned]
        work.moves += moves
        views = list(leaves(part.layout))
        # Parts without elements have no moves: those that are left could not be told apart.
        if views and len(views) == len(moves) and all(view.numel() for view in views):
            outputs = [one.dst for one in planned]
            memory = [(tuple(dst.shape), dst.dtype) for dst in outputs]
            self._patterns[key] = _Pattern(moves, outputs, distinct_amaxes(moves), memory)

    def _again(
        self, part: TargetTensor, names: Sequence[str], pattern: _Pattern, work: Work
    ) -> Time:
        """Memory and names for what follows a pattern."""
        make = self._make
        outputs = [make.allocate(shape, dtype=dtype) for shape, dtype in pattern.memory]
        work.filled += [(part.rank, *pair) for pair in zip(names, outputs, strict=True)]
        amaxes = [make.amax(part, expert) for expert in range(len(pattern.amaxes))]
        scale = 1.0 if part.quant is None else part.quant.quant_scale
        assert isinstance(scale, float)
        return Time([*outputs, *amaxes], list(leaves(part.layout)), scale)


def _looks(layout: Layout) -> Hashable:
    """All of a layout but addresses, which matter for their alignment alone."""
    if isinstance(layout, torch.Tensor):
        return layout.shape, layout.stride(), layout.dtype, layout.data_ptr() % ALIGNED
    if isinstance(layout, Flat):
        return layout.shape, _looks(layout.view)
    return type(layout), tuple(map(_looks, layout.parts))
