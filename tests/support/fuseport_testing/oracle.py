"""The unified checkpoint made the slow, plain way: chunk, reshape, cat, to.

Written from what TensorRT-LLM's loader means by each tensor, and from nothing else. Input is a
whole model's `state_dict()` (tp 1, pp 1) under Megatron's in-memory names; output is one dict of
contiguous tensors for each world rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .cases import Case

State = Mapping[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """The parallel sizes and one tensor-parallel rank in them."""

    tp: int
    rank: int
    moe_ep: int

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's share of dim 0."""
        return _share(tensor, self.tp, self.rank, 0)

    def columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's share of dim 1."""
        return _share(tensor, self.tp, self.rank, 1)


def oracle_trtllm(
    state: State,
    case: Case,
    tp: int,
    pp: int,
    dtype: torch.dtype,
    vocab_size: int,
    use_parallel_embedding: bool = False,
    embedding_sharding_dim: int = 0,
    moe_ep: int = 1,
) -> list[Tensors]:
    """The tensors of every world rank; rank = pp_rank * tp + tp_rank.

    All are of `dtype` but the routers, which stay fp32. A tied `lm_head` is left out where its
    stage has the embedding.
    """
    sharding = embedding_sharding_dim if use_parallel_embedding else None
    ranks = []
    for stage, layers in enumerate(_stages(case.layers, pp)):
        for rank in range(tp):
            place = Place(tp, rank, moe_ep)
            tensors = _layers(state, case, place, layers)
            if stage == 0:
                tensors |= _embeddings(state, case, place, vocab_size, sharding)
            if stage == pp - 1:
                tensors |= _head(state, case, place, vocab_size, shares_stage=pp == 1)
            ranks.append({name: _stored(name, value, dtype) for name, value in tensors.items()})
    return ranks


def _stored(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    final = torch.float32 if name.endswith("mlp.router.weight") else dtype
    # A clone, so that no two entries share storage: safetensors refuses those.
    return value.to(final).clone(memory_format=torch.contiguous_format)


def _stages(layers: int, pp: int) -> list[list[int]]:
    """Layer numbers of each stage: the first layers % pp stages get one more."""
    base, longer = divmod(layers, pp)
    stages, start = [], 0
    for stage in range(pp):
        size = base + (1 if stage < longer else 0)
        stages.append(list(range(start, start + size)))
        start += size
    return stages


def _share(tensor: torch.Tensor, parts: int, index: int, dim: int) -> torch.Tensor:
    assert tensor.shape[dim] % parts == 0, (tensor.shape, parts, dim)
    return tensor.chunk(parts, dim)[index]


def _vocabulary(table: torch.Tensor, vocab_size: int, parts: int) -> torch.Tensor:
    """The tokenizer's rows, padded with zero rows to a multiple of `parts`."""
    rows = table[:vocab_size]
    missing = -vocab_size % parts
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])


def _embeddings(
    state: State, case: Case, place: Place, vocab_size: int, sharding: int | None
) -> Tensors:
    words = state["embedding.word_embeddings.weight"]
    words = _vocabulary(words, vocab_size, place.tp if sharding == 0 else 1)
    tables = {"transformer.vocab_embedding.weight": words}
    if not case.rope:
        positions = state["embedding.position_embeddings.weight"]
        tables["transformer.position_embedding.weight"] = positions
    if sharding is None:
        return tables
    return {key: _share(table, place.tp, place.rank, sharding) for key, table in tables.items()}


def _head(state: State, case: Case, place: Place, vocab_size: int, shares_stage: bool) -> Tensors:
    tensors = _norm(state, case, "decoder.final_layernorm", "transformer.ln_f")
    if case.tied and shares_stage:
        return tensors
    source = "embedding.word_embeddings.weight" if case.tied else "output_layer.weight"
    head = _vocabulary(state[source], vocab_size, place.tp)
    return tensors | {"lm_head.weight": place.rows(head)}


def _norm(state: State, case: Case, source: str, target: str) -> Tensors:
    """A norm's weight, with the one that a zero-centred weight lacks, and its bias if any."""
    weight = state[f"{source}.weight"]
    tensors = {f"{target}.weight": weight.float() + 1 if case.zero_centered else weight}
    if f"{source}.bias" in state:
        tensors[f"{target}.bias"] = state[f"{source}.bias"]
    return tensors


def _layers(state: State, case: Case, place: Place, layers: list[int]) -> Tensors:
    tensors: Tensors = {}
    for local, layer in enumerate(layers):
        source, target = f"decoder.layers.{layer}.", f"transformer.layers.{local}."
        inner = {
            name.removeprefix(source): value
            for name, value in state.items()
            if name.startswith(source)
        }
        made = _norms(inner, case) | _attention(inner, case, place)
        made |= _experts(inner, case, place) if case.is_moe(layer) else _mlp(inner, case, place)
        tensors |= {target + name: value for name, value in made.items()}
    return tensors


