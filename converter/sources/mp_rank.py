"""Megatron's legacy checkpoints: a directory `mp_rank_TT[_PPP][_EEE]` for each rank.

A rank keeps its own shards, and numbers its layers from 0 in each pipeline chunk. Here they get
the numbers of the whole model, and virtual pipeline chunks (`model0`, `model1`, …) become one dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from ..errors import (
    CorruptSourceError,
    MissingTensorError,
    SourceError,
    UnsupportedOptionError,
)
from .checkpoint_dir import iteration_dir
from .megatron_names import layer_name, layer_of, unwrapped
from .merge_shards import Rank, Shards
from .pickled_fp8 import pickled_fp8, stubs
from .run_facts import namespace
from .safe_pickle import Inert
from .stored_fp8 import StoredFp8

_DIRECTORY = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_FILE = "model_optim_rng.pt"
_MODEL = re.compile(r"^model(\d*)$")
_STATE = "_extra_state"
_IGNORED = (
    (_STATE, "extra state of a module"),
    ("local_tokens_per_expert", "statistics of the router"),
)
_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "virtual_pipeline_model_parallel_size")
_REASONS = {
    "optimizer": "optimizer state",
    "rng_state": "random number generator state",
    "args": "the run's arguments",
}


@dataclass(frozen=True)
class MpRank:
    """All ranks of a legacy checkpoint.

    shards: (tp, pp, ep) rank → name → CPU tensor, mapped from its file; layer numbers are global.
    states: as shards, of Transformer Engine's module states.
    ignored: key → why it is no weight. facts: the run's arguments. origin: the directory.
    """

    shards: Shards
    states: dict[Rank, dict[str, object]]
    ignored: dict[str, str]
    facts: dict[str, object]
    origin: Path


# Tensors, fp8 weights and module states by name, in each chunk.
Entries = dict[str, object]
Chunks = dict[int, Entries]


def read_mp_rank(path: Path) -> MpRank:
    """Read all ranks of one iteration directory, or of the latest one below `path`.

    Raises:
        SourceError: there is no rank, a rank's directory is missing, or the format is older.
        UnsafeSourceError: a file names something other than tensors, arguments and plain data.
        CorruptSourceError: a file cannot be read.
        UnsupportedOptionError: virtual pipeline chunks without the arguments that order them.
        MissingTensorError: layers are missing.
    """
    root = iteration_dir(path)
    names = _rank_names(root)
    files = {name: root / name / _FILE for name in names}
    facts = namespace(_load(next(iter(files.values()))), "args")
    ranks = {_rank(name, facts): file for name, file in files.items()}
    if len(ranks) < len(files):
        raise SourceError(f"{root}: two directories stand for one rank: {', '.join(names)}")
    _check_grid(root, ranks)
    ignored: dict[str, str] = {}
    chunks = {rank: _chunks(file, ignored) for rank, file in sorted(ranks.items())}
    entries = _renumber(chunks, facts)
    states = {rank: _states(one) for rank, one in entries.items()}
    return MpRank(_weights(entries), states, ignored, facts, root)


def _states(entries: Mapping[str, object]) -> Entries:
    return {name: value for name, value in entries.items() if name.endswith(_STATE)}


def _weights(ranks: Mapping[Rank, Mapping[str, object]]) -> Shards:
    return {
        rank: {
            name: value
            for name, value in entries.items()
            if isinstance(value, (torch.Tensor, StoredFp8)) and not name.endswith(_STATE)
        }
        for rank, entries in ranks.items()
    }


def _rank_names(root: Path) -> list[str]:
    names = sorted(entry.name for entry in root.iterdir() if _DIRECTORY.fullmatch(entry.name))
    if not names:
        raise SourceError(f"{root}: no mp_rank_* directory; give the directory of one iteration")
    return names


def _rank(name: str, facts: Mapping[str, object]) -> Rank:
    """(tp, pp, ep) of a directory; a single second number is pp, unless the run had only ep."""
    match = _DIRECTORY.fullmatch(name)
    assert match is not None
    tp, second, third = (int(group) if group else 0 for group in match.groups())
    only_ep = _int(facts, "pipeline_model_parallel_size", 1) == 1 and (
        _int(facts, "expert_model_parallel_size", 1) > 1
    )
    return (tp, 0, second) if only_ep and match[3] is None else (tp, second, third)


def _int(facts: Mapping[str, object], name: str, default: int) -> int:
    value = facts.get(name)
    return value if type(value) is int else default


def _check_grid(root: Path, ranks: Iterable[Rank]) -> None:
    found = set(ranks)
    sizes = [max(axis) + 1 for axis in zip(*found, strict=True)]
    missing = sorted(set(product(*map(range, sizes))) - found)
    if missing:
        tp, pp, ep = missing[0]
        raise SourceError(
            f"{root}: the directory of tensor rank {tp}, pipeline rank {pp}, expert rank {ep} is "
            f"missing (tp × pp × ep is {' × '.join(map(str, sizes))}, {len(missing)} are missing): "
            "copy the checkpoint completely"
        )


def _load(file: Path) -> object:
    """Load with torch's weights-only loader; the known classes it does not allow become inert."""
    if not file.is_file():
        raise SourceError(f"{file}: missing; copy the checkpoint completely")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals(stubs(names, str(file))):  # type: ignore[arg-type]
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except SourceError:
        raise
    # A damaged file can raise nearly anything from the zip reader and from the unpickler.
    except Exception as error:
        raise CorruptSourceError(f"{file}: not a readable torch.save file ({error})") from error


