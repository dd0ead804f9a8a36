"""A source's codes and scales as they are: for a target of the same scheme, which keeps every bit.

A quantised weight has two meta twins beside the one that stands for its fp32 values: of the codes
and of the scales. A plan moves either the values, or codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .layout import Flat, Layout, shape_of
from .plan import Planned, storage_key
from .sources.dequantised import Dequantised
from .sources.mxfp4 import Mxfp4
from .sources.stored import Stored


@dataclass(frozen=True)
class Codes:
    """Twins of e4m3 codes [o, i] and of their scales, and the scheme by `Recipe.quant`'s name."""

    quant: str
    codes: torch.Tensor
    scales: torch.Tensor


# Storage of a weight's values → its codes.
Kept = Mapping[int, Codes]


def twins_of(stored: Mapping[int, Stored]) -> tuple[Kept, dict[int, Stored]]:
    """The codes of quantised weights, and where the bytes of codes and scales are."""
    kept: dict[int, Codes] = {}
    places: dict[int, Stored] = {}
    for key, one in stored.items():
        if isinstance(one, Dequantised):
            parts = (one.codes, one.scales)
            twins = [torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts]
            places.update(zip(map(storage_key, twins), parts, strict=True))
            kept[key] = Codes(one.packing.quant, *twins)
    return kept, places


def same_scheme(layout: Layout, quant: str, kept: Kept) -> Codes | None:
    """The codes of a target tensor that is one whole weight of the source, if the schemes agree."""
    if not isinstance(layout, (torch.Tensor, Flat)):
        return None
    view = layout if isinstance(layout, torch.Tensor) else layout.view
    codes = kept.get(storage_key(view))
    if codes is None or codes.quant != quant or shape_of(layout) != tuple(codes.codes.shape):
        return None
    return codes if view.is_contiguous() else None


def without_unused(
    stored: Mapping[int, Stored], planned: Iterable[Planned], kept: Kept
) -> dict[int, Stored]:
    """What is left of `stored` when of values and codes only those stay that a plan moves."""
    used = {storage_key(move.src) for one in planned for move in one.moves}
    spare = set()
    for key, codes in kept.items():
        own = {storage_key(codes.codes), storage_key(codes.scales)}
        spare |= {key} if own & used else own
    return {key: one for key, one in stored.items() if key not in spare - used}


def tally(stored: Mapping[int, Stored]) -> dict[str, int]:
    """Of a plan's quantised source weights, how many are kept as they are and how many are not."""
    kept = sum(one.dtype is torch.float8_e4m3fn for one in stored.values())
    changed = sum(isinstance(one, (Dequantised, Mxfp4)) for one in stored.values())
    return {"kept": kept, "dequantised": changed} if kept or changed else {}
