"""From the `_extra_state` entries of a Megatron state dict to the scales of target modules."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .errors import ScaleError
from .hf_family import Family
from .scales import ModuleScales, ScaleTable
from .sources.megatron_names import unwrapped
from .sources.te_state import TeState, decode_te_state, join


@dataclass(frozen=True)
class Targets:
    """What a Megatron module becomes: modules of the unified checkpoint, parts of a family."""

    trtllm: tuple[str, ...]
    hf: tuple[str, ...]


MODULES = {
    "self_attention.linear_qkv": Targets(("attention.qkv",), ("q", "k", "v")),
    "self_attention.linear_proj": Targets(("attention.dense",), ("out",)),
    "mlp.linear_fc1": Targets(("mlp.fc", "mlp.gate"), ("gate", "up")),
    "mlp.linear_fc2": Targets(("mlp.proj",), ("down",)),
    "mlp.shared_experts.linear_fc1": Targets(
        ("mlp.shared_expert.fc", "mlp.shared_expert.gate"), ("shared.gate", "shared.up")
    ),
    "mlp.shared_experts.linear_fc2": Targets(("mlp.shared_expert.proj",), ("shared.down",)),
    "mlp.experts.linear_fc1": Targets(("mlp.fc",), ("expert.gate", "expert.up")),
    "mlp.experts.linear_fc2": Targets(("mlp.proj",), ("expert.down",)),
}
# The experts' modules bear their class's name in some checkpoints.
_SPELLINGS = {f"mlp.experts.experts.linear_fc{n}": f"mlp.experts.linear_fc{n}" for n in (1, 2)}

# Layer; module, with an expert of a SequentialMLP in it; the first expert that a piece is of.
_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+?)\._extra_state(\d*)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])")
# In a checkpoint with a key for each expert these are a grouped linear's pieces too, and a
# SequentialMLP's states can be taken for such: joined, they show one order or the other.
_PIECE = re.compile(r"mlp\.experts\.experts\.(\d+)\.(linear_fc[12])")


@dataclass(frozen=True, order=True)
class Linear:
    """One linear: its layer in the whole model, its key in `MODULES`, and its expert."""

    layer: int
    module: str
    expert: int = 0


@dataclass(frozen=True)
class TeScales:
    """dequant_scales by linear, and the states that hold none, with the reason."""

    linears: Mapping[Linear, ModuleScales]
    ignored: Mapping[str, str]

    def table(self, names: Callable[[Linear], Iterable[str]]) -> ScaleTable:
        """By the names of a target's modules (`unified_modules`, `family_modules`).

        Where several experts become one module, the largest of their scales stands for all: no
        value of the others then exceeds the format.
        """
        table: dict[str, ModuleScales] = {}
        for linear, scales in sorted(self.linears.items()):
            for name in names(linear):
                table[name] = scales.larger(table.get(name, scales))
        return ScaleTable(table, "Transformer Engine's state")


def unified_modules(linear: Linear) -> list[str]:
    """What a linear is called in TensorRT-LLM's unified checkpoint."""
    parts = MODULES[linear.module].trtllm
    return [f"transformer.layers.{linear.layer}.{part}" for part in parts]


def family_modules(family: Family, linear: Linear) -> list[str]:
    """What a linear is called in a family's Hugging Face layout."""
    found = (family.module(part, linear.layer, linear.expert) for part in MODULES[linear.module].hf)
    return [names[0] for names in found if names]


def from_te_states(states: Mapping[str, object], ep_size: int = 1) -> TeScales:
    """Decode every `_extra_state` entry of a state dict.

    Args:
        states: by Megatron-Core's names with the whole model's layer numbers; other entries of
            the state dict may be among them. `…_extra_state`, `…_extra_state1`, … are the pieces
            of one grouped linear's state: the number is a piece's first expert.
        ep_size: the expert-parallel ranks that each wrote an equal run of a grouped linear's
            experts: Megatron-Core cuts a rank's state up, not the whole model's.

    Raises:
        ScaleError: a scale cannot be used, or a piece is missing or there twice.
        SourceError: a state cannot be read (see `decode_te_state`).
    """
    pieces: dict[Linear, dict[int, TeState]] = {}
    ignored: dict[str, str] = {}
    for name, value in states.items():
        if "_extra_state" not in name:
            continue
        place = _place(name)
        state = None if place is None else decode_te_state(value, name)
        if place is None or state is None:
            ignored[name] = "no scales" if place else "not a linear whose weight is quantised"
            continue
        linear, piece = place
        if piece in pieces.setdefault(linear, {}):
            raise ScaleError(f"{name} is there twice, under different prefixes; keep one of them")
        pieces[linear][piece] = state
    linears: dict[Linear, ModuleScales] = {}
    for linear, found in pieces.items():
        linears |= _scales(linear, found, ep_size)
    return TeScales(linears, ignored)


def of_all_ranks(ranks: Sequence[TeScales]) -> TeScales:
    """One for all tensor-parallel ranks: where theirs differ, the larger, which saturates none."""
    linears: dict[Linear, ModuleScales] = {}
    ignored: dict[str, str] = {}
    for rank in ranks:
        ignored |= rank.ignored
        for linear, scales in rank.linears.items():
            linears[linear] = scales.larger(linears.get(linear, scales))
    return TeScales(linears, ignored)


def _place(name: str) -> tuple[Linear, int] | None:
    """The linear, and which piece of it, that a state is of; None if it is not of a linear."""
    match = _KEY.fullmatch(unwrapped(name))
    if match is None:
        return None
    layer, piece = int(match[1]), int(match[3] or 0)
    module = _SPELLINGS.get(match[2], match[2])
    if (expert := _EXPERT.fullmatch(module)) is not None:
        return Linear(layer, f"mlp.experts.{expert[2]}", int(expert[1])), piece
    if (part := _PIECE.fullmatch(module)) is not None:
        return Linear(layer, f"mlp.experts.{part[2]}"), int(part[1])
    return (Linear(layer, module), piece) if module in MODULES else None


def _scales(
    linear: Linear, pieces: Mapping[int, TeState], ep_size: int
) -> dict[Linear, ModuleScales]:
    """The scales of each gemm: one, or one for each expert."""
    ordered = [pieces[first] for first in sorted(pieces)]
    firsts = [0, *itertools.accumulate(state.gemms for state in ordered)]
    if sorted(pieces) != firsts[:-1]:
        raise ScaleError(
            f"{ordered[0].where}: of the grouped linear's states only the pieces "
            f"{sorted(pieces)} are there; copy the checkpoint completely"
        )
    every = [(state, gemm) for state in _joined(ordered, ep_size) for gemm in range(state.gemms)]
    return {
        Linear(linear.layer, linear.module, linear.expert + number): ModuleScales(
            weight=state.weight(gemm), input=state.input(gemm)
        )
        for number, (state, gemm) in enumerate(every)
    }


def _joined(pieces: Sequence[TeState], ep_size: int) -> Iterator[TeState]:
    """What each expert-parallel rank had: its experts' pieces together, or a whole state.

    Raises:
        ScaleError: the ranks cannot have had as many pieces each.
    """
    if len(pieces) == 1 or any(piece.gemms > 1 for piece in pieces):
        yield from pieces
        return
    if len(pieces) % ep_size:
        raise ScaleError(
            f"{pieces[0].where}: {len(pieces)} experts' states of {ep_size} expert-parallel ranks; "
            f"the run's expert_model_parallel_size does not fit the checkpoint"
        )
    count = len(pieces) // ep_size
    for start in range(0, len(pieces), count):
        run = pieces[start : start + count]
        yield join(run) if count > 1 else run[0]