def _norms(state: State, case: Case) -> Tensors:
    second = "mlp_layernorm" if case.architecture == "FalconForCausalLM" else "post_layernorm"
    tensors = _norm(state, case, "input_layernorm", "input_layernorm")
    tensors |= _norm(state, case, "pre_mlp_layernorm", second)
    if case.qk_layernorm:
        for part in ("q_layernorm", "k_layernorm"):
            tensors |= _norm(state, case, f"self_attention.{part}", f"attention.{part}")
    return tensors


def _attention(state: State, case: Case, place: Place) -> Tensors:
    tensors = {"attention.dense.weight": place.columns(state["self_attention.linear_proj.weight"])}
    for kind in ("weight", "bias"):
        qkv = state.get(f"self_attention.linear_qkv.{kind}")
        if qkv is not None:
            tensors[f"attention.qkv.{kind}"] = _qkv(qkv, case, place)
    # Added once after the sum over ranks, so every rank has it whole.
    if "self_attention.linear_proj.bias" in state:
        tensors["attention.dense.bias"] = state["self_attention.linear_proj.bias"]
    return tensors


def _qkv(qkv: torch.Tensor, case: Case, place: Place) -> torch.Tensor:
    """Rows [q…q k v, q…q k v, …] of the whole model → this rank's [all q; all k; all v]."""
    per_group = case.heads // case.query_groups
    groups = qkv.reshape(case.query_groups, per_group + 2, case.kv_channels, *qkv.shape[1:])
    query = groups[:, :per_group].reshape(case.heads, case.kv_channels, *qkv.shape[1:])
    parts = [place.rows(query)]
    for column in (per_group, per_group + 1):
        heads = groups[:, column]
        if place.tp > case.query_groups:
            heads = heads.repeat_interleave(place.tp // case.query_groups, 0)
        parts.append(place.rows(heads))
    return torch.cat([part.flatten(0, 1) for part in parts])


def _mlp(state: State, case: Case, place: Place, source: str = "mlp.") -> Tensors:
    """The activated half is `fc`, the other `gate`; each is split over the ranks by itself."""
    tensors: Tensors = {"proj.weight": place.columns(state[f"{source}linear_fc2.weight"])}
    if f"{source}linear_fc2.bias" in state:
        tensors["proj.bias"] = state[f"{source}linear_fc2.bias"]
    for kind in ("weight", "bias"):
        first = state.get(f"{source}linear_fc1.{kind}")
        if first is None:
            continue
        halves = first.chunk(2) if case.gated else (first,)
        for name, half in zip(("fc", "gate"), halves, strict=False):
            tensors[f"{name}.{kind}"] = place.rows(half)
    return {f"mlp.{name}": value for name, value in tensors.items()}


def _experts(state: State, case: Case, place: Place) -> Tensors:
    """Stacked experts: fc [E_local, 2F/moe_tp, H] = [up; gate], proj [E_local, H, F/moe_tp].

    Ranks run expert-parallel fastest: moe_tp_rank = tp_rank // moe_ep.
    """
    assert case.experts is not None
    moe_tp, shard = place.tp // place.moe_ep, place.rank // place.moe_ep
    local = case.experts // place.moe_ep
    first_expert = place.rank % place.moe_ep * local
    fc, proj = [], []
    for expert in range(first_expert, first_expert + local):
        prefix = f"mlp.experts.local_experts.{expert}."
        halves = state[f"{prefix}linear_fc1.weight"].chunk(2 if case.gated else 1)
        shards = [_share(half, moe_tp, shard, 0) for half in halves]
        fc.append(torch.cat(shards[::-1]))
        proj.append(_share(state[f"{prefix}linear_fc2.weight"], moe_tp, shard, 1))
    tensors = {
        "mlp.router.weight": state["mlp.router.weight"],
        "mlp.fc.weight": torch.stack(fc),
        "mlp.proj.weight": torch.stack(proj),
    }
    return tensors | _shared_expert(state, case, place)


def _shared_expert(state: State, case: Case, place: Place) -> Tensors:
    if case.shared_ffn is None:
        return {}
    made = _mlp(state, case, place, "mlp.shared_experts.")
    tensors = {name.replace("mlp.", "mlp.shared_expert."): value for name, value in made.items()}
    if case.shared_gate:
        tensors["mlp.shared_expert_gate.weight"] = state["mlp.shared_experts.gate_weight"]
    return tensors
