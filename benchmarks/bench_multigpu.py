"""Conversions over several GPUs: each process has a tensor parallel shard of a Llama-3-70B.

    torchrun --standalone --nproc-per-node 8 -m benchmarks.bench_multigpu [--layers 12]
    torchrun --standalone --nproc-per-node 4 -m benchmarks.bench_multigpu --toy     # gloo, no GPU

tp is the number of processes. Each case is first compared with the one-process result bit for bit,
on a model of `--check-layers` layers of full width, and prints no figure where they differ.

1. The drop-in on every rank, split as training has it: no communication.
2. The drop-in with half as many KV heads as ranks, and a vocabulary that tp does not divide: rows
   of other ranks travel at each call.
3. A refit to half as many tensor parallel ranks, in bf16 and with fp8 rows, and to whole tensors
   in fp8 blocks: slices travel, and the bytes sent must be those of the plan.

Times are the slowest process's, and bandwidths of one process: of a copy on its device, and of a
ring in which each process sends to the next. The share of what was received in the latter counts
the whole run, casts and all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from fuseport.converter import ModelSpec, Recipe, convert_state_dict
from fuseport.converter.exchange import kv_ranges, transfers, vocabulary_ranges
from fuseport.converter.megatron import DistributedTRTLLMModelWeightsConverter, Parallel
from fuseport.converter.refit import Refit
from fuseport.converter.shards import Place

from .models import LLAMA_70B, TOY, cut, random_weights, shapes

Weights = dict[str, torch.Tensor]
Run = Callable[[], Weights]


class Sent:
    """Counts the bytes that this process sends, by standing in for `batch_isend_irecv`."""

    def __init__(self) -> None:
        self.nbytes, self._start = 0, dist.batch_isend_irecv

    def __call__(self, operations: list[dist.P2POp]) -> list[dist.Work]:
        """Count, and start them."""
        self.nbytes += sum(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return self._start(operations)


@dataclass(frozen=True)
class World:
    """The processes, and what was measured of their machine: bytes per second."""

    rank: int
    size: int
    device: torch.device
    sent: Sent
    repeats: int
    copy: float = 0.0
    ring: float = 0.0

    def say(self, text: str) -> None:
        """Print once."""
        if self.rank == 0:
            print(text, flush=True)

    def wait(self) -> None:
        """Until this process's device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reduced(self, value: float, how: dist.ReduceOp.RedOpType) -> float:
        """A value of all processes."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        return float(tensor)

    def seconds(self, run: Callable[[], object]) -> float:
        """Median of the slowest process's time."""
        times = []
        for _ in range(self.repeats + 1):
            dist.barrier()
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return self.reduced(statistics.median(times[1:]), dist.ReduceOp.MAX)


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


def cases(world: World, spec: ModelSpec) -> Iterator[Case]:
    """All cases that these processes can run."""
    tp, vocab = world.size, spec.vocab_size or 0
    whole = Recipe(tp_size=tp, use_parallel_embedding=True)

    def on_rank(recipe: Recipe) -> Callable[[Weights, ModelSpec], Weights]:
        rank = world.rank % recipe.world_size
        return lambda state, facts: convert_state_dict(state, facts, recipe, backend="torch")[rank]

    yield Case(f"1 drop-in, tp {tp}", spec, vocab, dropin(world), on_rank(whole))
    if tp == 1:
        return
    few = spec.replace(num_query_groups=max(tp // 2, 1), vocab_size=vocab - 3)
    name = f"2 drop-in, {few.num_query_groups} KV heads, odd vocabulary"
    yield Case(name, few, vocab, dropin(world), on_rank(whole))
    for recipe in (
        Recipe(tp_size=tp // 2, use_parallel_embedding=True),
        Recipe(tp_size=tp // 2, use_parallel_embedding=True, quant="fp8-row"),
        Recipe(target="hf", quant="fp8-block"),
    ):
        name = f"3 refit to {recipe.target} tp {recipe.tp_size}, {recipe.quant}"
        yield Case(name, spec, vocab, refit(world, recipe), on_rank(recipe))


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
    world.sent.nbytes = 0
    found = run()
    good = world.sent.nbytes == expected_bytes
    expected = case.reference(random_weights(shapes(spec, case.padded), world.device), spec)
    good &= found.keys() == expected.keys() and all(
        map(same, found.values(), map(expected.get, found))
    )
    return world.reduced(float(good), dist.ReduceOp.MIN) == 1.0


def same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Equal dtype, shape and bytes."""
    if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


def report(world: World, case: Case, layers: int) -> None:
    """Time a case that was found right."""
    spec = case.spec.replace(num_layers=layers)
    held = shard(world, spec, case.padded)
    run, sent = case.make(held, spec)
    nbytes = sum(t.nbytes for t in held.values()) + sum(t.nbytes for t in run().values())
    seconds = world.seconds(run)
    total = world.reduced(sent, dist.ReduceOp.SUM)
    travel = total / world.size / world.ring
    world.say(
        f"{case.name:44} {seconds * 1e3:9.2f} ms  {nbytes / 1e9:6.2f} GB a rank, "
        f"{nbytes / seconds / world.copy:5.2f} of copy  sent {total / 1e6:9.3f} MB, "
        f"{travel / seconds:5.2f} of the ring's bandwidth"
    )


def measured(world: World, nbytes: int) -> World:
    """With the bandwidths of a copy and of a ring."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    copy = 2 * nbytes / world.seconds(lambda: target.copy_(source))
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def ring() -> None:
        operations = [dist.P2POp(dist.isend, source, after), dist.P2POp(dist.irecv, target, before)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    speed = nbytes / world.seconds(ring) if world.size > 1 else float("inf")
    return World(world.rank, world.size, world.device, world.sent, world.repeats, copy, speed)


def start(repeats: int) -> World:
    """Join the processes that torchrun has started: NCCL on GPUs, gloo elsewhere."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(minutes=5),
        device_id=device if on_gpu else None,
    )  # fmt: skip
    sent = Sent()
    dist.batch_isend_irecv = sent  # type: ignore[assignment]
    return World(dist.get_rank(), dist.get_world_size(), device, sent, repeats)


def main() -> None:
    """Check and time all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="timed; as many as fit")
    parser.add_argument("--check-layers", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="a model for a machine without a GPU")
    options = parser.parse_args()
    spec, layers = (TOY, TOY.num_layers) if options.toy else (LLAMA_70B, options.layers)
    world = start(2 if options.toy else 10)
    world = measured(world, 1 << (20 if options.toy else 30))
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    world.say(
        f"{world.size} × {name}, torch {torch.__version__}: copy {world.copy / 1e9:.1f} GB/s, ring "
        f"{world.ring / 1e9:.1f} GB/s"
    )
    for case in cases(world, spec):
        if is_right(world, case, min(options.check_layers, layers)):
            report(world, case, layers)
        else:
            world.say(f"{case.name:44} RED: bits or bytes differ; no figure")
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
