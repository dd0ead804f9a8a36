"""Weights that become codes with scales: the tensors and moves of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from fuseport.kernels.move import Move

from .errors import RecipeError, ScaleError
from .formats import Format, Place
from .given import Given, GroupScales
from .layout import pairs, shape_of
from .plan import Allocate, Planned, filled, on_meta
from .stored_codes import Codes, Kept, same_scheme
from .targets.parts import TargetTensor
from .targets.profiles import ScaleTensor


@dataclass(frozen=True)
class QuantisedWeights:
    """Plans quantised weights; `amaxes` are the groups' own, by expert."""

    chosen: Format
    quant: str
    allocate: Allocate
    given: Given
    scales: Mapping[str, GroupScales]
    kept: Kept
    amaxes: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def parts(self, target: TargetTensor) -> Iterator[TargetTensor]:
        """A weight, with its given scale if it has one; the tensors of given scales."""
        scales = self.scales[target.group]
        if scales.weight is None:
            yield target
        else:
            yield self._with_given(target, scales)
            yield self._scale(target, self.chosen.scale, scales.weight)
        if scales.input is not None and self.chosen.input is not None:
            yield self._scale(target, self.chosen.input, scales.input)

    def quantised(self, target: TargetTensor) -> Iterator[Planned]:
        """A weight's codes and scales: as the source has them, or computed."""
        relaid = self.given.relaid.get((target.rank, target.name))
        source = same_scheme(target.layout, self.quant, self.kept)
        if source is not None:
            yield from self._as_it_is(target, source)
        elif relaid is not None:
            yield from self._relaid(target, relaid)
        else:
            yield from self._computed(target)

    @property
    def are_computed(self) -> bool:
        """True if no scales are in the source."""
        return not self.kept and not self.given.relaid

    def names(self, target: TargetTensor) -> list[str]:
        """Of codes and computed scales."""
        module = target.name.rpartition(".")[0]
        return [target.name, *[f"{module}.{kind.suffix}" for kind in self._kinds]]

    @cached_property
    def _kinds(self) -> list[ScaleTensor]:
        return [kind for kind in (self.chosen.scale, self.chosen.second) if kind is not None]

    def _relaid(self, target: TargetTensor, relaid: torch.Tensor) -> Iterator[Planned]:
        """Codes and scales as the source has them."""
        yield filled(target, self.chosen.codes, target.quant, self.allocate)
        kind = self.chosen.scale
        *experts, rows, columns = shape_of(target.layout)
        dst = self.allocate((*experts, *kind.shape(rows, columns)), dtype=kind.dtype)
        move = Move(dst.view(-1), relaid.view(-1))
        yield Planned(target.rank, self.names(target)[1], dst, (move,))

    def _as_it_is(self, target: TargetTensor, source: Codes) -> Iterator[Planned]:
        """One whole weight's codes and scales, under the target's names."""
        kind = self.chosen.scale
        codes = self.allocate(shape_of(target.layout), dtype=source.codes.dtype)
        own = self.allocate(kind.shape(*codes.shape), dtype=kind.dtype)
        moved = Move(own.view(source.scales.shape), source.scales)
        move = Move(codes, source.codes)
        yield Planned(target.rank, target.name, codes, (move,), target.group)
        yield Planned(target.rank, self.names(target)[1], own, (moved,), target.group)

    def _with_given(self, target: TargetTensor, scales: GroupScales) -> TargetTensor:
        if not self.are_computed:
            relaid = (target.rank, target.name) in self.given.relaid
            if relaid or same_scheme(target.layout, self.quant, self.kept) is not None:
                raise ScaleError(
                    f"a weight scale of {target.module} is given, but the source stores the weight "
                    f"in fp8 with a scale of its own; leave it out"
                )
        return target._replace(dtype=self.chosen.codes, quant=scales.scheme)

    def _scale(self, target: TargetTensor, kind: ScaleTensor, value: float) -> TargetTensor:
        """A weight's scale that is given, for each of its experts."""
        *experts, rows, columns = shape_of(target.layout)
        axes = experts if kind is self.chosen.scale else ()
        name = f"{target.name.rpartition('.')[0]}.{kind.suffix}"
        return self.given.tensor(target, name, (*axes, *kind.shape(rows, columns)), value)

    def _computed(self, target: TargetTensor) -> Iterator[Planned]:
        chosen = self.chosen
        *experts, rows, columns = shape_of(target.layout)
        shape = *experts, rows, columns // chosen.elements_per_code
        codes = self.allocate(shape, dtype=chosen.codes)
        scales = [
            self.allocate((*experts, *kind.shape(rows, columns)), dtype=kind.dtype)
            for kind in self._kinds
        ]

        # The matrix by its elements: where each has a code, the codes will do.
        each = chosen.elements_per_code
        matrix = codes if each == 1 else on_meta((*experts, rows, columns), dtype=chosen.codes)
        begin = matrix.storage_offset()

        def move(elements: torch.Tensor, source: torch.Tensor) -> Move:
            row = int(elements.storage_offset() - begin) // columns
            expert, first_row = divmod(row, rows)
            own = [_of_expert(scale, expert, len(experts)) for scale in scales]
            amax = partial(self.amax, target.group, target.first_expert + expert)
            quant = chosen.make(Place(own[0], own[-1], amax, columns, first_row))
            dst = elements if matrix is codes else _of_codes(elements, codes, each)
            return Move(dst, source, target.shift, quant)

        try:
            moves = tuple(move(d, s) for d, s in pairs(matrix, target.layout) if d.numel())
        except ValueError as error:
            raise RecipeError(f"{target.name}: {error}; name it in exclude (--exclude)") from error
        yield Planned(target.rank, target.name, codes, moves, target.group)
        for name, tensor in zip(self.names(target)[1:], scales, strict=True):
            yield Planned(target.rank, name, tensor, (), target.group)

    def amax(self, group: str, expert: int) -> torch.Tensor:
        """The amax of a group, for one expert."""
        key = group, expert
        if key not in self.amaxes:
            self.amaxes[key] = self.allocate((1,), dtype=torch.float32)
        return self.amaxes[key]


def _of_expert(scales: torch.Tensor, expert: int, axes: int) -> torch.Tensor:
    """One expert's scales, of a tensor whose first axes (one, or none) count the experts."""
    return scales[expert] if axes else scales


def _of_codes(view: torch.Tensor, codes: torch.Tensor, each: int) -> torch.Tensor:
    """A contiguous view of a matrix's elements, as the view of the codes that hold `each`."""
    *outer, last = view.shape
    *strides, _ = view.stride()
    return codes.as_strided(
        (*outer, last // each),
        (*(stride // each for stride in strides), 1),
        codes.storage_offset() + view.storage_offset() // each,
    )
