"""Scales that a conversion is given: which module takes which, and what they become in a result.

Modules that engines fuse share their scales: the largest of theirs is taken for all, so that no
value exceeds the format. A kind of scale is there for all modules that need it, or for none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fuseport.kernels.quant import GivenScale

from .choices import FROM_SOURCE
from .errors import RecipeError, ScaleError
from .formats import Format
from .layout import Flat, shape_of
from .plan import storage_key
from .recipe import Recipe
from .scales import ScaleTable, table_of
from .sources.stored import Piece, Stored
from .targets.parts import TargetTensor

# Where an fp32 number that is known beforehand lies: fp32 [1], on a plan's kind of memory.
Constant = Callable[[float], torch.Tensor]


# The name of given numbers, where a source tensor's name is shown.
GIVEN = "(given scales)"


@dataclass(frozen=True)
class StoredConstants:
    """Constants of a plan over meta tensors; `stored` says what they are."""

    stored: dict[int, Stored] = field(default_factory=dict)

    def __call__(self, value: float) -> torch.Tensor:
        """A meta twin of the number."""
        twin = torch.empty(1, dtype=torch.float32, device="meta")
        number = torch.full((1,), value, dtype=torch.float32, device="cpu")
        self.stored[storage_key(twin)] = Stored(
            GIVEN, (1,), number.dtype, (Piece((0,), (1,), number),)
        )
        return twin


@dataclass
class Given:
    """The table of scales, if there is one; `notes` collects what a user should be told.

    `relaid` has the scales of weights whose codes are copied, by rank and name.
    """

    constant: Constant
    table: ScaleTable | None = None
    notes: list[str] = field(default_factory=list)
    relaid: Mapping[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    _layouts: dict[tuple[float, tuple[int, ...]], Flat] = field(default_factory=dict)

    def check_used(self, recipe: Recipe) -> None:
        """Raise ScaleError if a scale that the user gave was given to no module."""
        if self.table is not None and recipe.scales != FROM_SOURCE:
            self.table.check_used()

    def find(self, module: str, *kinds: str) -> float | None:
        """The first of these kinds of scale that there is for a module."""
        if self.table is None:
            return None
        found = (self.table.find(module, kind) for kind in kinds)
        return next((scale for scale in found if scale is not None), None)

    def tensor(
        self, target: TargetTensor, name: str, shape: tuple[int, ...], value: float
    ) -> TargetTensor:
        """A tensor beside another one, whose elements are all one number."""
        layout = self._layouts.get((value, shape))
        if layout is None:
            layout = Flat(self.constant(value).expand(math.prod(shape)), shape)
            self._layouts[value, shape] = layout
        return TargetTensor(target.rank, name, layout, torch.float32)


def scale_table(recipe: Recipe, from_source: Callable[[], ScaleTable]) -> ScaleTable | None:
    """The scales that a recipe asks for.

    Raises:
        ScaleError: one cannot be used.
    """
    if recipe.scales is None:
        return None
    return from_source() if recipe.scales == FROM_SOURCE else table_of(recipe.scales, "scales")


@dataclass(frozen=True)
class GroupScales:
    """The dequant_scales of the modules of a fused group; None: computed, or not static."""

    weight: float | None = None
    input: float | None = None

    @property
    def scheme(self) -> GivenScale:
        """How the weights are quantised with the given scale."""
        assert self.weight is not None
        return GivenScale(float(np.float32(1.0) / np.float32(self.weight)))


def group_scales(
    targets: Sequence[TargetTensor], chosen: Format, given: Given
) -> dict[str, GroupScales]:
    """Group → its scales, of the linears that are to be quantised.

    Raises:
        ScaleError: a module lacks a scale that another of its group (for inputs: any other) has,
            or that the format must have; or a weight's scale is too large to divide by.
    """
    groups: dict[str, set[str]] = {}
    for target in targets:
        groups.setdefault(target.group, set()).add(target.module)
    weights = _weights(groups, given) if chosen.takes_weight_scale else {}
    inputs = _inputs(groups, chosen, given) if chosen.input else {}
    if chosen.note and not inputs:
        given.notes.append(chosen.note)
    if chosen.rows_per_scale > 1:
        fused = [target for target in targets if len(groups[target.group]) > 1]
        given.notes.extend(_straddling(fused, chosen.rows_per_scale))
    return {group: GroupScales(weights.get(group), inputs.get(group)) for group in groups}


def _straddling(fused: Iterable[TargetTensor], rows_per_scale: int) -> Iterator[str]:
    """What to know of weights that engines fuse, if one's last rows share a scale with none."""
    shapes = ((target.module, shape_of(target.layout)[-2]) for target in fused)
    odd = next((found for found in shapes if found[1] % rows_per_scale), None)
    if odd is not None:
        module, rows = odd
        yield (
            f"{module} has {rows} rows, which is no multiple of {rows_per_scale}: engines that "
            f"fuse it with others do not load its scales; keep such modules as they are with "
            f"exclude (--exclude), or choose another scheme"
        )


