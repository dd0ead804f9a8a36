"""Moves for each kernel, dtype and family of shapes.

A family is a list of sources, as views that a model's conversion makes: whole matrices, slices of
columns, query groups, matrices that are stored transposed, many small experts, norms, odd sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch

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

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
# Scheme → how often the source is read.
QUANTISED = MappingProxyType({"given": 1, "tensor": 2, "row": 1, "block": 1, "mx": 1, "nv": 2})
CASTS = ((BF16, BF16), (BF16, FP16), (FP32, BF16), (FP32, FP32), (FP16, BF16))
# Moves that are compared with the reference, which is slow.
CHECKED = 6
POISON = 0xA5

Make = Callable[[Sequence[int]], torch.Tensor]


def _whole(make: Make, size: int) -> Iterator[torch.Tensor]:
    """Matrices of a dense layer."""
    for rows in (size, size // 2, size // 8):
        yield make((rows, size))


def _column_slices(make: Make, size: int) -> Iterator[torch.Tensor]:
    """What row-parallel weights are cut into for 8 ranks."""
    yield from make((size, size)).chunk(8, 1)


def _query_groups(make: Make, size: int) -> Iterator[torch.Tensor]:
    """The query heads of 8 groups of (4 queries, key, value)."""
    head = size // 64
    yield make((8, 6, head, size))[:, :4]


def _transposed(make: Make, size: int) -> Iterator[torch.Tensor]:
    """Matrices that are stored as [in, out]."""
    for rows in (size, size // 2):
        yield make((size, rows)).T


def _experts(make: Make, size: int) -> Iterator[torch.Tensor]:
    """Many small matrices."""
    for _ in range(16):
        yield make((size // 8, size // 2))
        yield make((size // 2, size // 8))


def _norms(make: Make, size: int) -> Iterator[torch.Tensor]:
    """Many vectors."""
    for _ in range(512):
        yield make((size,))


def _odd(make: Make, size: int) -> Iterator[torch.Tensor]:
    """Sizes that no vector divides."""
    yield make((size // 2 + 1, size // 2 - 25))


FAMILIES: Mapping[str, Callable[[Make, int], Iterator[torch.Tensor]]] = MappingProxyType(
    {
        "whole": _whole,
        "column slices": _column_slices,
        "query groups": _query_groups,
        "transposed": _transposed,
        "experts": _experts,
        "norms": _norms,
        "odd": _odd,
    }
)


def sources(
    family: str, dtype: torch.dtype, device: torch.device, size: int, times: int = 1
) -> list[torch.Tensor]:
    """A family's views of random memory, several times over."""

    def make(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    return [view for _ in range(times) for view in FAMILIES[family](make, size)]


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


def cast(dtype: torch.dtype, source: torch.Tensor) -> Move:
    """A source into poisoned memory of another dtype, or of its own."""
    dst = torch.empty(source.shape, dtype=dtype, device=source.device)
    dst.view(-1).view(torch.uint8).fill_(POISON)
    return Move(dst, source)


def quantised(name: str, source: torch.Tensor) -> Move:
    """A source into poisoned memory for codes."""
    *outer, columns = source.shape
    rows = source.numel() // columns
    width = columns // 2 if name == "nv" else columns
    codes = torch.full((*outer, width), POISON, dtype=torch.uint8, device=source.device)
    quant = scheme(name, rows, columns, source.device)
    return Move(codes if name == "nv" else codes.view(E4M3), source, 0.0, quant)


def written(move: Move) -> list[torch.Tensor]:
    """What a move fills, as bytes: its elements and its scales."""
    quant = move.quant
    fields = (
        [] if quant is None else [getattr(quant, one.name) for one in dataclasses.fields(quant)]
    )
    scales = [value for value in fields if isinstance(value, torch.Tensor)]
    return [tensor.reshape(-1).view(torch.uint8) for tensor in (move.dst, *scales)]


def is_equal(make: Callable[[torch.Tensor], Move], moves: Sequence[Move]) -> bool:
    """The first moves, which have run, against the reference."""
    for move in moves[:CHECKED]:
        expected = make(move.src)
        fused_copy_ref([expected])
        pairs = zip(written(move), written(expected), strict=True)
        if not all(torch.equal(found, other) for found, other in pairs):
            return False
    return True


def nbytes(moves: Sequence[Move], reads: int = 1) -> int:
    """Bytes that must be read and written."""
    return sum(reads * m.src.nbytes + sum(part.numel() for part in written(m)) for m in moves)
