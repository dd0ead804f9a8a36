"""A Llama-like torch_dist checkpoint of a few kilobytes, made without Megatron, to be spoilt."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_saver import save

ITERATION = "iter_0000001"
Weights = dict[str, torch.Tensor]

# Megatron-LM's arguments.
FACTS: dict[str, object] = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "max_position_embeddings": 64,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 30,
}

# The same, by the fields of ModelSpec: for sources that say nothing.
SPEC: dict[str, object] = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 4,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "position_embedding_type": "rope",
    "vocab_size": 30,
}


def tiny_weights() -> Weights:
    """Stacked fp32 tensors of 2 layers; the vocabulary is padded from 30 to 32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embedding.word_embeddings.weight": (32, 16),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 16),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 32, 16),
        "decoder.layers.self_attention.linear_proj.weight": (2, 16, 16),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 16),
        "decoder.layers.mlp.linear_fc1.weight": (2, 48, 16),
        "decoder.layers.mlp.linear_fc2.weight": (2, 16, 24),
        "decoder.final_layernorm.weight": (16,),
        "output_layer.weight": (32, 16),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_tiny(
    directory: Path, weights: Weights | None = None, facts: Mapping[str, object] | None = FACTS
) -> Path:
    """Write the checkpoint, with `common.pt` unless `facts` is None, and return `directory`."""
    iteration = directory / ITERATION
    iteration.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("1")
    with warnings.catch_warnings():
        # torch says that it saves without a process group, which is what is wanted.
        warnings.simplefilter("ignore")
        save(tiny_weights() if weights is None else weights, checkpoint_id=iteration, no_dist=True)
    if facts is not None:
        torch.save({"args": argparse.Namespace(**facts)}, iteration / "common.pt")
    (iteration / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    return directory
