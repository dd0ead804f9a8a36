"""What Megatron-Core calls its tensors.

`SPELLINGS` is the table: what a part is called here → the keys under which Megatron-Core, with
and without Transformer Engine and in each checkpoint layout, keeps it. `{e}` is an expert.
"""

from __future__ import annotations

import functools
import re

SPELLINGS: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding.word_embeddings.weight",),
    "positions": ("embedding.position_embeddings.weight",),
    "final_norm.weight": ("decoder.final_layernorm.weight", "decoder.final_norm.weight"),
    "final_norm.bias": ("decoder.final_layernorm.bias", "decoder.final_norm.bias"),
    "output": ("output_layer.weight",),
    # In a layer, after "decoder.layers.N.".
    "input_norm.weight": (
        "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.layer_norm_weight",
    ),
    "input_norm.bias": (
        "input_layernorm.bias",
        "self_attention.linear_qkv.layer_norm_bias",
        "self_attention.layer_norm_bias",
    ),
    "qkv.weight": ("self_attention.linear_qkv.weight",),
    "qkv.bias": ("self_attention.linear_qkv.bias",),
    "q_norm.weight": ("self_attention.q_layernorm.weight",),
    "q_norm.bias": ("self_attention.q_layernorm.bias",),
    "k_norm.weight": ("self_attention.k_layernorm.weight",),
    "k_norm.bias": ("self_attention.k_layernorm.bias",),
    "out.weight": ("self_attention.linear_proj.weight",),
    "out.bias": ("self_attention.linear_proj.bias",),
    # Multi-latent attention.
    "q.weight": ("self_attention.linear_q_proj.weight",),
    "q_down.weight": ("self_attention.linear_q_down_proj.weight",),
    "q_up.weight": ("self_attention.linear_q_up_proj.weight",),
    "q_down_norm.weight": (
        "self_attention.q_layernorm.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight",
    ),
    "q_down_norm.bias": (
        "self_attention.q_layernorm.bias",
        "self_attention.linear_q_up_proj.layer_norm_bias",
    ),
    "kv_down.weight": ("self_attention.linear_kv_down_proj.weight",),
    "kv_up.weight": ("self_attention.linear_kv_up_proj.weight",),
    "kv_down_norm.weight": (
        "self_attention.kv_layernorm.weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight",
    ),
    "kv_down_norm.bias": (
        "self_attention.kv_layernorm.bias",
        "self_attention.linear_kv_up_proj.layer_norm_bias",
    ),
    "attention_linear": ("self_attention.weight",),
    "mlp_norm.weight": (
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.layer_norm_weight",
    ),
    "mlp_norm.bias": (
        "pre_mlp_layernorm.bias",
        "mlp.linear_fc1.layer_norm_bias",
        "mlp.layer_norm_bias",
    ),
    "mlp_linear": ("mlp.weight",),
    "router": ("mlp.router.weight",),
    "router_bias": ("mlp.router.expert_bias",),
    "shared_gate": ("mlp.shared_experts.gate_weight",),
    "experts.fc1": ("mlp.experts.experts.linear_fc1.weight",),
    "experts.fc1_gate": ("mlp.experts.experts.linear_fc1.weight_w",),
    "experts.fc1_up": ("mlp.experts.experts.linear_fc1.weight_v",),
    "experts.fc2": ("mlp.experts.experts.linear_fc2.weight",),
    # In a layer behind the last one, after "mtp.layers.N."; its own layer is in `FURTHER_LAYER`.
    "further.token_norm.weight": ("enorm.weight",),
    "further.token_norm.bias": ("enorm.bias",),
    "further.hidden_norm.weight": ("hnorm.weight",),
    "further.hidden_norm.bias": ("hnorm.bias",),
    "further.norm.weight": ("final_layernorm.weight",),
    "further.norm.bias": ("final_layernorm.bias",),
    "further.join": ("eh_proj.weight",),
    "experts.weight1": ("mlp.experts.weight1",),
    "experts.weight2": ("mlp.experts.weight2",),
}

# Where an MLP's linears are: dense, shared expert, and one expert of each flavour.
MLP_PREFIXES = {
    "dense": ("mlp.",),
    "shared": ("mlp.shared_experts.",),
    "expert": ("mlp.experts.local_experts.{e}.", "mlp.experts.experts.{e}."),
}
# Within those: whole, or split into gate (w) and up (v) as singleton checkpoints have it.
MLP_PARTS = {
    "fc1": "linear_fc1.weight",
    "fc1_gate": "linear_fc1.weight_w",
    "fc1_up": "linear_fc1.weight_v",
    "fc1.bias": "linear_fc1.bias",
    "fc1_gate.bias": "linear_fc1.bias_w",
    "fc1_up.bias": "linear_fc1.bias_v",
    "fc2": "linear_fc2.weight",
    "fc2.bias": "linear_fc2.bias",
}
# Transformer Engine's grouped linear puts the expert behind the part.
GROUPED = "mlp.experts.{part}{e}"

# Layers that predict further tokens; Megatron-Core since 0.17 has another name for the layer in
# such a one in memory, and the old one in checkpoints.
FURTHER = "mtp."
FURTHER_LAYER = ("transformer_layer.", "mtp_model_layer.")

IGNORED: dict[str, str] = {
    "_extra_state": "state of Transformer Engine's modules, no weight",
    "rotary_pos_emb.": "computed from the configuration",
    "adapter_layer.": "adapter, not part of the base model",
    ".rng_state": "state of a random generator",
    "local_tokens_per_expert": "statistics of the router, no weight",
}

_WRAPPERS = re.compile(r"(?:module\.|model\.)+")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers, one around the other, put before it."""
    match = _WRAPPERS.match(name)
    return name if match is None else name[match.end() :]


def layer_of(name: str) -> tuple[int, str] | None:
    """A tensor's layer, and its name there; None outside of the layers."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def layer_name(layer: int, name: str) -> str:
    """What a tensor of a layer is called in the model."""
    return f"decoder.layers.{layer}.{name}"


@functools.cache
def mlp_spellings(kind: str, part: str, expert: int) -> tuple[str, ...]:
    """Every key of an MLP's part, after the layer's prefix; the same in every layer."""
    name = MLP_PARTS[part]
    grouped = (GROUPED.replace("{part}", name),) if kind == "expert" else ()
    keys = tuple(prefix + name for prefix in MLP_PREFIXES[kind]) + grouped
    return tuple(key.replace("{e}", str(expert)) for key in keys)
