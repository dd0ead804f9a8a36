"""What all processes of a refit agree on: the target's tensors, and what each process fills."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fuseport.kernels.move import GivenScale

from . import collector
from .arguments import check_given, check_kinds, check_scales, check_state, check_used
from .errors import FuseportError, FuseportWarning, RecipeError, SourceError
from .facts import is_whole
from .given import Given, scale_table
from .model import ModelSpec
from .parallel import check_groups
from .plan import Planned, on_meta, storage_key
from .quantise import build
from .recipe import Recipe
from .refit_amax import check_filled
from .scales import ScaleTable
from .shards import Held, Place, everywhere, kinds_of, whole_names, whole_tensors
from .sources.further import without_further
from .sources.megatron import read_model
from .state import PADDING, check_complete, weights, zero_row
from .targets.table import TARGETS
from .targets.target import Task
from .transfers import Wanted, wanted

# From `_build` up to who made the `Refit`, through what is around the functions between.
_CALLER = 7


@dataclass(frozen=True)
class RefitPlan:
    """The plan, as process `process` of `processes` sees it.

    `names` are its parameters: name in the whole model → its own; `ranks` the target's ranks that
    it fills; `constants` what never changes, on the host: zeros [1, H], from which a padded
    vocabulary is filled, and given numbers.
    """

    tensors: tuple[Wanted, ...]
    names: Mapping[str, str]
    ranks: tuple[int, ...]
    constants: Mapping[str, torch.Tensor]
    process: int
    processes: int


@dataclass(frozen=True)
class _Offer:
    """What a process tells the others."""

    held: Held
    spec: ModelSpec
    recipe: Recipe
    wants: tuple[int, ...] | None
    # What is wrong with its own tensors, if anything is.
    fault: str = ""


@collector.paused()
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
    check_kinds(spec=spec, recipe=recipe, place=place)
    check_given(wants=wants)
    check_groups(group=group)
    ranks, fault = None if wants is None else tuple(wants), _fault(source, group)
    check_scales(scales, {} if fault else source)
    if recipe.mtp == "drop" and not fault:
        source, spec = without_further(source, spec)
    # Errors come after the exchange, so that nobody waits for a process that gave up.
    usable = {} if fault else source
    tensors = {name: value for name, value in usable.items() if isinstance(value, torch.Tensor)}
    offer = _Offer(Held(place, kinds_of(tensors)), spec, recipe, ranks, fault)
    offers = [offer] if group is None else _gather(offer, group)
    process = 0 if group is None else dist.get_rank(group)
    _check_same(offers)
    weights(source)
    filled = [_ranks(one, number, len(offers)) for number, one in enumerate(offers)]
    targets, constants = _targets(offers, filled, scales)
    return RefitPlan(
        targets, whole_names(offer.held, spec), filled[process], constants, process, len(offers)
    )


def _targets(
    offers: Sequence[_Offer],
    filled: Sequence[tuple[int, ...]],
    scales: Mapping[str, GivenScale] | None,
) -> tuple[tuple[Wanted, ...], Mapping[str, torch.Tensor]]:
    """What the processes fill together, the same on each of them; and what never changes."""
    spec, recipe = offers[0].spec, offers[0].recipe
    wholes = whole_tensors([one.held for one in offers], spec)
    meta = {n: torch.empty(w.shape, dtype=w.dtype, device="meta") for n, w in wholes.items()}
    TARGETS[recipe.target].check(spec, recipe)
    model = read_model(meta, spec)
    check_complete(model, spec)
    zeros = zero_row(model, spec, torch.device("meta"))
    task = Task(model, spec, recipe, zeros, scales)
    constants = Constants()
    constants.add(PADDING, zeros, torch.zeros(zeros.shape, dtype=zeros.dtype, device="cpu"))
    planned = _build(task, recipe, constants)
    sources = {storage_key(meta[name]): (name, whole) for name, whole in wholes.items()}
    for key, name in constants.names.items():
        sources[key] = name, everywhere(constants.values[name], len(offers))
    targets = tuple(wanted(planned, sources, filled))
    check_filled(targets, filled)
    return targets, constants.values


@dataclass(frozen=True)
class Constants:
    """What never changes: by `storage_key` of a meta twin its name, and by name its value."""

    names: dict[int, str] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    _twins: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, twin: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Note a value under its twin."""
        self.names[storage_key(twin)], self.values[name], self._twins[name] = name, value, twin
        return twin

    def number(self, value: float) -> torch.Tensor:
        """A meta twin, fp32 [1], of a given number."""
        name = f"(number {value!r})"
        if name in self._twins:
            return self._twins[name]
        twin = torch.empty(1, dtype=torch.float32, device="meta")
        return self.add(name, twin, torch.full((1,), value, dtype=torch.float32, device="cpu"))


def _build(task: Task, recipe: Recipe, constants: Constants) -> list[Planned]:
    given = Given(constants.number, scale_table(recipe, _no_states))
    targets = list(TARGETS[recipe.target].rules(task))
    check_used(task.scales, targets)
    planned = list(build(targets, recipe, on_meta, given))
    given.check_used(recipe)
    for note in given.notes:
        warnings.warn(note, FuseportWarning, stacklevel=_CALLER)
    return planned


def _no_states() -> ScaleTable:
    raise RecipeError(
        "a refit takes no scales = 'source': Transformer Engine changes its scales at every step, "
        "and a refit is planned once; give numbers, or leave scales out to have them computed"
    )


def _gather(offer: _Offer, group: dist.ProcessGroup) -> list[_Offer]:
    offers: list[_Offer | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(offers, offer, group)
    return [one for one in offers if one is not None]


def _fault(source: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> str:
    """What is wrong with this process's tensors, to be told to all; raised if nobody waits."""
    try:
        check_state(source)
    except FuseportError as error:
        if group is None:
            raise
        return str(error)
    return ""


def _check_same(offers: Sequence[_Offer]) -> None:
    for number, one in enumerate(offers):
        if one.fault:
            raise SourceError(f"process {number}: {one.fault}")
        place = one.held.place
        if place.tp_size * place.pp_size > len(offers):
            raise RecipeError(
                f"place: the model is split over tp_size {place.tp_size} × pp_size {place.pp_size} "
                f"processes, and the group has {len(offers)}; give the group of all processes that "
                f"have the model together"
            )
        if (one.spec, one.recipe) != (offers[0].spec, offers[0].recipe):
            raise RecipeError(
                f"process {number} was given another spec or recipe than process 0; all need the "
                f"same"
            )


def _ranks(offer: _Offer, process: int, processes: int) -> tuple[int, ...]:
    world = offer.recipe.world_size
    if offer.wants is None:
        return tuple(range(world)) if processes == 1 else (process % world,)
    known = {rank for rank in offer.wants if is_whole(rank) and 0 <= rank < world}
    if len(known) < len(offer.wants):
        raise RecipeError(
            f"process {process} wants the target's ranks {list(offer.wants)}; there are "
            f"{world}, each to be named once"
        )
    return offer.wants
