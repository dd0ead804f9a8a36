"""A small but real Megatron checkpoint, made without Megatron: for `fuseport demo`."""

from __future__ import annotations

import argparse
import shutil
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_saver import save

# Megatron-LM's names of the facts.
ARGS = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 768,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 32,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "rotary_percent": 1.0,
    "max_position_embeddings": 2048,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 1001,
    "padded_vocab_size": 1024,
}


def write_demo_checkpoint(directory: Path) -> None:
    """Write `iter_0000001` of a Llama-like model with random fp32 weights (seeded) below it."""
    shutil.rmtree(directory, ignore_errors=True)
    iteration = directory / "iter_0000001"
    iteration.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("1")
    with warnings.catch_warnings():
        # torch says that it saves without a process group, which is what is wanted.
        warnings.simplefilter("ignore")
        save(_weights(), checkpoint_id=iteration, no_dist=True)
    torch.save({"args": argparse.Namespace(**ARGS), "iteration": 1}, iteration / "common.pt")
    (iteration / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )


def _weights() -> dict[str, torch.Tensor]:
    """The stacked layout: a leading axis counts the layers."""
    generator = torch.Generator().manual_seed(1)
    layers, hidden, ffn = 4, 256, 768
    rows = (8 + 2 * 4) * 32
    shapes = {
        "embedding.word_embeddings.weight": (1024, hidden),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        "decoder.layers.self_attention.linear_qkv.weight": (layers, rows, hidden),
        "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, 8 * 32),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        "decoder.layers.mlp.linear_fc1.weight": (layers, 2 * ffn, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, ffn),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (1024, hidden),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
