"""A whole fp8 weight from the shards of ranks that keep it in fp8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from ..errors import ScaleError, ShapeError, UnsupportedOptionError
from .dequantised import PACKINGS, Dequantised, Packing, dequantised
from .stored import Piece, Stored
from .stored_fp8 import QUANTS, StoredFp8

Rank = TypeVar("Rank")


def merge_fp8(
    name: str,
    by_rank: Mapping[Rank, torch.Tensor | StoredFp8],
    merge: Callable[[dict[Rank, torch.Tensor]], Stored],
) -> Dequantised:
    """Codes and scales of a weight, put together as `merge` puts tensors together.

    Raises:
        ShapeError: shards are stored in different ways.
        ScaleError: shards have a scale each, and these differ: no scheme has such.
        UnsupportedOptionError: a shard ends within a block.
    """
    shards = {rank: one for rank, one in by_rank.items() if isinstance(one, StoredFp8)}
    schemes = {one.scheme for one in shards.values()}
    if len(shards) < len(by_rank) or len(schemes) > 1:
        raise ShapeError(
            f"{name}: some ranks keep it in fp8 ({', '.join(sorted(schemes))}) and others not, or "
            f"otherwise; save the weights in bf16"
        )
    packing = PACKINGS[QUANTS[schemes.pop()]]
    codes = merge({rank: one.codes for rank, one in shards.items()})
    grids = {rank: one.scales for rank, one in shards.items()}
    scales = _grid(codes, packing, grids, merge) if any(packing.region) else _single(name, grids)
    return dequantised(name, codes, scales, packing)


def _single(name: str, scales: Mapping[Rank, torch.Tensor]) -> Stored:
    found = {float(one): one for one in scales.values()}
    if len(found) > 1:
        raise ScaleError(
            f"{name}: its shards are e4m3 with scales of their own, {min(found)} to {max(found)}; "
            f"no scheme has one for each shard: save the weights in bf16"
        )
    (one,) = found.values()
    return Stored(name, (1,), one.dtype, (Piece((0,), (1,), one),))


def _grid(
    codes: Stored,
    packing: Packing,
    scales: dict[Rank, torch.Tensor],
    merge: Callable[[dict[Rank, torch.Tensor]], Stored],
) -> Stored:
    """A scale's region may not lie in two shards, each of which has a scale for its part."""
    for piece in codes.pieces:
        if any(at % size for at, size in zip(piece.offset, packing.region, strict=True)):
            raise UnsupportedOptionError(
                f"{codes.name}: blocks of {' × '.join(map(str, packing.region))} end within a "
                f"shard that begins at {list(piece.offset)}: the ranks' scales there are of parts "
                f"of blocks; save the weights in bf16"
            )
    return merge(scales)
