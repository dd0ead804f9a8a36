"""One of four processes over gloo that refit a model which they have split.

    torchrun --nproc-per-node 4 refit_worker.py

Each cuts its own shard out of the same random model, refits twice with changed weights, and
compares its results with the whole model's conversion, bit for bit. Bytes are counted as they are
sent, and by how many elements of its results a process does not hold. Prints a line a scenario.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.refit import Refit
from fuseport.converter.shards import Place
from fuseport.converter.stages import chunks_as_one
from fuseport_testing.cases import Case, megatron_args
from fuseport_testing.small_models import (
    State,
    assert_same_bits,
    experts_apart,
    random_state,
    small,
)

ROWS = re.compile(r"word_embeddings|output_layer|linear_qkv\.|linear_fc1\.")
COLUMNS = re.compile(r"linear_(proj|fc2)\.weight")
EXPERT = re.compile(r"(.*local_experts\.)(\d+)(\..*)")
CODES = torch.float8_e4m3fn, torch.uint8
LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Scenario:
    """A model, how training has split it, and what it becomes."""

    name: str
    case: Case
    recipe: Recipe
    tp: int = 4
    pp: int = 1
    ep: int = 1
    expert_tp: int | None = None
    stays: bool = False
    # Of each process, dealt out in turn.
    chunks: int = 1
    # Quantised tensors of which no region is cut, and travel as codes: elements that share a scale
    # (0: a row), and its bytes.
    codes: str = "^$"
    region: int = 1
    scale: int = 4

    def place(self, process: int) -> Place:
        """Megatron-Core's order: tensor parallel ranks next to each other, stages last."""
        tp, per_stage = self.tp, 4 // self.pp
        inner = process % per_stage
        expert = self.expert_tp or tp
        return Place(
            tp_size=tp, tp_rank=inner % tp, pp_size=self.pp, pp_rank=process // per_stage,
            ep_size=self.ep, ep_rank=inner // expert % self.ep, expert_tp_size=expert,
            expert_tp_rank=inner % expert, first_layer=0 if self.chunks > 1 else None,
        )  # fmt: skip


DENSE = small(
    layers=2, hidden=160, heads=4, kv_channels=40, query_groups=2, ffn=160, vocab=100, qkv_bias=True
)
MOE = small(layers=2, hidden=32, heads=4, kv_channels=8, ffn=64, vocab=24, gated=True, experts=4)
BLOCKS = small(layers=2, hidden=256, heads=8, kv_channels=64, query_groups=4, ffn=512, vocab=20)
ALIGNED = small(layers=2, hidden=64, heads=8, kv_channels=8, ffn=256, vocab=64)
DEEP = small(layers=8, hidden=32, heads=4, kv_channels=8, ffn=64, vocab=24)
PARALLEL: dict[str, Any] = {"use_parallel_embedding": True}
INPUTS = {"*": {"input": 0.125}}
GIVEN = {"*": {"input": 0.125, "weight": 0.5, "kv_cache": 0.25}}

