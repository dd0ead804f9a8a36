"""A Hugging Face checkpoint: safetensors files, an index, and `config.json`. Nothing is run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptSourceError, SourceError, UnsupportedOptionError
from ..hf_family import Family, Table, family_of
from .hf_config import extra_layers, facts_of
from .hf_quant import MODELOPT, other_scales, packing_of, paired
from .mxfp4 import is_mxfp4, unpacked
from .safetensors_file import names_of, read_header, read_object, regular_file
from .stored import Stored

CONFIG, GENERATION = "config.json", "generation_config.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Buffers that old versions of transformers saved.
_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$|\.self_attn\.masked_bias$")
_SCALES = re.compile(r"\.(weight_scale(_inv|_2)?|input_scale|qweight|qzeros|scales)$|_blocks$")


@dataclass(frozen=True)
class HfCheckpoint:
    """What a directory holds: tensors by name, the rest by name and reason, and its settings."""

    tensors: dict[str, Stored]
    ignored: dict[str, str]
    facts: dict[str, object]
    family: Family
    config: dict[str, object]
    generation: dict[str, object] | None


def is_hf(path: Path) -> bool:
    """True if a directory's files are those of a Hugging Face checkpoint."""
    return (path / CONFIG).is_file() and any((path / name).exists() for name in (WHOLE, INDEX))


def read_hf(path: Path, own: Table | None = None, mtp: str = "drop") -> HfCheckpoint:
    """Open a checkpoint; reads headers, no weights.

    Args:
        path: its directory.
        own: the contents of a table for its family; None takes the package's.
        mtp: "keep" or "drop" layers that predict further tokens.

    Raises:
        UnsafeSourceError, CorruptSourceError, SourceError: it cannot be read safely, or is damaged.
        UnsupportedOptionError: it is quantised in a way that is not read.
        RecipeError: no table for its family.
    """
    config = read_object(regular_file(path, CONFIG))
    family = family_of(str(config.get("model_type")), own)
    tensors = _indexed(path) if (path / INDEX).exists() else read_header(regular_file(path, WHOLE))
    if is_mxfp4(config, tensors):
        tensors = unpacked(tensors)
        packing = None
    else:
        packing = packing_of(path, config)
    if packing is not None:
        tensors = paired(tensors, packing)
    further = extra_layers(config, family)
    kept_layers = len(further) if mtp == "keep" and _holds(tensors, family, further) else 0
    dropped = further[kept_layers:]
    ignored = _ignored(tensors, family, dropped) | (other_scales(tensors) if packing else {})
    _refuse_scales(path, tensors.keys() - ignored.keys())
    kept = {name: one for name, one in tensors.items() if name not in ignored}
    generation = path / GENERATION
    return HfCheckpoint(
        tensors=kept,
        ignored=ignored,
        facts=facts_of(config, family) | {"further_layers": kept_layers},
        family=family,
        config=config,
        generation=read_object(generation) if generation.is_file() else None,
    )


def _indexed(path: Path) -> dict[str, Stored]:
    by_file: dict[str, set[str]] = defaultdict(set)
    for name, file in names_of(read_object(regular_file(path, INDEX)), path / INDEX):
        by_file[file].add(name)
    tensors: dict[str, Stored] = {}
    for file, names in by_file.items():
        found = read_header(regular_file(path, file))
        for name in sorted(names ^ set(found)):
            lacks, has = (file, INDEX) if name in names else (INDEX, file)
            raise CorruptSourceError(
                f"{path}: {lacks} lacks tensor {name!r}, which {has} has there; copy the "
                f"checkpoint completely"
            )
        tensors |= found
    if not tensors:
        raise SourceError(f"{path / INDEX} names no tensors")
    return tensors


def _refuse_scales(path: Path, names: Collection[str]) -> None:
    for name in sorted(names):
        if _SCALES.search(name):
            raise UnsupportedOptionError(
                f"{path}: tensor {name!r} belongs to a quantised weight, which neither "
                f"{CONFIG} nor {MODELOPT} explains, or which is not read in this format; give a "
                f"checkpoint in bf16, fp16 or fp32"
            )


def _prefix(family: Family, layer: int) -> str:
    return f"{family.module('input_norm', layer)[0].rpartition('.')[0]}."


def _holds(tensors: Mapping[str, Stored], family: Family, layers: range) -> bool:
    """Whether the layers are there: transformers may write their number without them."""
    prefixes = tuple(_prefix(family, layer) for layer in layers)
    return any(name.startswith(prefixes) for name in tensors)


def _ignored(tensors: Mapping[str, Stored], family: Family, dropped: range) -> dict[str, str]:
    reasons = {name: "computed from the configuration" for name in tensors if _BUFFER.search(name)}
    for layer in dropped:
        prefix = _prefix(family, layer)
        reason = f"layer {layer} predicts further tokens ({family.drops_extra_layers})"
        reasons |= {name: reason for name in tensors if name.startswith(prefix)}
    return reasons
