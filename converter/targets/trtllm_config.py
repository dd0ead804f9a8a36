"""TensorRT-LLM's `config.json`, and the three small rules of its own that it takes to fill files.

Reimplemented because the package cannot be installed everywhere: `pad_vocab_size`,
`Mapping.pp_layers` and the order of ranks (tensor parallel fastest).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..model import ModelSpec
from ..recipe import Recipe
from ..sources.hf_config import LLAMA3
from .quant_config import trtllm_quantization


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of a layer."""

    input_norm: str = "input_layernorm"
    attention: str = "attention"
    mlp_norm: str = "post_layernorm"
    mlp: str = "mlp"


@dataclass(frozen=True)
class Family:
    """A model family: TensorRT-LLM's architecture, its layer names, and its own config fields."""

    architecture: str
    names: Names = Names()
    extra: Mapping[str, object] = field(default_factory=dict)


# model_type → family.
FAMILIES: dict[str, Family] = {
    "gpt": Family("GPTForCausalLM"),
    "gptnext": Family("GPTForCausalLM"),
    "starcoder": Family("GPTForCausalLM", extra={"gpt_variant": "starcoder2"}),
    "nemotron": Family("GPTForCausalLM", extra={"gpt_variant": "nemotron"}),
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "mixtral": Family("MixtralForCausalLM"),
    "qwen2": Family("QWenForCausalLM", extra={"qwen_type": "qwen2"}),
    "qwen3": Family("QWenForCausalLM", extra={"qwen_type": "qwen3"}),
    "qwen2_moe": Family("QWenForCausalLM", extra={"qwen_type": "qwen2_moe"}),
    "qwen3_moe": Family("QWenForCausalLM", extra={"qwen_type": "qwen3_moe"}),
    "gemma": Family("GemmaForCausalLM"),
    "falcon": Family(
        "FalconForCausalLM",
        names=Names(mlp_norm="mlp_layernorm"),
        extra={"new_decoder_architecture": True, "parallel_attention": True},
    ),
    "nemotron_nas": Family("DeciLMForCausalLM", names=Names(mlp="ffn")),
}

# Megatron's name of an activation function → TensorRT-LLM's, without and with a gate.
ACTIVATIONS = {
    "silu": ("silu", "swiglu"),
    "gelu": ("gelu", "geglu"),
    "quick_gelu": ("quick_gelu", "quick_gelu"),
    "relu": ("relu", "relu"),
    "squared_relu": ("squared-relu", "squared-relu"),
}


def padded_vocab_size(size: int, tp_size: int) -> int:
    """The vocabulary rounded up to a multiple of tp."""
    return -(-size // tp_size) * tp_size


def pp_layers(num_layers: int, pp_size: int, stage: int) -> range:
    """A stage's layers; the first `num_layers % pp_size` stages have one more."""
    base, more = divmod(num_layers, pp_size)
    start = stage * base + min(stage, more)
    return range(start, start + base + (stage < more))


def config(
    spec: ModelSpec, recipe: Recipe, vocab_size: int, unquantised: Sequence[str] = ()
) -> dict[str, object]:
    """The contents of `config.json`. `vocab_size` is the tokenizer's, without padding."""
    family = FAMILIES[spec.model_type]
    values: dict[str, object] = {
        "architecture": family.architecture,
        "dtype": recipe.dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_query_groups,
        "head_size": spec.kv_channels,
        "vocab_size": vocab_size,
        "hidden_act": _activation(spec),
        "norm_epsilon": spec.layernorm_epsilon,
        "qk_layernorm": spec.qk_layernorm,
        "bias": spec.add_bias_linear,
        "attn_bias": spec.has_qkv_bias,
        "mlp_bias": spec.has_mlp_bias,
        "use_parallel_embedding": recipe.use_parallel_embedding,
        "embedding_sharding_dim": 0,
        "share_embedding_table": spec.share_embeddings_and_output_weights,
        "mapping": _mapping(recipe),
        "quantization": trtllm_quantization(recipe, unquantised),
    }
    return values | _positions(spec) | _experts(spec) | _blocks(spec) | dict(family.extra)


def _activation(spec: ModelSpec) -> str:
    """Dense models name the function alone: the class says whether it is gated."""
    plain, gated = ACTIVATIONS[spec.activation_func]
    return gated if spec.num_moe_experts and spec.gated_linear_unit else plain


def _mapping(recipe: Recipe) -> dict[str, int]:
    return {
        "world_size": recipe.world_size,
        "tp_size": recipe.tp_size,
        "pp_size": recipe.pp_size,
        "cp_size": 1,
        "moe_tp_size": recipe.moe_tp_size,
        "moe_ep_size": recipe.moe_ep_size,
        "gpus_per_node": recipe.gpus_per_node,
    }


def _positions(spec: ModelSpec) -> dict[str, object]:
    length = {"max_position_embeddings": spec.max_position_embeddings}
    if spec.position_embedding_type != "rope":
        return {"position_embedding_type": "learned_absolute", **length}
    return {
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": spec.rotary_base,
        "rotary_pct": spec.rotary_percent,
        **_rope_scaling(spec),
        **length,
    }


def _rope_scaling(spec: ModelSpec) -> dict[str, object]:
    """TensorRT-LLM takes Hugging Face's `rope_scaling`; the frequencies' bounds are Llama 3.1's."""
    if spec.rope_scaling_factor is not None:
        return {
            "rotary_scaling": {
                "type": "llama3",
                "rope_type": "llama3",
                "factor": spec.rope_scaling_factor,
                **LLAMA3,
            }
        }
    if spec.seq_len_interpolation_factor is not None:
        return {"rotary_scaling": {"type": "linear", "factor": spec.seq_len_interpolation_factor}}
    return {}


def _experts(spec: ModelSpec) -> dict[str, object]:
    if not spec.num_moe_experts:
        return {}
    return {
        "moe": {
            "num_experts": spec.num_moe_experts,
            "top_k": spec.moe_router_topk,
            # 1 is TensorRT-LLM's RENORMALIZE: softmax over the chosen experts.
            "normalization_mode": 1,
        },
        "moe_intermediate_size": spec.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": spec.moe_shared_expert_intermediate_size,
    }


def _blocks(spec: ModelSpec) -> dict[str, object]:
    """DeciLM's own description of each layer."""
    if not spec.blocks:
        return {}
    kinds = {"full": {}, "linear": {"impl": "linear"}, "none": {"impl": "no_op"}}
    return {
        "layer_configs": [
            {
                "attention": {
                    "num_key_value_heads": block.num_query_groups,
                    **kinds[block.attention],
                },
                "ffn": {"intermediate_size": block.ffn_hidden_size, **kinds[block.mlp]},
            }
            for block in spec.blocks
        ]
    }
