"""Ways of converting a sharded model on several GPUs: each is checked, then timed.

1. The drop-in on every rank, split as training has it: no communication.
2. The drop-in with half as many KV heads as ranks, and a vocabulary that tp does not divide.
3. Refits to half as many tensor parallel ranks, and to whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.exchange import kv_ranges, transfers, vocabulary_ranges
from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter, Parallel
from fuseport.converter.refit import Refit
from fuseport.converter.shards import Place

from .models import cut, random_weights, shapes
from .multigpu_world import World
from .work import same_bits

Weights = dict[str, torch.Tensor]
Run = Callable[[], Weights]
Record = dict[str, object]


@dataclass(frozen=True)
class Case:
    """A way of converting: a run over shards, and the one-process result on this rank.

    `expected_bytes` is what this process must send in a run.
    """

    name: str
    spec: ModelSpec
    padded: int
    make: Callable[[Weights, ModelSpec], tuple[Run, int]]
    reference: Callable[[Weights, ModelSpec], Weights]


def cases(world: World, spec: ModelSpec, part: int) -> Iterator[Case]:
    """The cases of a part that these processes can run."""
    tp, vocab = world.size, spec.vocab_size or 0
    whole = Recipe(tp_size=tp, use_parallel_embedding=True)
    if part == 1:
        yield Case(f"1 drop-in, tp {tp}", spec, vocab, dropin(world), on_rank(world, whole))
    if part == 2 and tp > 1:
        few = spec.replace(num_query_groups=tp // 2, vocab_size=vocab - 3)
        name = f"2 drop-in, {few.num_query_groups} KV heads, odd vocabulary"
        yield Case(name, few, vocab, dropin(world), on_rank(world, whole))
    if part == 3 and tp > 1:
        for recipe in _refits(tp):
            name = f"3 refit to {recipe.target} tp {recipe.tp_size}, {recipe.quant}"
            yield Case(name, spec, vocab, refit(world, recipe), on_rank(world, recipe))


def _refits(tp: int) -> Iterator[Recipe]:
    yield Recipe(tp_size=tp // 2, use_parallel_embedding=True)
    yield Recipe(tp_size=tp // 2, use_parallel_embedding=True, quant="fp8-row")
    yield Recipe(target="hf", quant="fp8-block")


def on_rank(world: World, recipe: Recipe) -> Callable[[Weights, ModelSpec], Weights]:
    """What this process's target rank is when one process converts the whole model."""
    rank = world.rank % recipe.world_size
    return lambda state, facts: convert_state_dict(state, facts, recipe, backend="torch")[rank]


def dropin(world: World) -> Callable[[Weights, ModelSpec], tuple[Run, int]]:
    """The drop-in over the processes' own group."""

    def make(held: Weights, spec: ModelSpec) -> tuple[Run, int]:
        facts = {name: getattr(spec, name) for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
            "num_query_groups", "kv_channels", "gated_linear_unit", "normalization")}  # fmt: skip
        converter = DistributedTRTLLMModelWeightsConverter(
            SimpleNamespace(**facts), "bfloat16", activation="swiglu", output="cuda",
            parallel=Parallel(world.size, world.rank, tp_group=dist.group.WORLD),
        )  # fmt: skip

        def run() -> Weights:
            converter.convert(held, {}, spec.vocab_size or 0)
            return converter.trtllm_model_weights

        return run, rows_to_send(world, held, spec)

    return make


def rows_to_send(world: World, held: Mapping[str, torch.Tensor], spec: ModelSpec) -> int:
    """Bytes of rows that the other ranks want of this one."""
    total, tp = 0, world.size
    for name, tensor in held.items():
        if "linear_qkv.weight" in name and spec.num_query_groups < tp:
            heads, groups = spec.num_attention_heads, spec.num_query_groups
            ranges = kv_ranges(heads, groups, spec.kv_channels, tp)
        elif "word_embeddings" in name or "output_layer" in name:
            ranges = vocabulary_ranges(spec.vocab_size or 0, tp)
        else:
            continue
        total += sum(
            (one.stop - one.start) * tensor[0].nbytes
            for one in transfers(tensor.shape[0], ranges)
            if one.holder == world.rank != one.wanter
        )
    return total


def refit(world: World, recipe: Recipe) -> Callable[[Weights, ModelSpec], tuple[Run, int]]:
    """A refit in which process p fills the target's rank p modulo their number."""

    def make(held: Weights, spec: ModelSpec) -> tuple[Run, int]:
        place = Place(tp_size=world.size, tp_rank=world.rank)
        one = Refit(held, spec, recipe, place=place, group=dist.group.WORLD)
        return lambda: one.run()[0], sum(one.traffic[world.rank])

    return make


def shard(world: World, spec: ModelSpec, padded: int) -> Weights:
    """This rank's share of the model's random weights."""
    return random_weights(
        shapes(spec, padded), world.device, lambda name, t: cut(name, t, world.rank, world.size)
    )


def is_right(world: World, case: Case, layers: int) -> bool:
    """On all processes the bits of the one-process result, and the bytes of the plan."""
    spec = case.spec.replace(num_layers=layers)
    run, expected_bytes = case.make(shard(world, spec, case.padded), spec)
    run()
    world.traffic.clear()
    found = run()
    good = world.traffic.bytes_of(dist.isend) == expected_bytes
    world.traffic.clear()
    expected = case.reference(random_weights(shapes(spec, case.padded), world.device), spec)
    good &= found.keys() == expected.keys() and all(
        same_bits(found[name], expected[name]) for name in found
    )
    return world.all_say(good)


def timed(world: World, case: Case, layers: int) -> Record:
    """Times of a case that was found right, in words and as a record.

    Shares of the ring's bandwidth are those of the process that sends or receives most.
    """
    spec = case.spec.replace(num_layers=layers)
    held = shard(world, spec, case.padded)
    make, planned = case.make(held, spec)

    def run() -> Weights:
        world.traffic.clear()
        return make()

    nbytes = sum(t.nbytes for t in held.values()) + sum(t.nbytes for t in run().values())
    seconds = world.seconds(run)
    record: Record = {
        "milliseconds": seconds * 1e3, "bytes_of_a_rank": nbytes,
        "share_of_copy": nbytes / seconds / world.copy,
    }  # fmt: skip
    if world.total(planned) == 0:
        alone = world.seconds_alone(run)
        return record | {"milliseconds_alone": alone * 1e3, "of_alone": seconds / alone}
    run()
    sent, received = map(world.traffic.bytes_of, (dist.isend, dist.irecv))
    busiest = world.most(max(sent, received))
    exchange = world.seconds(world.traffic.repeat)
    world.traffic.clear()
    return record | {
        "sent_bytes": int(world.total(sent)), "planned_bytes": int(world.total(planned)),
        "busiest_bytes": int(busiest), "exchange_milliseconds": exchange * 1e3,
        "exchange_share_of_ring": busiest / exchange / world.ring,
        "run_share_of_ring": busiest / seconds / world.ring,
    }  # fmt: skip


def run_case(world: World, case: Case, check_layers: int, layers: int) -> Record:
    """Check a case, and time it if it is right."""
    if not is_right(world, case, check_layers):
        return {"case": case.name, "right": False}
    return {"case": case.name, "right": True} | timed(world, case, layers)
