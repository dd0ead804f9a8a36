"""Weights in memory: a whole model's state dict becomes every rank's tensors."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch

from fuseport.kernels.move import GivenScale

from . import collector
from .alike import Alike
from .arguments import check_conversion, check_used
from .backend import Make, choose, copier
from .claims import Claims, StoredClaims, check_dtype
from .errors import FuseportWarning, MissingTensorError
from .given import Given, scale_table
from .layout import shape_of
from .logical import Model
from .model import ModelSpec
from .plan import Allocate, Planned, moves_of, storage_key
from .quantise import Builder, builder, to_quantise
from .recipe import Recipe
from .relay import relay
from .repeats import Repeats
from .sources.further import without_further
from .sources.megatron import read_model
from .sources.megatron_names import unwrapped
from .sources.stored_fp8 import StoredFp8, dequantise, is_stored_fp8, read_stored_fp8
from .targets.parts import TargetTensor
from .targets.table import TARGETS, te_table
from .targets.target import Task

# Elements of which the launch takes longer than the planning of as many.
PART = 1 << 31
# The name of the zeros that fill a padded vocabulary, where a source tensor's name is shown.
PADDING = "(zero rows)"
# From a helper up to who called `convert_state_dict`, through the function and what is around it.
_CALLER = 4


@collector.paused()
def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    recipe: Recipe,
    *,
    scales: Mapping[str, GivenScale] | None = None,
    backend: str = "auto",
) -> list[dict[str, torch.Tensor]]:
    """Convert a whole model in memory (tensor and pipeline parallel size 1).

    Args:
        state_dict: Megatron-Core's `model.state_dict()`; left as it is. On a GPU everything
            stays there, and all ranks' tensors are filled in a few launches.
        spec: the model's facts.
        recipe: the target's parallel sizes and dtype, and whether layers that predict further
            tokens, of which `spec` says how many there are, are kept.
        scales: a module's target name, such as "transformer.layers.0.mlp.fc" → the scale with
            which its weight becomes e4m3.
        backend: "triton", "torch", or "auto" (Triton on a GPU).

    Returns:
        For each rank, its tensors by name, on the state dict's device. Small ones, as norms and
        scales, share memory that is allocated for many of them.

    Raises:
        FuseportError: see `errors`; nothing is converted.
    """
    check_conversion(state_dict, spec, recipe, scales)
    if recipe.mtp == "drop":
        state_dict, spec = without_further(state_dict, spec)
    TARGETS[recipe.target].check(spec, recipe)
    found = read_stored(state_dict)
    plain = {n: v for n, v in state_dict.items() if not is_stored_fp8(v)} if found else state_dict
    tensors = {unwrapped(name): tensor for name, tensor in weights(plain).items()}
    tensors |= {name: one.codes for name, one in found.items()}
    # What is quantised already goes other ways, by the names of its tensors.
    alike = Alike({} if found else tensors, spec)
    relaid: dict[tuple[int, str], torch.Tensor] = {}
    if found:
        relaid, names = _relay(tensors, found, spec, recipe)
        tensors |= {name: dequantise(found[name]) for name in names}
    claims, others = (StoredClaims, tensors) if found else (Claims, alike.others)
    model = read_model(others, spec, claims, alike.first)
    check_complete(model, spec)
    targets, make = prepare(tensors, model, spec, recipe, scales, states=state_dict, relaid=relaid)
    check_used(scales, targets)
    ready = copier(backend, next(iter(tensors.values())).device)
    ranks = _filled(targets, Repeats(make, alike), ready, recipe.world_size)
    _finish(make.given, recipe)
    return ranks


def _filled(
    targets: Sequence[TargetTensor], repeats: Repeats, ready: Make, count: int
) -> list[dict[str, torch.Tensor]]:
    """The tensors of `count` ranks by name, their launches under way."""
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for part in whole_layers(targets, PART):
        work = repeats.work(part)
        # A GPU fills this part while the next one is planned.
        ready(work.moves, work.repeats).run()
        for rank, name, tensor in work.filled:
            ranks[rank][name] = tensor
    return ranks


@collector.paused()
def plan_memory(
    tensors: Mapping[str, torch.Tensor],
    model: Model,
    spec: ModelSpec,
    recipe: Recipe,
    scales: Mapping[str, GivenScale] | None = None,
    allocate: Allocate | None = None,
) -> list[Planned]:
    """Plan over real tensors; by default the target's are on the same device, not yet filled."""
    targets, make = prepare(tensors, model, spec, recipe, scales, allocate)
    plan = [planned for target in targets for planned in make.plan(target)]
    _finish(make.given, recipe)
    return plan


@collector.paused()
def prepare(
    tensors: Mapping[str, torch.Tensor],
    model: Model,
    spec: ModelSpec,
    recipe: Recipe,
    scales: Mapping[str, GivenScale] | None,
    allocate: Allocate | None = None,
    states: Mapping[str, object] | None = None,
    relaid: Mapping[tuple[int, str], torch.Tensor] | None = None,
) -> tuple[list[TargetTensor], Builder]:
    """What is to be made, and what plans it.

    `states` are a state dict's `_extra_state` entries, among others, for `recipe.scales`;
    `relaid` are the scales of weights that are fp8 already, by rank and name.
    """
    example = next(iter(tensors.values()))
    task = Task(model, spec, recipe, zero_row(model, spec, example.device), scales)
    targets = list(TARGETS[recipe.target].rules(task))
    given = given_in_memory(task, example.device, states or {})
    given.relaid = relaid or {}
    return targets, builder(targets, recipe, allocate or example.new_empty, given)


