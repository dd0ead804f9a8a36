"""Quantising one rank's weights, every scheme: checked bit for bit, then timed beside a copy.

    python -m benchmarks.bench_quant [--layers 80] [--schemes given,row,...]

Two sets of bf16 matrices on the GPU: a tensor-parallel rank of a Llama-3-70B (tp 8), and an
expert-parallel rank of a Qwen3-235B-A22B (ep 8: 16 experts of 1536 × 4096 in each layer). Prints
the bytes that must move (a second read of the source included where the scheme needs one), the
time, the share of the copy bandwidth measured in the same run, and what counting costs. A red
check prints no figure.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch

from fuseport.kernels.fused_copy import FusedCopy
from fuseport.kernels.move import Move
from fuseport.kernels.quant import (
    BlockScale,
    GivenScale,
    MxScale,
    NvScale,
    RowScale,
    Scheme,
    TensorScale,
)
from fuseport.kernels.reference import fused_copy_ref

from .bench_rank import TP, shard
from .measure import copy_bandwidth, machine, milliseconds
from .models import LLAMA_70B

E4M3 = torch.float8_e4m3fn
# Matrices checked of each set: the reference in plain torch is slow.
CHECKED = 8


def dense_rank(layers: int, device: str = "cuda") -> list[torch.Tensor]:
    """The linear weights of the Llama's rank."""
    tensors = shard(LLAMA_70B.replace(num_layers=layers), TP)
    return [tensor.to(device) for tensor in tensors.values() if tensor.ndim == 2]


def moe_rank(layers: int, device: str = "cuda") -> list[torch.Tensor]:
    """The experts' weights of the Qwen's rank: gate, up and down of each."""
    shapes = [(1536, 4096), (1536, 4096), (4096, 1536)]
    return [
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for _ in range(layers * 16)
        for shape in shapes
    ]


def scheme(name: str, rows: int, columns: int, device: torch.device) -> Scheme:
    """A scheme with fresh tensors for its scales."""
    empty = partial(torch.empty, device=device)
    makers: dict[str, Callable[[], Scheme]] = {
        "given": lambda: GivenScale(50.0),
        "tensor": lambda: TensorScale(empty(1), empty(1)),
        "row": lambda: RowScale(empty(rows), columns),
        "block": lambda: BlockScale(empty(-(-rows // 128), -(-columns // 128)), columns),
        "mx": lambda: MxScale(empty(rows, columns // 32, dtype=torch.uint8), columns),
        "nv": lambda: NvScale(
            empty(rows, columns // 16, dtype=torch.uint8).view(E4M3),
            columns, second_scale=empty(1), amax=empty(1),
        ),
    }  # fmt: skip
    return makers[name]()


SCHEMES = ("given", "tensor", "row", "block", "mx", "nv")


def move(name: str, source: torch.Tensor) -> Move:
    """One matrix into poisoned memory."""
    rows, columns = source.shape
    width = columns // 2 if name == "nv" else columns
    codes = torch.full((rows, width), 0xA5, dtype=torch.uint8, device=source.device)
    quant = scheme(name, rows, columns, source.device)
    return Move(codes if name == "nv" else codes.view(E4M3), source, 0.0, quant)


def written(one: Move) -> list[torch.Tensor]:
    """What a move fills, as bytes: its codes and its scales."""
    fields = [getattr(one.quant, field.name) for field in dataclasses.fields(one.quant)]  # type: ignore[arg-type]
    scales = [value for value in fields if isinstance(value, torch.Tensor)]
    return [tensor.reshape(-1).view(torch.uint8) for tensor in (one.dst, *scales)]


def is_equal(name: str, moves: Sequence[Move]) -> bool:
    """The first matrices that were filled, against the reference."""
    for one in moves[:CHECKED]:
        expected = move(name, one.src)
        fused_copy_ref([expected])
        pairs = zip(written(one), written(expected), strict=True)
        if not all(torch.equal(found, other) for found, other in pairs):
            return False
    return True


def nbytes(name: str, moves: Sequence[Move]) -> int:
    """Bytes that must be read and written."""
    reads = 2 if name in ("tensor", "nv") else 1
    return sum(reads * m.src.nbytes + sum(part.numel() for part in written(m)) for m in moves)


def report(label: str, name: str, sources: Sequence[torch.Tensor], copy: float) -> None:
    """Check, time and print one line."""
    moves = [move(name, source) for source in sources]
    batch = FusedCopy(moves)
    batch.run(count=True)
    if not is_equal(name, moves):
        print(f"{label} {name:7} RED: not equal to the reference; no figure", flush=True)
        return
    plain, counting = milliseconds(batch.run), milliseconds(partial(batch.run, count=True))
    size = nbytes(name, moves)
    print(
        f"{label} {name:7} {size / 1e9:7.2f} GB {plain:8.3f} ms  "
        f"{size / plain / copy:6.3f} of copy  "
        f"counting {counting / plain - 1:+.3f}  {len(batch.launches)} kinds",
        flush=True,
    )


def main() -> None:
    """Both sets, every scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    given = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{machine()}\ncopy {copy / 1e6:.0f} GB/s")
    sets = {"dense": dense_rank(given.layers), "moe": moe_rank(given.layers // 2)}
    for label, sources in sets.items():
        for name in given.schemes.split(","):
            report(f"{label:6}", name, sources, copy)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