SCENARIOS = (
    Scenario("same tp", ALIGNED, Recipe(tp_size=4, **PARALLEL), stays=True),
    Scenario("tp 4 to 2", ALIGNED, Recipe(tp_size=2, **PARALLEL)),
    Scenario("tp 4 to 1", ALIGNED, Recipe(tp_size=1)),
    Scenario("few KV heads, tp 4 to 2", DENSE, Recipe(tp_size=2)),
    Scenario("few KV heads, odd vocabulary", small(
        layers=1, hidden=16, heads=4, kv_channels=4, query_groups=2, ffn=16, vocab=21,
        padded_vocab=24), Recipe(tp_size=4, **PARALLEL)),
    Scenario("scales for rows", DENSE, Recipe(tp_size=2, quant="fp8-row"),
             codes="fc|gate|qkv", region=0),
    Scenario("whole tensors", DENSE, Recipe(target="hf")),
    Scenario("whole tensors, fp8", DENSE, Recipe(target="hf", quant="fp8")),
    Scenario("whole tensors, fp8-row", DENSE, Recipe(target="hf", quant="fp8-row"),
             codes="q_proj|k_proj|v_proj|gate|up", region=0),
    Scenario("whole tensors, cut blocks", DENSE, Recipe(target="hf", quant="fp8-block")),
    Scenario("whole tensors, mxfp8", DENSE, Recipe(target="hf", quant="mxfp8"),
             codes="q_proj|k_proj|v_proj|gate|up", region=32, scale=1),
    Scenario("whole tensors, whole blocks", BLOCKS, Recipe(target="hf", quant="fp8-block"),
             codes="q_proj|o_proj|gate|up|down", region=128 * 128),
    Scenario("whole tensors, nvfp4", DENSE, Recipe(target="hf", quant="nvfp4", scales=INPUTS)),
    Scenario("given scales and a cache", DENSE,
             Recipe(tp_size=2, quant="fp8", scales=GIVEN, kv_cache="fp8"), codes="", scale=0),
    Scenario("scales over ranks", ALIGNED,
             Recipe(tp_size=4, quant="fp8", scales=INPUTS, **PARALLEL), stays=True),
    Scenario("scales over ranks, tp 4 to 2", ALIGNED,
             Recipe(tp_size=2, quant="fp8", scales=INPUTS)),
    Scenario("scales over ranks, ep 2 to 4", MOE,
             Recipe(tp_size=4, moe_ep_size=4, quant="fp8", scales=INPUTS), ep=2, expert_tp=2),
    Scenario("scales over ranks, pp 2", ALIGNED,
             Recipe(tp_size=2, pp_size=2, quant="fp8", scales=INPUTS), 2, 2),
    Scenario("ep 2 to 4", MOE, Recipe(tp_size=4, moe_ep_size=4), ep=2, expert_tp=2),
    Scenario("ep 2 to 4, two copies", MOE, Recipe(tp_size=4, moe_ep_size=4), 2, 1, 2, 1),
    Scenario("ep 4 to 1", MOE, Recipe(target="hf", quant="fp8-block"), 1, 1, 4, 1,
             codes="experts", region=64 * 32),
    Scenario("pp 2 and tp 2", DENSE, Recipe(target="hf", quant="fp8-block"), 2, 2),
    Scenario("pp 2 and tp 2, chunks", DEEP, Recipe(tp_size=2, pp_size=2), 2, 2, chunks=2),
)  # fmt: skip


def shard(state: State, scenario: Scenario, place: Place) -> State:
    """What a process has of a whole model, by its own names."""
    if scenario.chunks > 1:
        return _chunks(state, scenario, place)
    result: State = {}
    layers = scenario.case.layers // place.pp_size
    experts = (scenario.case.experts or 0) // place.ep_size
    for name, value in state.items():
        own, stage = name, place.pp_size - 1 if "final" in name or "output" in name else 0
        layer, expert = LAYER.match(name), EXPERT.match(name)
        if layer:
            stage, number = divmod(int(layer[2]), layers)
            own = f"{layer[1]}{number}{layer[3]}"
        if expert:
            owner, number = divmod(int(expert[2]), experts)
            if owner != place.ep_rank:
                continue
            mine = EXPERT.match(own)
            assert mine is not None
            own = f"{mine[1]}{number}{mine[3]}"
        if stage == place.pp_rank:
            result[own] = _cut(name, value, scenario.case.gated, *place.share(expert is not None))
    return result


def _chunks(state: State, scenario: Scenario, place: Place) -> State:
    """Each chunk is a stage of a longer pipeline."""
    stages = place.pp_size * scenario.chunks
    held = [
        shard(
            state, replace(scenario, chunks=1),
            replace(place, pp_size=stages, pp_rank=rank, first_layer=None),
        )
        for rank in range(place.pp_rank, stages, place.pp_size)
    ]  # fmt: skip
    return chunks_as_one(held, scenario.case.layers, pp_rank=place.pp_rank, pp_size=place.pp_size)


