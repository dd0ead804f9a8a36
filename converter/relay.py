"""fp8 weights as training stores them, laid out anew: codes copied, scales taken along.

A target's rule is a view of the codes, so it says which source row and column each target row and
column is. Where all elements of a target's scale region come from one source region, that region's
scale is the target's, and nothing is quantised again. Anything else (another scheme, heads that
straddle blocks, fused weights with different scales) has to be dequantised first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .layout import leaves, pairs, shape_of
from .plan import on_meta, storage_key
from .sources.stored_fp8 import QUANTS, StoredFp8
from .targets.parts import TargetTensor

# Recipe.quant → the scheme of a stored weight that is the same.
SAME = {quant: scheme for scheme, quant in QUANTS.items()}
# Rows and columns of a scale's region; 0 is the whole matrix.
REGIONS = {"tensor": (0, 0), "block128": (128, 128), "mx32": (1, 32)}


@dataclass(frozen=True)
class _Source:
    """Where some rows of a target come from: rows and columns of one stored weight."""

    stored: StoredFp8
    target_rows: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def grid(self) -> torch.Tensor:
        """The stored scales, [blocks down, blocks across]."""
        scales = self.stored.scales
        return scales.view(1, 1) if self.stored.scheme == "tensor" else scales


def relay(
    targets: Iterable[TargetTensor], stored: Mapping[int, StoredFp8], quant: str
) -> tuple[dict[tuple[int, str], torch.Tensor], set[int]]:
    """Which codes can be copied, and their scales in the result.

    Args:
        targets: the linears that are quantised.
        stored: by the storage of their codes.
        quant: the recipe's.

    Returns:
        (rank, name) → scales [regions down, regions across], and the storages of the weights whose
        codes are copied: with one of a fused group that cannot be, none of it is.
    """
    scheme = SAME.get(quant)
    groups: dict[str, list[TargetTensor]] = {}
    for target in targets:
        if stored.keys() & sources_of(target):
            groups.setdefault(target.group, []).append(target)
    scales: dict[tuple[int, str], torch.Tensor] = {}
    copied: set[int] = set()
    others: set[int] = set()
    for members in groups.values():
        found = {(one.rank, one.name): _scales(one, stored, scheme) for one in members}
        kept = {key: value for key, value in found.items() if value is not None}
        sources = set().union(*map(sources_of, members))
        if len(kept) == len(found) and _agree(list(kept.values()), scheme):
            scales |= kept
            copied |= sources
        else:
            others |= sources
    return scales, copied - others


def sources_of(target: TargetTensor) -> set[int]:
    """The storages that a target is made of."""
    return {storage_key(leaf) for leaf in leaves(target.layout)}


def _agree(scales: list[torch.Tensor], scheme: str | None) -> bool:
    """Fused weights share a scale for a tensor; those of an expert differ from another's."""
    if scheme != "tensor" or len({one.numel() for one in scales}) > 1:
        return scheme != "tensor"
    return all(torch.equal(one, scales[0]) for one in scales)


def _scales(
    target: TargetTensor, stored: Mapping[int, StoredFp8], scheme: str | None
) -> torch.Tensor | None:
    """The scales of a target's regions; None if one of them straddles regions of the source."""
    keys = sources_of(target)
    if not keys <= stored.keys() or {stored[key].scheme for key in keys} != {scheme}:
        return None
    *_, rows, columns = shape_of(target.layout)
    sources = list(_sources(target, stored, columns))
    known = [one for one in sources if one is not None]
    if len(known) < len(sources) or not _same_columns(known):
        return None
    height, width = REGIONS[known[0].stored.scheme]
    down = _starts(known, height or rows)
    inner = known[0].columns
    across = _firsts(
        torch.arange(columns, device="cpu") // (width or columns), _blocks(inner, width)
    )
    if down is None or across is None:
        return None
    grids = torch.cat([one.grid for one in known])
    return grids[down.to(grids.device)][:, across.to(grids.device)].contiguous()


def _same_columns(sources: list[_Source]) -> bool:
    return all(torch.equal(one.columns, sources[0].columns) for one in sources)


def _blocks(places: torch.Tensor, size: int) -> torch.Tensor:
    """The number of each place's block; all are in one where the size is 0."""
    return places // size if size else torch.zeros_like(places)


def _starts(sources: list[_Source], height: int) -> torch.Tensor | None:
    """For each region of target rows, which row of all sources' scales is its own."""
    size = REGIONS[sources[0].stored.scheme][0]
    blocks, before = [], 0
    seen: dict[int, int] = {}
    for one in sources:
        # Views of one weight share its scales, or no region could hold two of them.
        first = seen.setdefault(id(one.stored), before)
        blocks.append(first + _blocks(one.rows, size))
        before += len(one.grid)
    places, order = torch.cat([one.target_rows for one in sources]).sort()
    return _firsts(places // height, torch.cat(blocks)[order])


def _firsts(regions: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor | None:
    """For each region in turn, the block that all of it comes from; None if it is not one."""
    _, number = torch.unique_consecutive(regions, return_inverse=True)
    firsts = blocks.new_zeros(int(number[-1]) + 1).scatter_(0, number, blocks)
    return firsts if torch.equal(firsts[number], blocks) else None


def _sources(
    target: TargetTensor, stored: Mapping[int, StoredFp8], columns: int
) -> Iterator[_Source | None]:
    elements = on_meta(shape_of(target.layout), dtype=torch.uint8)
    for dst, src in pairs(elements, target.layout):
        if dst.numel():
            yield _source(dst, src, stored[storage_key(src)], columns)


def _source(
    dst: torch.Tensor, src: torch.Tensor, stored: StoredFp8, columns: int
) -> _Source | None:
    """None where a target's row is not a part of one row of the source."""
    width = stored.codes.shape[1]
    axes = list(zip(dst.shape, dst.stride(), src.stride(), strict=True))
    down = [axis for axis in axes if axis[1] >= columns]
    across = [axis for axis in axes if axis[1] < columns]
    first_row, first_column = divmod(int(src.storage_offset()), width)
    rows = _offsets([(size, to) for size, _, to in down])
    inner = first_column + _offsets([(size, to) for size, _, to in across])
    if bool((rows % width).any()) or int(inner.max()) >= width or len(inner) != columns:
        return None
    places = _offsets([(size, at) for size, at, _ in down]) // columns
    target_rows = int(dst.storage_offset()) // columns + places
    return _Source(stored, target_rows, first_row + rows // width, inner)


def _offsets(axes: list[tuple[int, int]]) -> torch.Tensor:
    """Offsets of all combinations of (size, stride) axes, the last one fastest."""
    total = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in axes:
        total = (total[:, None] + torch.arange(size, device="cpu") * stride).view(-1)
    return total
