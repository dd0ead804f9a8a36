"""Nemotron-NAS: layers of different widths, with attention or MLP replaced or left out."""

from __future__ import annotations

import json

import torch

from fuseport.converter import ModelSpec, Recipe, convert_state_dict

HIDDEN, HEADS, HEAD = 48, 4, 12
BLOCKS = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 5.0}},
    {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 9.0}},
    {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
    {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
]
FACTS = {
    "num_layers": 4,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "kv_channels": HEAD,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "heterogeneous_layers_config_encoded_json": json.dumps({"block_configs": BLOCKS}),
}


def state() -> dict[str, torch.Tensor]:
    shapes = {
        "embedding.word_embeddings.weight": (50, HIDDEN),
        "output_layer.weight": (50, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "decoder.layers.0.input_layernorm.weight": (HIDDEN,),
        "decoder.layers.0.self_attention.linear_qkv.weight": ((HEADS + 4) * HEAD, HIDDEN),
        "decoder.layers.0.self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD),
        "decoder.layers.0.pre_mlp_layernorm.weight": (HIDDEN,),
        "decoder.layers.0.mlp.linear_fc1.weight": (2 * 256, HIDDEN),
        "decoder.layers.0.mlp.linear_fc2.weight": (HIDDEN, 256),
        "decoder.layers.1.self_attention.layer_norm_weight": (HIDDEN,),
        "decoder.layers.1.self_attention.weight": (HIDDEN, HIDDEN),
        "decoder.layers.1.pre_mlp_layernorm.weight": (HIDDEN,),
        "decoder.layers.1.mlp.linear_fc1.weight": (2 * 512, HIDDEN),
        "decoder.layers.1.mlp.linear_fc2.weight": (HIDDEN, 512),
        "decoder.layers.2.mlp.layer_norm_weight": (HIDDEN,),
        "decoder.layers.2.mlp.weight": (HIDDEN, HIDDEN),
        "decoder.layers.3.input_layernorm.weight": (HIDDEN,),
        "decoder.layers.3.self_attention.linear_qkv.weight": ((HEADS + 2) * HEAD, HIDDEN),
        "decoder.layers.3.self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD),
    }
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_blocks_from_the_encoded_config() -> None:
    spec = ModelSpec.from_facts(FACTS)
    assert spec.model_type == "nemotron_nas"
    assert [(b.attention, b.num_query_groups, b.mlp) for b in spec.blocks] == [
        ("full", 2, "full"),
        ("linear", 1, "full"),
        ("none", 1, "linear"),
        ("full", 1, "none"),
    ]
    assert [b.ffn_hidden_size for b in spec.blocks[:2]] == [256, 512]


def test_each_rank_gets_its_rows_under_decis_names() -> None:
    source = state()
    ranks = convert_state_dict(source, ModelSpec.from_facts(FACTS), Recipe(tp_size=2))
    layer = "transformer.layers."
    for rank, tensors in enumerate(ranks):
        assert set(tensors) == {
            "transformer.vocab_embedding.weight",
            "transformer.ln_f.weight",
            "lm_head.weight",
            layer + "0.input_layernorm.weight",
            layer + "0.attention.qkv.weight",
            layer + "0.attention.dense.weight",
            layer + "0.post_layernorm.weight",
            layer + "0.ffn.fc.weight",
            layer + "0.ffn.gate.weight",
            layer + "0.ffn.proj.weight",
            layer + "1.input_layernorm.weight",
            layer + "1.attention.weight",
            layer + "1.post_layernorm.weight",
            layer + "1.ffn.fc.weight",
            layer + "1.ffn.gate.weight",
            layer + "1.ffn.proj.weight",
            layer + "2.post_layernorm.weight",
            layer + "2.ffn.weight",
            layer + "3.input_layernorm.weight",
            layer + "3.attention.qkv.weight",
            layer + "3.attention.dense.weight",
        }
        expected = source["decoder.layers.1.self_attention.weight"].chunk(2)[rank].bfloat16()
        assert torch.equal(tensors[layer + "1.attention.weight"], expected)
        gate, up = source["decoder.layers.1.mlp.linear_fc1.weight"].chunk(2)
        assert torch.equal(tensors[layer + "1.ffn.fc.weight"], gate.chunk(2)[rank].bfloat16())
        assert torch.equal(tensors[layer + "1.ffn.gate.weight"], up.chunk(2)[rank].bfloat16())
    # One KV head on two ranks: both get it, after their own two query heads.
    qkv = source["decoder.layers.3.self_attention.linear_qkv.weight"].bfloat16()
    for rank in range(2):
        found = ranks[rank][layer + "3.attention.qkv.weight"]
        queries = qkv[rank * 2 * HEAD : (rank + 1) * 2 * HEAD]
        assert torch.equal(found, torch.cat([queries, qkv[HEADS * HEAD :]]))
