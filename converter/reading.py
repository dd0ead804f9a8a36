"""Facts that are read from several of a source's names together."""

from __future__ import annotations

from collections.abc import Mapping

from .fact_names import LATENT, NAMES, SPECIAL
from .facts import (
    LAYERS,
    SIZE,
    SIZE_OR_NONE,
    activation_name,
    as_bools,
    first,
    flag,
    layer_pattern,
    need,
)
from .yarn import Yarn


def heads(facts: Mapping[str, object]) -> dict[str, object]:
    """Sizes of heads, and the MLP's width."""
    count = need(facts, "num_attention_heads", SIZE)
    hidden = need(facts, "hidden_size", SIZE)
    groups = first(facts, NAMES["num_query_groups"])
    if groups is None or flag(facts, ("group_query_attention",)) is False:
        groups = 1 if flag(facts, ("multi_query_mode",)) else count
    ffn = first(facts, NAMES["ffn_hidden_size"]) or 4 * hidden
    channels = first(facts, NAMES["kv_channels"])
    channels = hidden // count if channels is None else channels
    return {"num_query_groups": groups, "kv_channels": channels, "ffn_hidden_size": ffn}


def activation(facts: Mapping[str, object]) -> dict[str, object]:
    """Megatron's default normalisation and activation are LayerNorm and gelu."""
    gated = flag(facts, NAMES["gated_linear_unit"]) or flag(facts, ("quick_geglu",)) or False
    normalization = first(facts, NAMES["normalization"]) or "LayerNorm"
    position = first(facts, NAMES["position_embedding_type"]) or "learned_absolute"
    return {
        "activation_func": activation_name(facts),
        "gated_linear_unit": gated,
        "normalization": normalization,
        "position_embedding_type": position,
    }


def experts(facts: Mapping[str, object]) -> dict[str, object]:
    """Which layers have experts, and their width."""
    given = facts.get("moe_layers")
    chosen = as_bools(given) if given else ()
    count = first(facts, NAMES["num_moe_experts"]) or 0
    SIZE_OR_NONE.check("num_moe_experts", count)
    if not count:
        return {"num_moe_experts": 0}
    ffn = first(facts, NAMES["moe_ffn_hidden_size"]) or heads(facts)["ffn_hidden_size"]
    layers = layer_pattern(facts.get("moe_layer_freq", 1), need(facts, "num_layers", LAYERS))
    topk = first(facts, NAMES["moe_router_topk"])
    return {
        "moe_ffn_hidden_size": ffn,
        "moe_layers": chosen or layers,
        # Megatron's default.
        "moe_router_topk": 2 if topk is None else topk,
    }


def rope_scaling(facts: Mapping[str, object]) -> dict[str, object]:
    """Llama 3.1's scaling; Megatron keeps a factor (8 by default) whether it is used or not."""
    factor = first(facts, NAMES["rope_scaling_factor"])
    used = flag(facts, ("use_rope_scaling", "rope_scaling"))
    return {"rope_scaling_factor": (8.0 if factor is None else factor) if used else None}


def tied(facts: Mapping[str, object]) -> dict[str, object]:
    """Whether embedding and output are one."""
    untied = flag(facts, ("untie_embeddings_and_output_weights",))
    return {} if untied is None else {"share_embeddings_and_output_weights": not untied}


def latent(facts: Mapping[str, object]) -> dict[str, object]:
    """Multi-latent attention's sizes; its norms are between its projections, not on heads."""
    if not flag(facts, ("multi_latent_attention",)):
        return {}
    rotated = need(facts, "qk_pos_emb_head_dim", SIZE)
    found = {name: facts[name] for name in LATENT if facts.get(name) is not None}
    alike = {"num_query_groups": need(facts, "num_attention_heads", SIZE), "kv_channels": rotated}
    return {**found, **alike, "qk_layernorm": False}


def router(facts: Mapping[str, object]) -> dict[str, object]:
    """How experts are chosen; one group is none."""
    groups = first(facts, NAMES["moe_router_num_groups"]) or 0
    return {"moe_router_num_groups": 0, "moe_router_group_topk": 0} if groups in (0, 1) else {}


def positions(facts: Mapping[str, object]) -> dict[str, object]:
    """YaRN, as Megatron's arguments or a source's reader say it."""
    given = facts.get("yarn")
    if isinstance(given, Mapping):
        given = Yarn.read(given)
    if given is None and flag(facts, ("multi_latent_attention",)):
        # Megatron-Core's own default.
        given = Yarn.read(facts) if facts.get("rope_type", "yarn") in (None, "yarn") else None
    return {"yarn": given}


def special(facts: Mapping[str, object], values: Mapping[str, object]) -> tuple[str, ...]:
    """The options that only targets with a config of the family's own can say."""
    named = {name for name, usual in SPECIAL.items() if facts.get(name) not in usual}
    scaled = {"rope_scaling"} if values.get("yarn") else set()
    return tuple(sorted({*(facts.get("special") or ()), *named, *scaled}))  # type: ignore[misc]
