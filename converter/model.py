"""The facts of a model: what its weights mean, in Megatron-Core's own terms.

Facts come from a TransformerConfig, from the arguments in a checkpoint, from a `run_config.yaml`,
or from the user; they name the same things differently. `NAMES` lists every accepted name of each
field, and `ModelSpec.from_facts` reads any of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UnsupportedOptionError
from .facts import activation_name, as_bools, as_int, first, layer_pattern

# Field → the names under which sources give it, best first.
NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_layers",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "ffn_hidden_size": ("ffn_hidden_size",),
    "num_query_groups": ("num_query_groups",),
    "kv_channels": ("kv_channels", "head_size"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "max_sequence_length", "seq_length"),
    "model_type": ("model_type",),
    "normalization": ("normalization",),
    "layernorm_zero_centered_gamma": ("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
    "layernorm_epsilon": ("layernorm_epsilon", "norm_epsilon"),
    "gated_linear_unit": ("gated_linear_unit", "swiglu"),
    "add_bias_linear": ("add_bias_linear",),
    "add_qkv_bias": ("add_qkv_bias",),
    "qk_layernorm": ("qk_layernorm",),
    "position_embedding_type": ("position_embedding_type",),
    "rotary_base": ("rotary_base",),
    "rotary_percent": ("rotary_percent", "rotary_percentage"),
    "share_embeddings_and_output_weights": ("share_embeddings_and_output_weights",),
    "num_moe_experts": ("num_moe_experts", "num_experts"),
    "moe_ffn_hidden_size": ("moe_ffn_hidden_size",),
    "moe_router_topk": ("moe_router_topk",),
    "moe_shared_expert_intermediate_size": ("moe_shared_expert_intermediate_size",),
}

# Options that change what the weights mean, and that no rule here handles: refused by name.
REFUSED = {
    "attention_output_gate": "linear_qkv holds gate rows",
    "moe_mlp_glu_interleave_size": "gate and up rows are interleaved",
    "multi_latent_attention": "attention has low-rank projections",
    "mtp_num_layers": "the model has multi-token-prediction layers",
    "experimental_attention_variant": "attention is not softmax attention",
    "linear_attention_freq": "attention is not softmax attention",
}


@dataclass(frozen=True)
class Block:
    """What one layer of a heterogeneous model (Nemotron-NAS) holds.

    `attention` and `mlp` are "full", "linear" (replaced by one matrix) or "none" (left out).
    """

    attention: str
    num_query_groups: int
    mlp: str
    ffn_hidden_size: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's facts. Sizes count elements; names are Megatron-Core's.

    `kv_channels` is the size of one head. `vocab_size` is the tokenizer's, without padding;
    `None` keeps every row of the source's embedding. `moe_layers` says for each layer whether it
    is a mixture of experts. `blocks` describes each layer of a heterogeneous model.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    model_type: str = "llama"
    normalization: str = "RMSNorm"
    layernorm_zero_centered_gamma: bool = False
    layernorm_epsilon: float = 1e-5
    gated_linear_unit: bool = True
    activation_func: str = "silu"
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    share_embeddings_and_output_weights: bool = False
    num_moe_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_router_topk: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_layers: tuple[bool, ...] = ()
    blocks: tuple[Block, ...] = ()

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    def is_moe(self, layer: int) -> bool:
        """True if layer `layer` (counted from 0 over the whole model) has experts."""
        if not self.num_moe_experts:
            return False
        return self.moe_layers[layer] if self.moe_layers else True

    def block(self, layer: int) -> Block:
        """What layer `layer` holds; the same for every layer unless `blocks` says otherwise."""
        if self.blocks:
            return self.blocks[layer]
        return Block("full", self.num_query_groups, "full", self.ffn_hidden_size)

    @classmethod
    def from_facts(cls, facts: Mapping[str, object], **overrides: object) -> ModelSpec:
        """Read facts from any source's mapping; `overrides` (by field name) win.

        Raises:
            ModelError: a fact without which nothing can be done is missing or makes no sense.
            UnsupportedOptionError: an option that changes the weights' meaning is set.
        """
        merged = {**facts, **{key: value for key, value in overrides.items() if value is not None}}
        refuse(merged)
        values = {field: first(merged, names) for field, names in NAMES.items()}
        values = {field: value for field, value in values.items() if value is not None}
        values |= _heads(merged) | _activation(merged) | _experts(merged) | _tied(merged)
        values |= {"blocks": _blocks(merged)}
        if "model_type" not in values:
            values["model_type"] = infer_model_type(values)
        return cls(**_typed(values))  # type: ignore[arg-type]

    def replace(self, **changes: object) -> ModelSpec:
        """A copy with some facts changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def refuse(facts: Mapping[str, object]) -> None:
    """Raise UnsupportedOptionError if an option is set that no rule handles."""
    for option, meaning in REFUSED.items():
        if facts.get(option):
            raise UnsupportedOptionError(
                f"the model sets {option}={facts[option]!r} ({meaning}), which fuseport does not "
                f"convert; export a model without it"
            )


