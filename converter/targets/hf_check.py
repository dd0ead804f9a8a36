"""What a Hugging Face checkpoint must hold, read off its `config.json` alone.

Written from transformers' classes, not from the tables that lay tensors out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .quant_check import hf_shapes

Shapes = dict[str, tuple[int, ...]]
Config = Mapping[str, Any]

REQUIRED = (
    "architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "vocab_size",
)  # fmt: skip

# Classes whose attention has q_proj, k_proj, v_proj and o_proj of one head size.
PLAIN_ATTENTION = {
    "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2",
    "gemma3_text", "nemotron", "gpt_oss", "stablelm", "granite",
}  # fmt: skip
GATED_MLP = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm", "granite",
}  # fmt: skip
# Class → the modules of an expert (gate, up, down), and the key of its width.
EXPERTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), "intermediate_size"),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), "moe_intermediate_size"),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), "moe_intermediate_size"),
    "deepseek_v3": ("mlp", ("gate_proj", "up_proj", "down_proj"), "moe_intermediate_size"),
}
KNOWN = PLAIN_ATTENTION | {"deepseek_v3"}


def expected_by_file(
    config: Config, modelopt: Config, index: Config, files: list[str]
) -> dict[str, Shapes]:
    """File → tensors that must be in it, and their shapes; `modelopt`: hf_quant_config.json.

    Raises:
        ValueError: index and files do not fit, or a tensor that must be there is nowhere.
    """
    places = index["weight_map"]
    if set(places.values()) != set(files):
        raise ValueError(f"the index names {sorted(set(places.values()))}, there are {files}")
    result: dict[str, Shapes] = {file: {} for file in files}
    for name, shape in hf_shapes(expected_matrices(config), config, modelopt).items():
        if name not in places:
            raise ValueError(f"no file holds {name} {list(shape)}")
        result[places[name]][name] = shape
    return result


def expected_matrices(config: Config) -> Shapes:
    """Names and shapes of the matrices of a class that is known here; else none."""
    kind, hidden = config["model_type"], config["hidden_size"]
    if kind not in KNOWN:
        return {}
    shapes: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    tied = config.get("tie_word_embeddings", kind in ("gemma", "gemma2", "gemma3_text"))
    if not tied:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        attention = _attention if kind in PLAIN_ATTENTION else _latent
        shapes |= attention(config, prefix + "self_attn.") | _mlp(config, kind, layer, prefix)
    return shapes


def _attention(config: Config, prefix: str) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    return {
        prefix + "q_proj.weight": (heads * head, hidden),
        prefix + "k_proj.weight": (keys, hidden),
        prefix + "v_proj.weight": (keys, hidden),
        prefix + "o_proj.weight": (hidden, heads * head),
    }


def _latent(config: Config, prefix: str) -> Shapes:
    hidden, heads, rank = (
        config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"],
    )  # fmt: skip
    rotated, plain, value = (
        config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"],
    )  # fmt: skip
    return {
        prefix + "kv_a_proj_with_mqa.weight": (rank + rotated, hidden),
        prefix + "kv_b_proj.weight": (heads * (plain + value), rank),
        prefix + "o_proj.weight": (hidden, heads * value),
    }


def _mlp(config: Config, kind: str, layer: int, prefix: str) -> Shapes:
    hidden = config["hidden_size"]
    dense = layer in config.get("mlp_only_layers", ())
    dense = dense or layer < config.get("first_k_dense_replace", 0)
    if kind in EXPERTS and not dense and config.get("decoder_sparse_step", 1) == 1:
        block, parts, key = EXPERTS[kind]
        counts = ("num_local_experts", "num_experts", "n_routed_experts")
        count = next(config[name] for name in counts if config.get(name) is not None)
        shapes: Shapes = {prefix + f"{block}.gate.weight": (count, hidden)}
        for expert in range(count):
            shapes |= _three(f"{prefix}{block}.experts.{expert}.", parts, config[key], hidden)
        return shapes
    if kind in GATED_MLP or dense:
        parts = ("gate_proj", "up_proj", "down_proj")
        return _three(prefix + "mlp.", parts, config["intermediate_size"], hidden)
    return {}


def _three(prefix: str, parts: tuple[str, str, str], width: int, hidden: int) -> Shapes:
    gate, up, down = (f"{prefix}{part}.weight" for part in parts)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