def cache_scales(targets: Iterable[TargetTensor], given: Given) -> dict[str, float]:
    """Linear that makes keys or values → their dequant_scale in an FP8 cache; 1.0 if none is given.

    A kind of scale that is not given by itself is that of the whole cache, "kv_cache".

    Raises:
        ScaleError: some are given and others are not.
        RecipeError: no linear makes keys and values as such.
    """
    wanted = {one.module: one.cache.kinds for one in targets if one.cache is not None}
    if not wanted:
        raise RecipeError(
            "kv_cache = 'fp8', but the model has no keys and values as such (multi-latent "
            "attention); leave it out"
        )
    found = {(m, kind): given.find(m, kind, "kv_cache") for m in wanted for kind in wanted[m]}
    known = {key: scale for key, scale in found.items() if scale is not None}
    if not known:
        given.notes.append(
            "no scales of the KV cache were given as scales (--scales): 1.0 is written, and keys "
            "and values beyond 448 saturate"
        )
    elif len(known) < len(found):
        module, kind = next(key for key in found if key not in known)
        raise ScaleError(
            f"{len(found) - len(known)} of {len(found)} scales of the KV cache are missing, the "
            f"first is {kind} of {module}; give it (or kv_cache) in scales (--scales)"
        )
    return {m: max(known.get((m, kind), 1.0) for kind in wanted[m]) for m in wanted}


def _weights(groups: Mapping[str, set[str]], given: Given) -> dict[str, float]:
    found: dict[str, float] = {}
    for group, modules in groups.items():
        scales = _all_or_none("weight", sorted(modules), given)
        if scales:
            found[group] = max(scales.values())
            _check_divisible(group, found[group])
    return found


def _inputs(groups: Mapping[str, set[str]], chosen: Format, given: Given) -> dict[str, float]:
    modules = sorted(set().union(*groups.values()))
    scales = _all_or_none("input", modules, given, chosen.needs_input)
    return {group: max(scales[one] for one in groups[group]) for group in groups if scales}


def _all_or_none(
    kind: str, modules: Sequence[str], given: Given, needed: bool = False
) -> dict[str, float]:
    found = {module: given.find(module, kind) for module in modules}
    missing = [module for module, scale in found.items() if scale is None]
    if missing and (needed or len(missing) < len(modules)):
        raise ScaleError(
            f"{len(missing)} of {len(modules)} modules that need one have no {kind} scale, the "
            f"first is {missing[0]}; give it in scales (--scales), or name it in exclude "
            f"(--exclude)"
        )
    return {module: scale for module, scale in found.items() if scale is not None}


def _check_divisible(group: str, scale: float) -> None:
    if 1.0 / scale < float(np.finfo(np.float32).tiny):
        raise ScaleError(
            f"the weight scale of {group} is {scale}, whose reciprocal is no normal fp32 number; "
            f"expected amax / 448 of the weight"
        )
