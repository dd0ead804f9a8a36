"""Which weights are quantised, and which share a scale; `formats` says how they are stored."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import GivenScale, Scheme

from .choices import USUAL_EXCLUDES
from .errors import RecipeError, ScaleError
from .formats import Format, Place, format_of
from .given import Given, GroupScales, cache_scales, group_scales
from .layout import pairs, shape_of
from .plan import Allocate, Planned, filled, on_meta, plain
from .recipe import Recipe
from .stored_codes import Codes, Kept, same_scheme
from .targets.parts import TargetTensor


def build(
    targets: Sequence[TargetTensor],
    recipe: Recipe,
    allocate: Allocate,
    given: Given,
    kept: Kept = MappingProxyType({}),
) -> Iterator[Planned]:
    """Every target tensor, as `Builder` plans it.

    Raises:
        RecipeError, ScaleError: as `builder`; or a weight's rows do not fit the scheme.
    """
    make = builder(targets, recipe, allocate, given, kept)
    for target in targets:
        yield from make.plan(target)


def builder(
    targets: Sequence[TargetTensor],
    recipe: Recipe,
    allocate: Allocate,
    given: Given,
    kept: Kept = MappingProxyType({}),
) -> Builder:
    """What plans any of `targets`.

    A scale that several weights share, on all ranks, is found over all of them. Weights of the
    source that are quantised in the same way (`kept`) go over as they are.

    Raises:
        RecipeError: the target cannot hold the scheme, or a pattern of `recipe.exclude` matches
            nothing; or there is no cache of keys and values.
        ScaleError: a scale that is needed was not given.
    """
    chosen = format_of(recipe)
    scales = group_scales(to_quantise(targets, recipe), chosen, given) if chosen else {}
    weights = _Weights(chosen, recipe.quant, allocate, given, scales, kept) if chosen else None
    caches = cache_scales(targets, given) if recipe.kv_cache == "fp8" else {}
    return Builder(weights, caches, allocate, given)


@dataclass(frozen=True)
class Builder:
    """Plans target tensors one by one, by what had to be found out about all of them."""

    weights: _Weights | None
    caches: Mapping[str, float]
    allocate: Allocate
    given: Given

    def plan(self, target: TargetTensor) -> Iterator[Planned]:
        """A tensor with its moves; after a quantised weight, its scales.

        Raises:
            RecipeError: a weight's rows do not fit the scheme.
        """
        weights = self.weights
        if weights is not None and target.quant is None and target.group in weights.scales:
            yield from weights.quantised(target)
        else:
            yield plain(target, self.allocate)
        if target.cache is not None and target.module in self.caches:
            name, shape, scale = target.cache.name, target.cache.shape, self.caches[target.module]
            yield self.given.tensor(target, name, shape, scale, self.allocate)


def to_quantise(targets: Sequence[TargetTensor], recipe: Recipe) -> list[TargetTensor]:
    """The linears that a recipe quantises with scales of its own.

    Raises:
        RecipeError: the target cannot hold the scheme, or options name no layers or modules.
    """
    if format_of(recipe) is None:
        return []
    stays = _excluded_groups(targets, recipe) | _kept_groups(targets, recipe)
    return [one for one in targets if one.group and not one.quant and one.group not in stays]


def _kept_groups(targets: Sequence[TargetTensor], recipe: Recipe) -> set[str]:
    """The groups of the first and last layers that stay as they are.

    Raises:
        RecipeError: these are all layers.
    """
    count = 1 + max(target.layer for target in targets)
    last = count - recipe.keep_last
    if recipe.keep_first >= last and count:
        raise RecipeError(
            f"keep_first = {recipe.keep_first} and keep_last = {recipe.keep_last} leave none of "
            f"{count} layers to quantise; choose smaller ones"
        )
    kept = (one for one in targets if 0 <= one.layer < recipe.keep_first or one.layer >= last)
    return {one.group for one in kept} - {""}


def _excluded_groups(targets: Sequence[TargetTensor], recipe: Recipe) -> set[str]:
    """The groups of which a module is excluded.

    Raises:
        RecipeError: one of the user's patterns matches nothing.
    """
    groups = {target.module: target.group for target in targets if target.module}
    found: set[str] = set()
    for pattern in recipe.exclude:
        matches = fnmatch.filter(groups, pattern)
        if not matches and pattern not in USUAL_EXCLUDES:
            some = ", ".join(list(groups)[:3])
            raise RecipeError(
                f"--exclude {pattern!r} matches none of the {len(groups)} linears; they are "
                f"called {some}, …"
            )
        found.update(groups[module] for module in matches)
    return found


@dataclass(frozen=True)
class _Weights:
    """Plans quantised weights; `amaxes` are the groups' own, by expert."""

    chosen: Format
    quant: str
    allocate: Allocate
    given: Given
    scales: Mapping[str, GroupScales]
    kept: Kept
    amaxes: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def quantised(self, target: TargetTensor) -> Iterator[Planned]:
        """A weight's codes and scales."""
        scales = self.scales[target.group]
        module = target.name.rpartition(".")[0]
        relaid = self.given.relaid.get((target.rank, target.name))
        source = same_scheme(target.layout, self.quant, self.kept)
        if source is not None:
            yield from self._as_it_is(target, module, source, scales)
        elif relaid is not None:
            yield from self._relaid(target, module, relaid, scales)
        elif scales.weight is None:
            yield from self._computed(target, module)
        else:
            yield from self._with_given(target, module, scales)
        if scales.input is not None and self.chosen.input is not None:
            name = f"{module}.{self.chosen.input.suffix}"
            shape = self.chosen.input.shape(*shape_of(target.layout)[-2:])
            yield self.given.tensor(target, name, shape, scales.input, self.allocate)

    def _relaid(
        self, target: TargetTensor, module: str, relaid: torch.Tensor, scales: GroupScales
    ) -> Iterator[Planned]:
        """Codes and scales as the source has them."""
        _check_not_given(target, scales)
        yield filled(target, self.chosen.codes, target.quant, self.allocate)
        kind = self.chosen.scale
        *experts, rows, columns = shape_of(target.layout)
        dst = self.allocate((*experts, *kind.shape(rows, columns)), dtype=kind.dtype)
        move = Move(dst.view(-1), relaid.view(-1))
        yield Planned(target.rank, f"{module}.{kind.suffix}", dst, (move,))

    def _as_it_is(
        self, target: TargetTensor, module: str, source: Codes, scales: GroupScales
    ) -> Iterator[Planned]:
        """One whole weight's codes and scales, under the target's names."""
        _check_not_given(target, scales)
        kind = self.chosen.scale
        codes = self.allocate(shape_of(target.layout), dtype=source.codes.dtype)
        own = self.allocate(kind.shape(*codes.shape), dtype=kind.dtype)
        moved = Move(own.view(source.scales.shape), source.scales)
        move = Move(codes, source.codes)
        yield Planned(target.rank, target.name, codes, (move,), target.group)
        yield Planned(target.rank, f"{module}.{kind.suffix}", own, (moved,), target.group)

    def _with_given(
        self, target: TargetTensor, module: str, scales: GroupScales
    ) -> Iterator[Planned]:
        yield filled(target, self.chosen.codes, scales.scheme, self.allocate)
        *experts, rows, columns = shape_of(target.layout)
        name = f"{module}.{self.chosen.scale.suffix}"
        shape = (*experts, *self.chosen.scale.shape(rows, columns))
        assert scales.weight is not None
        yield self.given.tensor(target, name, shape, scales.weight, self.allocate)

    def _computed(self, target: TargetTensor, module: str) -> Iterator[Planned]:
        chosen = self.chosen
        *experts, rows, columns = shape_of(target.layout)
        shape = *experts, rows, columns // chosen.elements_per_code
        codes = self.allocate(shape, dtype=chosen.codes)
        kinds = [kind for kind in (chosen.scale, chosen.second) if kind is not None]
        scales = [
            self.allocate((*experts, *kind.shape(rows, columns)), dtype=kind.dtype)
            for kind in kinds
        ]

        # The matrix by its elements: where each has a code, the codes will do.
        each = chosen.elements_per_code
        matrix = codes if each == 1 else on_meta((*experts, rows, columns), dtype=chosen.codes)
        begin = matrix.storage_offset()

        def move(elements: torch.Tensor, source: torch.Tensor) -> Move:
            row = int(elements.storage_offset() - begin) // columns
            expert, first_row = divmod(row, rows)
            own = [_of_expert(scale, expert, len(experts)) for scale in scales]
            amax = partial(self._amax, target.group, target.first_expert + expert)
            quant = chosen.make(Place(own[0], own[-1], amax, columns, first_row))
            dst = elements if matrix is codes else _of_codes(elements, codes, each)
            return Move(dst, source, target.shift, quant)

        try:
            moves = tuple(move(d, s) for d, s in pairs(matrix, target.layout) if d.numel())
        except ValueError as error:
            raise RecipeError(f"{target.name}: {error}; exclude it with --exclude") from error
        yield Planned(target.rank, target.name, codes, moves, target.group)
        for kind, tensor in zip(kinds, scales, strict=True):
            yield Planned(target.rank, f"{module}.{kind.suffix}", tensor, (), target.group)

    def _amax(self, group: str, expert: int) -> torch.Tensor:
        key = group, expert
        if key not in self.amaxes:
            self.amaxes[key] = self.allocate((1,), dtype=torch.float32)
        return self.amaxes[key]


def _check_not_given(target: TargetTensor, scales: GroupScales) -> None:
    if scales.weight is not None:
        raise ScaleError(
            f"a weight scale of {target.module} is given, but the source stores the weight in fp8 "
            f"with a scale of its own; leave it out"
        )


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


def on_real(quant: Scheme | None, place: Callable[[torch.Tensor], torch.Tensor]) -> Scheme | None:
    """A scheme with its meta tensors replaced by the real ones that `place` gives."""
    if quant is None or isinstance(quant, GivenScale):
        return quant
    changes: dict[str, Any] = {}
    for one in dataclasses.fields(quant):
        value = getattr(quant, one.name)
        if isinstance(value, torch.Tensor):
            changes[one.name] = place(value)
    return replace(quant, **changes)