def _finish(given: Given, recipe: Recipe) -> None:
    """Raise ScaleError if a given scale was not used, and hand notes on as warnings."""
    given.check_used(recipe)
    for note in given.notes:
        warnings.warn(note, FuseportWarning, stacklevel=_CALLER)


def whole_layers(targets: Sequence[TargetTensor], limit: int) -> Iterator[list[TargetTensor]]:
    """Runs of whole layers, each of `limit` elements or a layer more: scales are shared within."""
    part: list[TargetTensor] = []
    elements = 0
    for target in targets:
        if elements >= limit and target.layer != part[-1].layer:
            yield part
            part, elements = [], 0
        part.append(target)
        elements += math.prod(shape_of(target.layout))
    if part:
        yield part


def given_in_memory(task: Task, device: torch.device, states: Mapping[str, object]) -> Given:
    """The scales that a conversion of tensors on `device` is given, by file or by `states`."""
    table = scale_table(task.recipe, lambda: te_table(task, lambda: (states,)))

    @functools.cache
    def constant(value: float) -> torch.Tensor:
        return torch.full((1,), value, dtype=torch.float32, device=device)

    return Given(constant, table)


def read_stored(state_dict: Mapping[str, object]) -> dict[str, StoredFp8]:
    """The weights that training keeps in fp8, by Megatron-Core's names.

    Raises:
        ModelError: as `read_stored_fp8`; or a plain fp8 tensor, whose scales nothing says.
    """
    found = {}
    for name, value in state_dict.items():
        if is_stored_fp8(value):
            found[unwrapped(name)] = read_stored_fp8(value, name)
        elif isinstance(value, torch.Tensor) and value.dtype is torch.float8_e4m3fn:
            check_dtype(name, value.dtype)
    return found


def _relay(
    tensors: Mapping[str, torch.Tensor],
    found: Mapping[str, StoredFp8],
    spec: ModelSpec,
    recipe: Recipe,
) -> tuple[dict[tuple[int, str], torch.Tensor], list[str]]:
    """The scales of fp8 weights that are copied, and the names of those to dequantise; says so."""
    # Weights may be views of one buffer; their twins are not.
    twins = {name: torch.empty_like(one, device="meta") for name, one in tensors.items()}
    by_storage = {storage_key(twins[name]): name for name in found}
    stored = {key: found[name] for key, name in by_storage.items()}
    model = read_model(twins, spec, StoredClaims)
    task = Task(model, spec, recipe, zero_row(model, spec, torch.device("meta")))
    targets = to_quantise(list(TARGETS[recipe.target].rules(task)), recipe)
    scales, copied = relay(targets, stored, recipe.quant)
    names = sorted(by_storage[key] for key in stored.keys() - copied)
    if names:
        warnings.warn(
            f"{len(names)} of {len(found)} fp8 weights of the source are dequantised, the first is "
            f"{names[0]} ({found[names[0]].scheme}): a result with "
            f"quant {recipe.quant!r} does not hold them as they are",
            FuseportWarning,
            stacklevel=_CALLER,
        )
    return scales, names


def run_plan(plan: list[Planned], backend: str) -> None:
    """Fill every planned tensor."""
    run = choose(backend, plan[0].dst.device)
    run(moves_of(plan))


def weights(state_dict: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, by their own names.

    Raises:
        MissingTensorError: there are none.
    """
    found = tensors_of(state_dict)
    if not found:
        keys = ", ".join(map(str, list(state_dict)[:5]))
        raise MissingTensorError(
            f"the state dict holds no tensors (its keys: {keys or 'none'}); give the model's own"
        )
    return found


def tensors_of(state_dict: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Like `weights`, of a dict that may hold none."""
    return {
        name: value.detach()
        for name, value in state_dict.items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    }


def zero_row(model: Model, spec: ModelSpec, device: torch.device) -> torch.Tensor:
    """[1, H] of zeros in the embedding's dtype."""
    table = model.embedding if model.embedding is not None else model.output
    dtype = torch.float32 if table is None else table.dtype
    return torch.zeros(1, spec.hidden_size, dtype=dtype, device=device)


def check_complete(model: Model, spec: ModelSpec) -> None:
    """Raise MissingTensorError if a whole model lacks what only one stage holds."""
    needed = {
        "embedding.word_embeddings.weight": model.embedding,
        "decoder.final_layernorm.weight": model.final_norm,
    }
    if spec.position_embedding_type == "learned_absolute":
        needed["embedding.position_embeddings.weight"] = model.positions
    if not spec.share_embeddings_and_output_weights:
        needed["output_layer.weight"] = model.output
    for name, found in needed.items():
        if found is None:
            raise MissingTensorError(
                f"the source has no tensor {name}; is a pipeline stage missing? (a model with tied "
                f"embeddings says share_embeddings_and_output_weights: true in its facts)"
            )
