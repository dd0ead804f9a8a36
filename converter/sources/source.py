"""An opened source: its tensors by layer as meta views, and where their bytes are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..errors import ShapeError, SourceError
from ..hf_family import Table
from ..logical import Model
from ..model import ModelSpec
from ..plan import storage_key
from ..targets.target import Origin
from .hf import is_hf, read_hf
from .hf_model import read_hf_model
from .megatron import read_model
from .megatron_names import FURTHER
from .merge_shards import merge_shards, merge_states
from .mp_rank import read_mp_rank
from .mxfp4 import Mxfp4
from .stored import Stored
from .torch_dist import read_torch_dist

# A stacked key has no number behind "layers."; its first axis counts the layers.
STACKED = re.compile(r"^(decoder\.layers\.)(?!\d)(.+)$")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    `tensors` are meta views by Megatron-Core's in-memory names, one per layer; `stored` maps
    their storages to what has to be read. `facts` are as found; `ignored` says why a key is not
    a weight.

    `read` turns tensors into logical views; `embedding` and `output` are the keys of the two
    tensors that may have rows to drop. `states` reads Transformer Engine's module states, by
    Megatron-Core's in-memory names, of each tensor-parallel rank whose states are kept.
    """

    origin: Path
    kind: str
    tensors: Mapping[str, torch.Tensor]
    stored: Mapping[int, Stored]
    facts: Mapping[str, object]
    ignored: Mapping[str, str]
    read: Callable[[Mapping[str, torch.Tensor], ModelSpec], Model] = read_model
    embedding: str = "embedding.word_embeddings.weight"
    output: str = "output_layer.weight"
    handed_on: Origin = field(default_factory=Origin)
    states: Callable[[], Sequence[Mapping[str, object]]] = tuple

    @property
    def ep_size(self) -> int:
        """The expert-parallel ranks of the run."""
        size = self.facts.get("expert_model_parallel_size")
        return size if type(size) is int and size > 0 else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(stored.nbytes for stored in self.stored.values())


def open_source(
    path: str | Path,
    facts: Mapping[str, object] | None = None,
    family: Table | None = None,
    mtp: str = "drop",
) -> Source:
    """Open a checkpoint of Megatron (torch_dist, `mp_rank_*`) or Hugging Face; reads no weights.

    `facts` replace the source's own where shards have to be put together; `family` is the contents
    of a table for a Hugging Face source's family, and `mtp` says whether its layers that predict
    further tokens are to "keep" or to "drop".

    Raises:
        SourceError: it is neither, or cannot be read safely.
    """
    try:
        return _open(Path(path), facts or {}, family, mtp)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path, facts: Mapping[str, object], family: Table | None, mtp: str) -> Source:
    if not path.is_dir():
        raise SourceError(
            f"{path} is not a directory; expected a checkpoint of Megatron or Hugging Face"
        )
    if is_hf(path):
        return _open_hf(path, family, mtp)
    if _is_legacy(path):
        legacy = read_mp_rank(path)
        all_facts = {**legacy.facts, **facts}
        stored = merge_shards(legacy.shards, all_facts)
        source = make_source(path, "mp_rank", stored, legacy.facts, legacy.ignored)
        states = partial(merge_states, legacy.states, all_facts)
        return _with_further(dataclasses.replace(source, states=states), mtp)
    opened = read_torch_dist(path)
    source = make_source(opened.origin, "torch_dist", opened.tensors, opened.facts, opened.ignored)
    source = dataclasses.replace(source, states=lambda: (opened.states(),))
    return _with_further(source, mtp)


def _with_further(source: Source, mtp: str) -> Source:
    """A Megatron source with, or without, the layers that it says predict further tokens."""
    if mtp == "keep" or not source.facts.get("mtp_num_layers"):
        return source
    extra = [name for name in source.tensors if name.startswith(FURTHER)]
    facts = {name: value for name, value in source.facts.items() if not name.startswith("mtp_")}
    dropped = {storage_key(source.tensors[name]) for name in extra}
    return dataclasses.replace(
        source,
        tensors={name: one for name, one in source.tensors.items() if not name.startswith(FURTHER)},
        stored={key: one for key, one in source.stored.items() if key not in dropped},
        facts=facts,
        ignored={**source.ignored, **dict.fromkeys(extra, "predicts further tokens")},
    )


def _open_hf(path: Path, table: Table | None, mtp: str) -> Source:
    found = read_hf(path, table, mtp)
    family = found.family
    source = make_source(path, "hf", found.tensors, found.facts, found.ignored)
    return dataclasses.replace(
        source,
        read=partial(read_hf_model, family=family),
        embedding=family.names("embedding")[0],
        output=family.names("output")[0],
        handed_on=Origin(family, found.config, found.generation),
    )


def _is_legacy(path: Path) -> bool:
    """True if there is a rank's directory, here or one level down."""
    return any(True for pattern in ("mp_rank_*", "*/mp_rank_*") for _ in path.glob(pattern))


def make_source(
    origin: Path,
    kind: str,
    stored: Mapping[str, Stored],
    facts: Mapping[str, object],
    ignored: Mapping[str, str],
) -> Source:
    """Give every stored tensor a meta twin, and take stacks apart by layer."""
    tensors: dict[str, torch.Tensor] = {}
    by_storage: dict[int, Stored] = {}
    for name, one in stored.items():
        twin = torch.empty(one.shape, dtype=one.dtype, device="meta")
        by_storage[storage_key(twin)] = one
        # A model keeps what lies in blocks along its rows as columns.
        tensors.update(by_layer(name, twin.mT if isinstance(one, Mxfp4) else twin))
    return Source(origin, kind, tensors, by_storage, facts, ignored)


def by_layer(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A stacked tensor as one view a layer, by the layers' names; another as it is."""
    match = STACKED.match(name)
    if match is None:
        return {name: tensor}
    if not tensor.ndim:
        raise ShapeError(f"{name} has shape [], but its first axis must count the layers")
    prefix, rest = match.groups()
    return {f"{prefix}{layer}.{rest}": part for layer, part in enumerate(tensor.unbind(0))}
