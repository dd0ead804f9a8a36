"""Which weights are quantised, how a target stores the codes and scales, and which share a scale.

`FORMATS` is the table: target and `Recipe.quant` → the scheme and its scales' name and shape.
Sources: `targets.py`'s consumers as their loaders read them: TensorRT-LLM's unified checkpoint
(`per_channel_scale`), ModelOpt's FP8 and MXFP8 (`weight_scale`), compressed-tensors
(`weight_scale` [out, 1]) and the fp8 block format (`weight_scale_inv`, which is a dequant_scale).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from fuseport.kernels.move import Move
from fuseport.kernels.quant import BlockScale, GivenScale, MxScale, RowScale, Scheme, TensorScale

from .errors import RecipeError
from .layout import Shape, pairs, shape_of
from .plan import Allocate, Planned, bind, plain, storage_key
from .recipe import USUAL_EXCLUDES, Recipe
from .stored_codes import Codes, Kept, same_scheme
from .targets.parts import TargetTensor
from .targets.profiles import written

# (a matrix's own scales, its group's amax, its columns, a move's first row) → how the move scales.
Make = Callable[[torch.Tensor, torch.Tensor, int, int], Scheme]


@dataclass(frozen=True)
class Format:
    """How scales are stored: `{module}.{suffix}` of `shape(rows, columns)`, after any experts."""

    suffix: str
    shape: Callable[[int, int], Shape]
    dtype: torch.dtype
    make: Make


def _tensor(scale: torch.Tensor, amax: torch.Tensor, columns: int, first_row: int) -> Scheme:
    return TensorScale(scale.view(1), amax)


def _row(scale: torch.Tensor, amax: torch.Tensor, columns: int, first_row: int) -> Scheme:
    return RowScale(scale.view(-1), columns, first_row)


def _block(scale: torch.Tensor, amax: torch.Tensor, columns: int, first_row: int) -> Scheme:
    return BlockScale(scale, columns, first_row)


def _mx(scale: torch.Tensor, amax: torch.Tensor, columns: int, first_row: int) -> Scheme:
    return MxScale(scale, columns, first_row)


def _blocks(rows: int, columns: int) -> Shape:
    return -(-rows // 128), -(-columns // 128)


_FP32, _E8M0 = torch.float32, torch.uint8
FORMATS: dict[tuple[str, str], Format] = {
    ("trtllm", "fp8-row"): Format("per_channel_scale", lambda rows, _: (rows,), _FP32, _row),
    # Names and shapes of these are the profile's.
    ("hf", "fp8"): Format("weight_scale", lambda *_: (), _FP32, _tensor),
    ("hf", "fp8-row"): Format("weight_scale", lambda rows, _: (rows, 1), _FP32, _row),
    ("hf", "fp8-block"): Format("weight_scale_inv", _blocks, _FP32, _block),
    ("hf", "mxfp8"): Format("weight_scale", lambda rows, cols: (rows, cols // 32), _E8M0, _mx),
}


def format_of(recipe: Recipe) -> Format | None:
    """The recipe's format; None if nothing is quantised.

    Raises:
        RecipeError: the target cannot hold the scheme, or its profile does not read it.
    """
    if recipe.quant == "none":
        return None
    found = FORMATS.get((recipe.target, recipe.quant))
    if found is None:
        fits = ", ".join(quant for target, quant in FORMATS if target == recipe.target)
        raise RecipeError(
            f"target {recipe.target!r} takes no weights quantised as {recipe.quant!r} that are "
            f"made from weights alone; choose one of: none, {fits}"
        )
    if recipe.target != "hf":
        return found
    row = written(recipe)
    return dataclasses.replace(found, suffix=row.suffix, shape=row.shape)


def build(
    targets: Sequence[TargetTensor],
    recipe: Recipe,
    allocate: Allocate,
    kept: Kept = MappingProxyType({}),
) -> Iterator[Planned]:
    """Every target tensor with its moves; after a quantised weight, its scales.

    A scale that several weights share, on all ranks, is found over all of them. Weights of the
    source that are quantised in the same way (`kept`) go over as they are.

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
        elif (codes := same_scheme(target.layout, recipe.quant, kept)) is not None:
            yield from _as_it_is(target, chosen, allocate, codes)
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


def _as_it_is(
    target: TargetTensor, chosen: Format, allocate: Allocate, source: Codes
) -> Iterator[Planned]:
    """The source's codes, and its scales under the target's name."""
    codes = allocate(shape_of(target.layout), dtype=source.codes.dtype)
    scales = allocate(chosen.shape(*codes.shape), dtype=chosen.dtype)
    moved = Move(scales.view(source.scales.shape), source.scales)
    module, _, _ = target.name.rpartition(".")
    yield Planned(target.rank, target.name, codes, (Move(codes, source.codes),), target.group)
    yield Planned(target.rank, f"{module}.{chosen.suffix}", scales, (moved,), target.group)


def _quantised(
    target: TargetTensor,
    chosen: Format,
    allocate: Allocate,
    amaxes: dict[tuple[str, int], torch.Tensor],
) -> Iterator[Planned]:
    *experts, rows, columns = shape_of(target.layout)
    codes = allocate((*experts, rows, columns), dtype=torch.float8_e4m3fn)
    shape = chosen.shape(rows, columns)
    scales = allocate((*experts, *shape), dtype=chosen.dtype)
    per_expert = scales.view(math.prod(experts), *shape)

    def scheme(view: torch.Tensor) -> Scheme:
        row = (view.storage_offset() - codes.storage_offset()) // columns
        expert, first_row = divmod(row, rows)
        key = target.group, target.first_expert + expert
        if key not in amaxes:
            amaxes[key] = allocate((1,), dtype=torch.float32)
        try:
            return chosen.make(per_expert[expert], amaxes[key], columns, int(first_row))
        except ValueError as error:
            raise RecipeError(f"{target.name}: {error}; exclude it with --exclude") from error

    found = [(d, s) for d, s in pairs(codes, target.layout) if d.numel()]
    moves = tuple(Move(d, s, target.shift, scheme(d)) for d, s in found)
    module, _, _ = target.name.rpartition(".")
    yield Planned(target.rank, target.name, codes, moves, target.group)
    yield Planned(target.rank, f"{module}.{chosen.suffix}", scales, (), target.group)


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
