"""Models of one layer, with a gate and an output of its own; `FACTS` is the smallest there is."""

from __future__ import annotations

from collections.abc import Mapping

FACTS: dict[str, int] = {
    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 1,
    "kv_channels": 4, "ffn_hidden_size": 16,
}  # fmt: skip


def shapes_of(facts: Mapping[str, int], vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Megatron-Core's names and shapes of such a model."""
    hidden, ffn = facts["hidden_size"], facts["ffn_hidden_size"]
    query = facts["num_attention_heads"] * facts["kv_channels"]
    kv = facts["num_query_groups"] * facts["kv_channels"]
    return {
        "embedding.word_embeddings.weight": (vocab_size, hidden),
        "decoder.layers.0.input_layernorm.weight": (hidden,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (query + 2 * kv, hidden),
        "decoder.layers.0.self_attention.linear_proj.weight": (hidden, query),
        "decoder.layers.0.pre_mlp_layernorm.weight": (hidden,),
        "decoder.layers.0.mlp.linear_fc1.weight": (2 * ffn, hidden),
        "decoder.layers.0.mlp.linear_fc2.weight": (hidden, ffn),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocab_size, hidden),
    }


SHAPES = shapes_of(FACTS, 32)
