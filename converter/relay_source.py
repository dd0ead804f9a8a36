"""fp8 weights in a Megatron checkpoint's files: which of them go over as codes.

The same decision as for weights in memory (`relay.py`), over meta twins. Of the files only the
scales are read for it: for MXFP8 a 32nd of the codes' bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch

from .claims import StoredClaims
from .layout import Shape
from .logical import Model
from .model import ModelSpec
from .plan import storage_key
from .quantise import to_quantise
from .recipe import Recipe
from .relay import SAME, relay
from .sources.dequantised import Dequantised, read_whole
from .sources.megatron import read_model
from .sources.source import Source
from .sources.stored import Piece, Stored
from .sources.stored_fp8 import StoredFp8
from .state import zero_row
from .targets.table import TARGETS
from .targets.target import Task

# Rank and name of a target's weight → its scales, on meta.
Relaid = Mapping[tuple[int, str], torch.Tensor]


def with_codes(
    source: Source, model: Model, spec: ModelSpec, recipe: Recipe
) -> tuple[Source, Model, Relaid]:
    """A Megatron source, and its model, in which weights whose codes can be copied are codes.

    The others stay values that are dequantised when they are read. Hugging Face sources are left
    as they are: their weights are not fused (`stored_codes.py`).

    Raises:
        FuseportError: as planning; or ScaleError: a stored scale is not finite and positive.
    """
    found = {key: one for key, one in source.stored.items() if isinstance(one, Dequantised)}
    if not found or source.kind == "hf":
        return source, model, {}
    weights = {key: _weight(one) for key, one in found.items()}
    task = Task(model, spec, recipe, zero_row(model, spec, torch.device("meta")))
    targets = to_quantise(list(TARGETS[recipe.target].rules(task)), recipe)
    scales, copied = relay(targets, weights, recipe.quant)
    twins = {key: torch.empty_like(one, device="meta") for key, one in scales.items()}
    places = {storage_key(twins[key]): _in_memory(key[1], one) for key, one in scales.items()}
    exchanged = _exchanged(source, {key: found[key].codes for key in copied}, places)
    return exchanged, exchanged.read(exchanged.tensors, spec), twins


def _in_memory(name: str, scales: torch.Tensor) -> Stored:
    shape = tuple(scales.shape)
    piece = Piece((0,) * len(shape), shape, scales)
    return Stored(f"(scales of {name})", shape, scales.dtype, (piece,))


def _weight(one: Dequantised) -> StoredFp8:
    scheme, shape = SAME[one.packing.quant], tuple(one.shape)
    codes = torch.empty(shape, dtype=one.codes.dtype, device="meta")
    return StoredFp8(codes, read_whole(one.scales).view(_grid(one, shape)), scheme)


def _grid(one: Dequantised, shape: Shape) -> Shape:
    return one.packing.grid(*shape) if any(one.packing.region) else (1,)


def _exchanged(source: Source, codes: Mapping[int, Stored], scales: Mapping[int, Stored]) -> Source:
    """The source with codes in the place of some values, and with the results' scales."""
    twins = {
        key: torch.empty(one.shape, dtype=one.dtype, device="meta") for key, one in codes.items()
    }
    left = {key: one for key, one in source.stored.items() if key not in codes}
    return dataclasses.replace(
        source,
        tensors={
            name: twins.get(storage_key(tensor), tensor) for name, tensor in source.tensors.items()
        },
        stored=left | {storage_key(twins[key]): one for key, one in codes.items()} | dict(scales),
        read=partial(read_model, claims_type=StoredClaims),
    )
