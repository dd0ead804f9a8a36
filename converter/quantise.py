"""Which weights are quantised, and which share a scale; `formats` says how they are stored."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .choices import USUAL_EXCLUDES
from .errors import RecipeError
from .formats import format_of
from .given import Given, cache_scales, group_scales
from .plan import Allocate, Planned, plain
from .quantised import QuantisedWeights
from .recipe import Recipe
from .stored_codes import Kept
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
    weights = (
        QuantisedWeights(chosen, recipe.quant, allocate, given, scales, kept) if chosen else None
    )
    caches = cache_scales(targets, given) if recipe.kv_cache == "fp8" else {}
    return Builder(weights, caches, allocate, given)


@dataclass(frozen=True)
class Builder:
    """Plans target tensors one by one, by what had to be found out about all of them."""

    weights: QuantisedWeights | None
    caches: Mapping[str, float]
    allocate: Allocate
    given: Given

    def plan(self, target: TargetTensor) -> Iterator[Planned]:
        """A tensor with its moves; after a quantised weight, its scales.

        Raises:
            RecipeError: a weight's rows do not fit the scheme.
        """
        for part in self.parts(target):
            yield from self.planned(part)

    def parts(self, target: TargetTensor) -> Iterator[TargetTensor]:
        """A tensor, with the scale that is given for it, and then the tensors of given scales."""
        if weights := self._quantised(target):
            yield from weights.parts(target)
        else:
            yield target
        if target.cache is not None and target.module in self.caches:
            name, shape, scale = target.cache.name, target.cache.shape, self.caches[target.module]
            yield self.given.tensor(target, name, shape, scale)

    def planned(self, part: TargetTensor) -> Iterator[Planned]:
        """One of the parts with its moves; after codes, the scales that are found with them."""
        if weights := self._quantised(part):
            yield from weights.quantised(part)
        else:
            yield plain(part, self.allocate)

    def names(self, part: TargetTensor) -> list[str]:
        """What `planned` gives names to, where the part `is_regular`."""
        weights = self._quantised(part)
        return weights.names(part) if weights else [part.name]

    def is_regular(self, part: TargetTensor) -> bool:
        """True if a plan follows from layout, dtype, shift and scheme alone, addresses apart."""
        if weights := self._quantised(part):
            return weights.are_computed
        return part.quant is None or not isinstance(part.quant.quant_scale, torch.Tensor)

    def amax(self, part: TargetTensor, expert: int) -> torch.Tensor:
        """The amax that one expert of a quantised part shares with its group."""
        assert self.weights is not None
        return self.weights.amax(part.group, part.first_expert + expert)

    def _quantised(self, part: TargetTensor) -> QuantisedWeights | None:
        """What makes the codes of a part whose scales are found here, or come with the weight."""
        if part.quant is None and self.weights is not None and part.group in self.weights.scales:
            return self.weights
        return None


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
                f"exclude (--exclude): {pattern!r} matches none of the {len(groups)} linears; they "
                f"are called {some}, …"
            )
        found.update(groups[module] for module in matches)
    return found