def infer_model_type(facts: Mapping[str, object]) -> str:
    """The family whose target names and config a model takes, when nobody said it."""
    if facts.get("num_moe_experts"):
        shared = facts.get("moe_shared_expert_intermediate_size")
        return "qwen2_moe" if shared else "qwen3_moe" if facts.get("qk_layernorm") else "mixtral"
    if facts.get("normalization", "LayerNorm") == "LayerNorm":
        return "nemotron" if facts.get("activation_func") == "squared_relu" else "gpt"
    if facts.get("blocks"):
        return "nemotron_nas"
    if facts.get("qk_layernorm"):
        return "qwen3"
    if facts.get("add_qkv_bias"):
        return "qwen2"
    return "gemma" if facts.get("activation_func") == "gelu" else "llama"


def _heads(facts: Mapping[str, object]) -> dict[str, object]:
    heads = as_int(facts, "num_attention_heads")
    hidden = as_int(facts, "hidden_size")
    groups = first(facts, NAMES["num_query_groups"])
    if not groups or facts.get("group_query_attention") is False:
        groups = 1 if facts.get("multi_query_mode") else heads
    ffn = first(facts, NAMES["ffn_hidden_size"]) or 4 * hidden
    channels = first(facts, NAMES["kv_channels"]) or hidden // heads
    return {"num_query_groups": groups, "kv_channels": channels, "ffn_hidden_size": ffn}


def _activation(facts: Mapping[str, object]) -> dict[str, object]:
    """Megatron's default normalisation and activation are LayerNorm and gelu."""
    gated = bool(first(facts, NAMES["gated_linear_unit"]) or facts.get("quick_geglu"))
    normalization = first(facts, NAMES["normalization"]) or "LayerNorm"
    position = first(facts, NAMES["position_embedding_type"]) or "learned_absolute"
    return {
        "activation_func": activation_name(facts),
        "gated_linear_unit": gated,
        "normalization": normalization,
        "position_embedding_type": position,
    }


def _experts(facts: Mapping[str, object]) -> dict[str, object]:
    if not first(facts, NAMES["num_moe_experts"]):
        return {"num_moe_experts": 0}
    ffn = first(facts, NAMES["moe_ffn_hidden_size"]) or _heads(facts)["ffn_hidden_size"]
    layers = layer_pattern(facts.get("moe_layer_freq", 1), as_int(facts, "num_layers"))
    given = facts.get("moe_layers")
    return {"moe_ffn_hidden_size": ffn, "moe_layers": as_bools(given) if given else layers}


def _tied(facts: Mapping[str, object]) -> dict[str, object]:
    untied = facts.get("untie_embeddings_and_output_weights")
    return {} if untied is None else {"share_embeddings_and_output_weights": not untied}


def _blocks(facts: Mapping[str, object]) -> tuple[Block, ...]:
    """Blocks from `heterogeneous_layers_config_encoded_json` (DeciLM's `block_configs`)."""
    if facts.get("blocks"):
        return tuple(facts["blocks"])  # type: ignore[arg-type]
    encoded = facts.get("heterogeneous_layers_config_encoded_json")
    if not encoded:
        return ()
    blocks = json.loads(str(encoded))["block_configs"]
    heads, hidden = as_int(facts, "num_attention_heads"), as_int(facts, "hidden_size")
    return tuple(_block(entry["attention"], entry["ffn"], heads, hidden) for entry in blocks)


def _block(attention: dict[str, object], ffn: dict[str, object], heads: int, hidden: int) -> Block:
    groups = heads // int(attention.get("n_heads_in_group") or heads)  # type: ignore[call-overload]
    # DeciLM rounds the MLP's width up to a multiple of 256 (as Megatron's heterogeneous config).
    width = int(2 * float(ffn.get("ffn_mult") or 0) * hidden / 3)  # type: ignore[arg-type]
    return Block(_replaced(attention), groups, _replaced(ffn), -(-width // 256) * 256)


def _replaced(entry: dict[str, object]) -> str:
    if entry.get("no_op"):
        return "none"
    return "linear" if entry.get("replace_with_linear") else "full"


def _typed(values: Mapping[str, object]) -> dict[str, object]:
    """Values as the fields' own types; YAML and JSON give ints and floats loosely."""
    defaults = {field.name: field for field in dataclasses.fields(ModelSpec)}
    casts = {"int": int, "int | None": int, "float": float, "bool": bool, "str": str}
    return {
        name: casts.get(str(defaults[name].type), lambda same: same)(value)
        for name, value in values.items()
        if value is not None
    }
