"""Planning by patterns: what looks alike is planned once, and repeated at other addresses.

A model's layers, and its experts, are the same tensors again and again. Views and moves are made
for the first of each; for the others memory, names and addresses are enough.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fuseport.kernels.move import ALIGNED, Move, distinct_amaxes
from fuseport.kernels.repeats import Repeat, Time

from . import collector
from .alike import Alike, looks_of
from .layout import Flat, Layout, leaves
from .quantise import Builder
from .targets.parts import TargetTensor

# Shape, dtype and bytes.
Memory = tuple[tuple[int, ...], torch.dtype, int]
# So many tensors of up to so many bytes are allocated together: that takes as long as one of them.
_TOGETHER, _SMALL = 64, 64 << 10


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
    memory: Sequence[Memory]
    sources: Sequence[torch.Tensor]
    reads: Sequence[int]


class _Look(NamedTuple):
    """A layout: a number that all of one look have, the tensors that it reads, each view's one."""

    number: int
    sources: Sequence[torch.Tensor]
    reads: Sequence[int]
    layout: Layout


class Repeats:
    """Plans target tensors over real memory, run by run; patterns are kept from run to run.

    Args:
        make: what plans a tensor.
        alike: the layers whose target tensors are laid out over an earlier layer's memory.
    """

    def __init__(self, make: Builder, alike: Alike) -> None:
        self._make, self._alike = make, alike
        self._patterns: dict[Hashable, _Pattern] = {}
        self._numbers: dict[Hashable, int] = {}
        # By the layout's identity: layers that are alike have the same ones.
        self._looks: dict[int, _Look] = {}
        self._small: dict[Memory, list[torch.Tensor]] = {}

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
                names, look = self._make.names(part), self._look(part)
                key = (len(names), part.dtype, part.shift, part.quant is None, look.number)
                pattern = self._patterns.get(key)
                if pattern is None or not self._make.is_regular(part):
                    self._first(part, key, look, work)
                else:
                    time = self._again(part, names, pattern, look, work)
                    times.setdefault(key, []).append(time)
        for kind, own in times.items():
            one = self._patterns[kind]
            outputs = [*one.outputs, *one.amaxes]
            work.repeats.append(Repeat(one.moves, outputs, one.sources, one.reads, own))
        return work

    def _look(self, part: TargetTensor) -> _Look:
        found = self._looks.get(id(part.layout))
        if found is None:
            found = self._looks[id(part.layout)] = self._new_look(part)
        return found

    def _new_look(self, part: TargetTensor) -> _Look:
        views = list(leaves(part.layout))
        wholes = [self._alike.whole(part.layer, view) for view in views]
        sources = list({id(one): one for one in wholes}.values())
        numbers = {id(one): number for number, one in enumerate(sources)}
        reads = [numbers[id(one)] for one in wholes]
        # Where a view begins in its tensor; a tensor's address matters for its alignment alone.
        starts = [v.data_ptr() - one.data_ptr() for v, one in zip(views, wholes, strict=True)]
        key = (_tree(part.layout), tuple(starts), tuple(reads), tuple(map(looks_of, sources)))
        number = self._numbers.setdefault(key, len(self._numbers))
        return _Look(number, sources, reads, part.layout)

    def _first(self, part: TargetTensor, key: Hashable, look: _Look, work: Work) -> None:
        """Plan a part, and keep that if it is what others can follow."""
        part = part._replace(layout=self._alike.moved(part.layer, part.layout))
        planned = list(self._make.planned(part))
        moves = [move for one in planned for move in one.moves]
        work.filled += [(one.rank, one.name, one.dst) for one in planned]
        work.moves += moves
        views = list(leaves(part.layout))
        # Parts without elements have no moves: those that are left could not be told apart.
        if views and len(views) == len(moves) and all(view.numel() for view in views):
            outputs = [one.dst for one in planned]
            memory = [(tuple(dst.shape), dst.dtype, dst.nbytes) for dst in outputs]
            sources = self._sources(part, look)
            self._patterns[key] = _Pattern(
                moves, outputs, distinct_amaxes(moves), memory, sources, look.reads
            )

    def _again(
        self, part: TargetTensor, names: Sequence[str], pattern: _Pattern, look: _Look, work: Work
    ) -> Time:
        """Memory and names for what follows a pattern."""
        make = self._make
        outputs = [self._allocate(memory) for memory in pattern.memory]
        work.filled += [(part.rank, *pair) for pair in zip(names, outputs, strict=True)]
        amaxes = [make.amax(part, expert) for expert in range(len(pattern.amaxes))]
        scale = 1.0 if part.quant is None else part.quant.quant_scale
        assert isinstance(scale, float)
        return Time([*outputs, *amaxes], self._sources(part, look), scale)

    def _allocate(self, memory: Memory) -> torch.Tensor:
        """A tensor; of small ones, norms and scales, many at once."""
        shape, dtype, nbytes = memory
        if nbytes > _SMALL:
            return self._make.allocate(shape, dtype=dtype)
        if not self._small.get(memory):
            # Each begins where the first one of a pattern might have begun.
            slot = -(-nbytes // ALIGNED) * ALIGNED // dtype.itemsize
            slots = self._make.allocate((_TOGETHER, slot), dtype=dtype)
            strides = torch.empty(shape, dtype=torch.float32, device="meta").stride()
            together = slots.as_strided((_TOGETHER, *shape), (slot, *strides))
            self._small[memory] = list(together.unbind(0))
        return self._small[memory].pop()

    def _sources(self, part: TargetTensor, look: _Look) -> list[torch.Tensor]:
        return [self._alike.own(part.layer, one) for one in look.sources]


def _tree(layout: Layout) -> Hashable:
    """A layout's form, with the shapes, strides and dtypes of its views."""
    if isinstance(layout, torch.Tensor):
        return layout.shape, layout.stride(), layout.dtype
    if isinstance(layout, Flat):
        return layout.shape, _tree(layout.view)
    return type(layout), tuple(map(_tree, layout.parts))
