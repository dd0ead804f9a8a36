"""The names of facts: what sources call them, and which options are refused."""

from __future__ import annotations

# How sources write an activation function → the name used here.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "openai_gelu": "gelu",
    "fast_gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "squared_relu": "squared_relu",
    "relu2": "squared_relu",
    "gelu_pytorch_tanh": "gelu",
}

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
    "rope_scaling_factor": ("rope_scaling_factor",),
    "seq_len_interpolation_factor": (
        "seq_len_interpolation_factor",
        "rotary_seq_len_interpolation_factor",
    ),
    "rotary_percent": ("rotary_percent", "rotary_percentage"),
    "share_embeddings_and_output_weights": ("share_embeddings_and_output_weights",),
    "num_moe_experts": ("num_moe_experts", "num_experts"),
    "moe_ffn_hidden_size": ("moe_ffn_hidden_size",),
    "moe_router_topk": ("moe_router_topk",),
    "moe_shared_expert_intermediate_size": ("moe_shared_expert_intermediate_size",),
    "attention_out_bias": ("attention_out_bias",),
    "mlp_bias": ("mlp_bias",),
    "moe_router_linear_bias": ("moe_router_linear_bias",),
    "special": ("special",),
    "further_layers": ("further_layers", "mtp_num_layers"),
    "moe_router_score_function": ("moe_router_score_function",),
    "moe_router_num_groups": ("moe_router_num_groups",),
    "moe_router_group_topk": ("moe_router_group_topk",),
    "moe_router_topk_scaling_factor": ("moe_router_topk_scaling_factor",),
}

# Sizes of multi-latent attention. Megatron-LM's arguments hold them for every model, used or not.
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")

# The families that targets know.
MODEL_TYPES = (
    "gpt", "gptnext", "starcoder", "nemotron", "llama", "mistral", "mixtral", "qwen2", "qwen3",
    "qwen2_moe", "qwen3_moe", "gemma", "falcon", "nemotron_nas", "deepseek_v3",
)  # fmt: skip

# A family that the unified checkpoint has no place for.
OTHER = "other"

# Options that change what the weights or the layers mean, and that no rule here handles.
REFUSED = {
    "attention_output_gate": "linear_qkv holds gate rows",
    "moe_mlp_glu_interleave_size": "gate and up rows are interleaved",
    "mtp_use_repeated_layer": "one layer predicts several further tokens",
    "mtp_layer_pattern": "layers that predict further tokens are not transformer layers",
    "experimental_attention_variant": "attention is not softmax attention",
    "linear_attention_freq": "attention is not softmax attention",
    "is_hybrid_model": "layers are not all transformer layers",
    "moe_latent_size": "experts work in a smaller space",
    "rotary_interleaved": "a head's neighbouring elements are rotated together",
    "no_rope_freq": "some layers do without rotary positions",
    "window_size": "attention looks at a window",
    "activation_func_clamp_value": "the activation is clamped",
    "glu_linear_offset": "the MLP's ungated half has an offset",
    "apply_residual_connection_post_layernorm": "residuals are taken behind the norms",
    "moe_router_pre_softmax": "experts' weights do not sum to one",
}

# Families whose layers Megatron-Core (up to 0.19) does not have: they come from Hugging Face only.
NOT_FROM_MEGATRON = {
    "gemma2": "norms behind attention and MLP, and capped logits",
    "gemma3": "norms behind attention and MLP",
    "gemma3_text": "norms behind attention and MLP",
}

# Options that not every target can say → the values with which they change nothing.
SPECIAL: dict[str, tuple[object, ...]] = {
    "multi_latent_attention": (None, False),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_num_groups": (None, 0, 1),
    "moe_router_topk_scaling_factor": (None, 1.0),
}

# Options of which one value is handled.
ONLY: dict[str, tuple[object, str]] = {
    "softmax_type": ("vanilla", "attention has sinks"),
}