def _chunks(file: Path, ignored: dict[str, str]) -> Chunks:
    """The model chunks of one rank's file by number, names without wrappers."""
    saved = _load(file)
    if not isinstance(saved, dict):
        raise SourceError(f"{file}: expected a dict with 'model', found {type(saved).__name__}")
    chunks: Chunks = {}
    for key, value in saved.items():
        match = _MODEL.match(str(key))
        if match is None:
            ignored[str(key)] = _REASONS.get(str(key), "training state")
        else:
            chunks[int(match[1] or 0)] = _entries(file, value, ignored)
    if sorted(chunks) != list(range(len(chunks))) or not chunks:
        raise SourceError(f"{file}: expected 'model' or 'model0', 'model1', …, found {list(saved)}")
    return chunks


def _entries(file: Path, model: object, ignored: dict[str, str]) -> Entries:
    if not isinstance(model, dict):
        raise SourceError(f"{file}: its model is a {type(model).__name__}, expected a dict")
    entries: Entries = {}
    for key, value in model.items():
        name = unwrapped(str(key))
        if reason := next((why for end, why in _IGNORED if name.endswith(end)), None):
            ignored[name] = reason
            if name.endswith(_STATE):
                entries[name] = value
        elif (weight := _weight(file, name, value)) is None:
            ignored[name] = "not a tensor"
        else:
            entries[name] = weight
    return entries


def _weight(file: Path, name: str, value: object) -> torch.Tensor | StoredFp8 | None:
    """A tensor, or an fp8 one's parts; None for what is no tensor."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise SourceError(f"{file}: {name!r} is {value.layout}; save it as a dense tensor")
        return value
    if isinstance(value, dict):
        raise SourceError(f"{file}: {name!r} is a nested dict: older than Megatron-Core")
    if value is None or isinstance(value, Inert):
        return None if value is None else pickled_fp8(value, name)
    raise SourceError(f"{file}: {name!r} is a {type(value).__name__}, not a tensor")


def _renumber(ranks: Mapping[Rank, Chunks], facts: Mapping[str, object]) -> dict[Rank, Entries]:
    """Give layers their global numbers: chunk 0 of all stages in turn, then chunk 1, …"""
    counts = {len(chunks) for chunks in ranks.values()}
    if len(counts) > 1:
        raise SourceError(f"ranks have different numbers of virtual pipeline chunks: {counts}")
    if max(counts) > 1 and not any(facts.get(name) for name in _VIRTUAL):
        raise UnsupportedOptionError(
            f"the checkpoint has virtual pipeline chunks, but its arguments name none of {_VIRTUAL}"
        )
    first = _first_layers(ranks, max(counts), facts)
    return {
        rank: _merged(
            rank, [_shifted(chunk, first[number, rank[1]]) for number, chunk in chunks.items()]
        )
        for rank, chunks in ranks.items()
    }


def _first_layers(
    ranks: Mapping[Rank, Chunks], count: int, facts: Mapping[str, object]
) -> dict[tuple[int, int], int]:
    """(chunk, pipeline rank) → the global number of its first layer, by counting layers."""
    first, total = {}, 0
    for number, stage in product(range(count), range(max(rank[1] for rank in ranks) + 1)):
        first[number, stage] = total
        sizes = {_num_layers(ranks[rank][number], rank) for rank in ranks if rank[1] == stage}
        if len(sizes) > 1:
            raise MissingTensorError(f"ranks of pipeline stage {stage} have {sizes} layers")
        total += sizes.pop()
    if total != _int(facts, "num_layers", total):
        raise MissingTensorError(
            f"the ranks hold {total} layers, the arguments say {facts['num_layers']}"
        )
    return first


def _num_layers(chunk: Mapping[str, object], rank: Rank) -> int:
    numbers = {place[0] for name in chunk if (place := layer_of(name))}
    if numbers != set(range(len(numbers))):
        raise MissingTensorError(f"rank {rank} has layers {sorted(numbers)}: one is missing")
    return len(numbers)


def _shifted(chunk: Mapping[str, object], first: int) -> Entries:
    def shifted(name: str) -> str:
        place = layer_of(name)
        return name if place is None else layer_name(place[0] + first, place[1])

    return {shifted(name): value for name, value in chunk.items()}


def _merged(rank: Rank, chunks: Iterable[Mapping[str, object]]) -> Entries:
    merged: Entries = {}
    for chunk in chunks:
        twice = merged.keys() & chunk.keys()
        if twice:
            raise SourceError(f"rank {rank}: {sorted(twice)} are in two virtual pipeline chunks")
        merged.update(chunk)
    return merged
