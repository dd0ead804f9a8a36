"""Which weights are quantised, and which share a scale; `formats` says how they are stored."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import GivenScale, Scheme

from .errors import RecipeError
from .formats import Format, Place, ScaleTensor, format_of
from .layout import pairs, shape_of
from .plan import Allocate, Planned, bind, on_meta, plain, storage_key
from .recipe import USUAL_EXCLUDES, Recipe
from .targets.parts import TargetTensor


def build(targets: Sequence[TargetTensor], recipe: Recipe, allocate: Allocate) -> Iterator[Planned]:
    """Every target tensor with its moves; after a quantised weight, its scales.

    A scale that several weights share, on all ranks, is found over all of them.

    Raises:
        RecipeError: the target cannot hold the scheme, a weight's rows do not fit it, or a
            pattern of `recipe.exclude` matches nothing.
    """
    chosen = format_of(recipe)
    excluded = _excluded_groups(targets, recipe) if chosen else set()
    amaxes: dict[tuple[str, int], torch.Tensor] = {}
    for target in targets:
        linear = bool(target.group) and target.quant is None
        if chosen is None or not linear or target.group in excluded:
            yield plain(target, allocate)
        else:
            yield from _quantised(target, chosen, allocate, amaxes)


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


def _quantised(
    target: TargetTensor,
    chosen: Format,
    allocate: Allocate,
    amaxes: dict[tuple[str, int], torch.Tensor],
) -> Iterator[Planned]:
    *experts, rows, columns = shape_of(target.layout)
    codes = allocate((*experts, rows, columns // chosen.elements_per_code), dtype=chosen.codes)
    scales = _scales(chosen.scale, experts, rows, columns, allocate)
    second = chosen.second
    seconds = _scales(second, experts, rows, columns, allocate) if second else scales
    count = math.prod(experts)

    def scheme(row: int) -> Scheme:
        expert, first_row = divmod(row, rows)
        key = target.group, target.first_expert + expert
        if key not in amaxes:
            amaxes[key] = allocate((1,), dtype=torch.float32)
        own = [each.view(count, *each.shape[len(experts) :])[expert] for each in (scales, seconds)]
        return chosen.make(Place(own[0], own[1], amaxes[key], columns, first_row))

    def move(elements: torch.Tensor, source: torch.Tensor) -> Move:
        quant = scheme(int(elements.storage_offset()) // columns)
        return Move(_of_codes(elements, codes, chosen), source, target.shift, quant)

    elements = on_meta((*experts, rows, columns), dtype=chosen.codes)
    try:
        moves = tuple(move(d, s) for d, s in pairs(elements, target.layout) if d.numel())
    except ValueError as error:
        raise RecipeError(f"{target.name}: {error}; exclude it with --exclude") from error
    module, _, _ = target.name.rpartition(".")
    yield Planned(target.rank, target.name, codes, moves, target.group)
    yield Planned(target.rank, f"{module}.{chosen.scale.suffix}", scales, (), target.group)
    if second is not None:
        yield Planned(target.rank, f"{module}.{second.suffix}", seconds, (), target.group)


def _scales(
    kind: ScaleTensor, experts: Sequence[int], rows: int, columns: int, allocate: Allocate
) -> torch.Tensor:
    return allocate((*experts, *kind.shape(rows, columns)), dtype=kind.dtype)


def _of_codes(view: torch.Tensor, codes: torch.Tensor, chosen: Format) -> torch.Tensor:
    """A contiguous view of a matrix's elements, as the view of the codes that hold them."""
    each = chosen.elements_per_code
    *outer, last = view.shape
    *strides, _ = view.stride()
    return codes.as_strided(
        (*outer, last // each),
        (*(stride // each for stride in strides), 1),
        codes.storage_offset() + view.storage_offset() // each,
    )


def on_real(
    quant: Scheme | None, real: dict[int, torch.Tensor], device: torch.device
) -> Scheme | None:
    """A scheme with its meta tensors replaced by views of `real`, by storage; more are made."""
    if quant is None or isinstance(quant, GivenScale):
        return quant
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(quant):
        value = getattr(quant, field.name)
        if isinstance(value, torch.Tensor):
            key = storage_key(value)
            if key not in real:
                real[key] = torch.empty_like(value, device=device)
            changes[field.name] = bind(value, real[key].view(-1), 0)
    return dataclasses.replace(quant, **changes)
