"""What all processes of a refit agree on: the target's tensors, and what each process fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fuseport.kernels.move import GivenScale

from .errors import RecipeError
from .given import Given
from .model import ModelSpec
from .plan import on_meta, storage_key
from .quantise import build
from .recipe import Recipe
from .shards import Held, Place, everywhere, kinds_of, whole_names, whole_tensors
from .sources.megatron import read_model, without_further
from .state import check_complete, weights, zero_row
from .targets.table import TARGETS
from .targets.target import Task
from .transfers import Wanted, wanted

# The name of the zeros that fill a padded vocabulary.
PADDING = "(zero rows)"


@dataclass(frozen=True)
class RefitPlan:
    """The plan, as process `process` of `processes` sees it.

    `names` are its parameters: name in the whole model → its own; `ranks` the target's ranks that
    it fills; `zeros` [1, H] what a padded vocabulary is filled from, on meta.
    """

    tensors: tuple[Wanted, ...]
    names: Mapping[str, str]
    ranks: tuple[int, ...]
    zeros: torch.Tensor
    process: int
    processes: int


@dataclass(frozen=True)
class _Offer:
    """What a process tells the others."""

    held: Held
    spec: ModelSpec
    recipe: Recipe
    wants: tuple[int, ...] | None


def plan_refit(
    source: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    recipe: Recipe,
    scales: Mapping[str, GivenScale] | None,
    place: Place,
    group: dist.ProcessGroup | None,
    wants: Sequence[int] | None,
) -> RefitPlan:
    """Plan a refit: see `Refit` for the arguments. Collective over the group.

    Raises:
        FuseportError: the same on every process.
    """
    ranks = None if wants is None else tuple(wants)
    if recipe.mtp == "drop":
        source, spec = without_further(source, spec)
    # Errors come after the exchange, so that nobody waits for a process that gave up.
    tensors = {name: value for name, value in source.items() if isinstance(value, torch.Tensor)}
    offer = _Offer(Held(place, kinds_of(tensors)), spec, recipe, ranks)
    offers = [offer] if group is None else _gather(offer, group)
    process = 0 if group is None else dist.get_rank(group)
    _check_same(offers)
    weights(source)
    filled = [_ranks(one, number, len(offers)) for number, one in enumerate(offers)]
    wholes = whole_tensors([one.held for one in offers], spec)
    meta = {n: torch.empty(w.shape, dtype=w.dtype, device="meta") for n, w in wholes.items()}
    _check_supported(recipe)
    TARGETS[recipe.target].check(spec, recipe)
    model = read_model(meta, spec)
    check_complete(model, spec)
    zeros = zero_row(model, spec, torch.device("meta"))
    task = Task(model, spec, recipe, zeros, scales)
    planned = list(
        build(list(TARGETS[recipe.target].rules(task)), recipe, on_meta, Given(_constant))
    )
    sources = {storage_key(meta[name]): (name, whole) for name, whole in wholes.items()}
    sources[storage_key(zeros)] = (PADDING, everywhere(zeros, len(offers)))
    return RefitPlan(
        tuple(wanted(planned, sources, filled)), whole_names(offer.held, spec), filled[process],
        zeros, process, len(offers),
    )  # fmt: skip


def _check_supported(recipe: Recipe) -> None:
    if recipe.scales is not None or recipe.kv_cache != "none" or recipe.quant == "nvfp4":
        raise RecipeError(
            "a refit takes no scales, kv_cache or quant = 'nvfp4' in its recipe yet; leave them out"
        )


def _constant(value: float) -> torch.Tensor:
    raise RecipeError(f"a refit cannot hold the given number {value}; leave out what needs it")


def _gather(offer: _Offer, group: dist.ProcessGroup) -> list[_Offer]:
    offers: list[_Offer | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(offers, offer, group)
    return [one for one in offers if one is not None]


def _check_same(offers: Sequence[_Offer]) -> None:
    for number, one in enumerate(offers):
        if (one.spec, one.recipe) != (offers[0].spec, offers[0].recipe):
            raise RecipeError(
                f"process {number} was given another spec or recipe than process 0; all need the "
                f"same"
            )


def _ranks(offer: _Offer, process: int, processes: int) -> tuple[int, ...]:
    world = offer.recipe.world_size
    if offer.wants is None:
        return tuple(range(world)) if processes == 1 else (process % world,)
    if not all(0 <= rank < world for rank in offer.wants):
        raise RecipeError(
            f"process {process} wants the target's ranks {list(offer.wants)}; there are {world}"
        )
    return offer.wants
