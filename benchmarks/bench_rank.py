"""One tensor-parallel rank of a Llama-3-70B (tp 8) on one GPU: checked bit for bit, then timed.

    python -m benchmarks.bench_rank [--layers 80]

State dict on the GPU → tensors on the GPU. Prints the bytes moved, the time of the launches and
the share of the copy bandwidth measured in the same run. A red check prints no figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial

import torch

from fuseport.converter import ModelSpec, Recipe
from fuseport.converter.sources.megatron import read_model
from fuseport.converter.state import plan_memory
from fuseport.kernels.fused_copy import FusedCopy
from fuseport.kernels.move import GivenScale, Move
from fuseport.kernels.reference import fused_copy_ref

from .measure import copy_bandwidth, machine, milliseconds
from .models import LLAMA_70B

TP = 8
MODULES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


def shard(spec: ModelSpec, tp: int) -> dict[str, torch.Tensor]:
    """One rank's layers, random bf16, on the GPU."""
    hidden, head = spec.hidden_size, spec.kv_channels
    qkv = (spec.num_attention_heads + 2 * spec.num_query_groups) * head // tp
    shapes = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (qkv, hidden),
        "self_attention.linear_proj.weight": (hidden, spec.num_attention_heads * head // tp),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * spec.ffn_hidden_size // tp, hidden),
        "mlp.linear_fc2.weight": (hidden, spec.ffn_hidden_size // tp),
    }
    return {
        f"decoder.layers.{layer}.{name}": torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for layer in range(spec.num_layers)
        for name, shape in shapes.items()
    }


def rank_moves(spec: ModelSpec, quantised: bool) -> list[Move]:
    """The moves that convert the shard; with `quantised`, linear weights become e4m3."""
    own = spec.replace(
        num_attention_heads=spec.num_attention_heads // TP,
        num_query_groups=spec.num_query_groups // TP,
        ffn_hidden_size=spec.ffn_hidden_size // TP,
    )
    tensors = shard(spec, TP)
    names = [f"transformer.layers.{n}.{m}" for n in range(spec.num_layers) for m in MODULES]
    scales = {name: GivenScale(50.0) for name in names} if quantised else None
    plan = plan_memory(tensors, read_model(tensors, own), own, Recipe(), scales)
    return [move for planned in plan for move in planned.moves]


def transposed(moves: Sequence[Move]) -> list[Move]:
    """The same matrices from sources stored as [in, out], as legacy grouped experts are."""
    return [
        Move(move.dst, torch.randn(move.src.T.shape, device="cuda").to(move.src.dtype).T)
        for move in moves
        if move.src.ndim == 2
    ]


def nbytes(moves: Sequence[Move]) -> int:
    """Bytes that must be read and written."""
    return sum(m.src.nbytes + m.dst.nbytes for m in moves)


def is_equal(moves: Sequence[Move]) -> bool:
    """Poison, launch, and compare every destination with the reference's, bit for bit."""
    for move in moves:
        move.dst.fill_(float("nan"))
    FusedCopy(moves).run()
    for move in moves:
        expected = torch.empty(move.dst.shape, dtype=move.dst.dtype, device="cuda")
        fused_copy_ref([Move(expected, move.src, move.shift, move.quant)])
        found = move.dst.contiguous().view(torch.uint8)
        if not torch.equal(found, expected.view(torch.uint8)):
            return False
    return True


def report(name: str, moves: Sequence[Move], copy: float) -> None:
    """Check, time and print one line."""
    if not is_equal(moves):
        print(f"{name:34} RED: not equal to the reference; no figure")
        return
    began = time.perf_counter()
    batch = FusedCopy(moves)
    torch.cuda.synchronize()
    planning = (time.perf_counter() - began) * 1e3
    for counting in (False, True):
        ms = milliseconds(partial(batch.run, count=counting))
        share = nbytes(moves) / ms / copy
        label = name + (" + counters" if counting else "")
        print(
            f"{label:34} {nbytes(moves) / 1e9:7.2f} GB {ms:8.3f} ms  {share:6.3f} of copy  "
            f"{len(batch.launches)} launches  tables {planning:6.1f} ms",
            flush=True,
        )


def main() -> None:
    """Run the three cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    spec = LLAMA_70B.replace(num_layers=parser.parse_args().layers)
    copy = copy_bandwidth()
    print(f"{machine()}\ncopy {copy / 1e6:.0f} GB/s")
    moves = rank_moves(spec, False)
    report("bf16 -> bf16", moves, copy)
    flipped = transposed(moves)
    del moves
    report("bf16 -> bf16, transposed", flipped, copy)
    del flipped
    torch.cuda.empty_cache()
    moves = rank_moves(spec, True)
    report("bf16 -> e4m3, given scales", moves, copy)
    flipped = [
        Move(m.dst, torch.randn(m.src.T.shape, device="cuda").to(m.src.dtype).T, 0.0, m.quant)
        for m in moves[: len(moves) // 2]
        if m.quant and m.src.ndim == 2
    ]
    report("bf16 -> e4m3, transposed", flipped, copy)


if __name__ == "__main__":
    main()