def _cut(name: str, value: torch.Tensor, gated: bool, rank: int, size: int) -> torch.Tensor:
    if "linear_fc1" in name and gated:
        halves = [half.chunk(size)[rank] for half in value.chunk(2)]
        return torch.cat(halves)
    if ROWS.search(name):
        return value.chunk(size)[rank].clone()
    return value.chunk(size, 1)[rank].clone() if COLUMNS.search(name) else value.clone()


def lacking(scenario: Scenario, spec: ModelSpec, place: Place, rank: int, result: State) -> int:
    """Bytes of a result's sources that this process does not hold, by converting 1s and 2s."""
    whole = {n: torch.ones_like(t) for n, t in experts_apart(random_state(scenario.case)).items()}
    marked = {n: _mark(n, t, scenario, place) for n, t in whole.items()}
    recipe = scenario.recipe
    plain = Recipe(
        target=recipe.target, tp_size=recipe.tp_size, pp_size=recipe.pp_size,
        moe_ep_size=recipe.moe_ep_size,
        use_parallel_embedding=recipe.use_parallel_embedding, dtype="float32",
    )  # fmt: skip
    total = 0
    for name, tensor in convert_state_dict(marked, spec, plain)[rank].items():
        count, quantised = int((tensor == 1).sum()), result[name].dtype in CODES
        if quantised and re.search(scenario.codes, name):
            region = scenario.region or tensor.shape[-1]
            assert count % region == 0
            total += count + count // region * scenario.scale
        else:
            # Sources are fp32; a cast is made before the way, a scale after it.
            total += count * (4 if quantised else result[name].element_size())
    return total


def _mark(name: str, ones: torch.Tensor, scenario: Scenario, place: Place) -> torch.Tensor:
    """2 where the process holds an element, found by cutting each element's number."""
    numbers = torch.arange(ones.numel(), dtype=torch.float64).view(ones.shape)
    held = shard({name: numbers}, scenario, place)
    result = ones.flatten().clone()
    for part in held.values():
        result[part.flatten().long()] = 2
    return result.view(ones.shape)


class Counter:
    """Counts the bytes of all sends."""

    def __init__(self) -> None:
        self.sent = 0
        self._send = dist.batch_isend_irecv

    def __call__(self, operations: list[dist.P2POp]) -> list[dist.Work]:
        self.sent += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return self._send(operations)


def run(scenario: Scenario, process: int, counter: Counter) -> str:
    """Refit twice, and in buckets; what was seen."""
    spec = ModelSpec.from_facts(vars(megatron_args(scenario.case, 1, 1)))
    place, group = scenario.place(process), dist.group.WORLD
    held = shard(experts_apart(random_state(scenario.case)), scenario, place)
    refit = Refit(held, spec, scenario.recipe, place=place, group=group)
    rank = process % scenario.recipe.world_size
    for seed in (1, 2):
        state = experts_apart(random_state(scenario.case, seed))
        for name, value in shard(state, scenario, place).items():
            # The second time every other parameter has moved.
            if seed == 2 and len(name) % 2:
                held[name] = value
            else:
                held[name].copy_(value)
        expected = convert_state_dict(state, spec, scenario.recipe)[rank]
        counter.sent = 0
        (found,) = refit.run()
        assert_same_bits(found, expected)
        assert counter.sent == sum(refit.traffic[process])
        received = sum(row[process] for row in refit.traffic)
        assert received == lacking(scenario, spec, place, rank, found), received
        together = {n: t.clone() for bucket in refit.buckets(5000) for n, t in bucket}
        assert_same_bits(together, expected)
    assert bool(sum(map(sum, refit.traffic))) != scenario.stays
    return f"{scenario.name}: {sum(map(sum, refit.traffic))} bytes"


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    counter = Counter()
    dist.batch_isend_irecv = counter  # type: ignore[assignment]
    process = dist.get_rank()
    for scenario in SCENARIOS:
        line = run(scenario, process, counter)
        if process == 0:
            print(line, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
