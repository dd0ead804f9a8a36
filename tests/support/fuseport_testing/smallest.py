"""The smallest model there is: one layer, eight wide, with a gate and an output of its own."""

from __future__ import annotations

FACTS: dict[str, int] = {
    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 1,
    "kv_channels": 4, "ffn_hidden_size": 16,
}  # fmt: skip
SHAPES = {
    "embedding.word_embeddings.weight": (32, 8),
    "decoder.layers.0.input_layernorm.weight": (8,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (16, 8),
    "decoder.layers.0.self_attention.linear_proj.weight": (8, 8),
    "decoder.layers.0.pre_mlp_layernorm.weight": (8,),
    "decoder.layers.0.mlp.linear_fc1.weight": (32, 8),
    "decoder.layers.0.mlp.linear_fc2.weight": (8, 16),
    "decoder.final_layernorm.weight": (8,),
    "output_layer.weight": (32, 8),
}
