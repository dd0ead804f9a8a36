"""A unified checkpoint directory written by hand from the oracle's tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .cases import Case

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "fast_gelu": "gelu", "squared_relu": "squared-relu"}


def trtllm_config(
    case: Case,
    tp: int,
    pp: int,
    use_parallel_embedding: bool = False,
    embedding_sharding_dim: int = 0,
    moe_ep: int = 1,
) -> dict[str, object]:
    """What `config.json` must say about a case for these parallel sizes."""
    config: dict[str, object] = {
        "architecture": case.architecture,
        "dtype": "bfloat16",
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.query_groups,
        "head_size": case.kv_channels,
        "intermediate_size": case.ffn,
        "vocab_size": case.vocab,
        "hidden_act": _ACTIVATIONS[case.activation],
        "norm_epsilon": case.eps,
        "position_embedding_type": "rope_gpt_neox" if case.rope else "learned_absolute",
        "max_position_embeddings": case.positions,
        "rotary_base": case.rotary_base,
        "rotary_pct": case.rotary_percent,
        "use_parallel_embedding": use_parallel_embedding,
        "embedding_sharding_dim": embedding_sharding_dim,
        "share_embedding_table": case.tied,
        "qk_layernorm": case.qk_layernorm,
        "parallel_attention": case.parallel_attention,
        "mapping": {
            "world_size": tp * pp,
            "tp_size": tp,
            "pp_size": pp,
            "moe_tp_size": tp // moe_ep,
            "moe_ep_size": moe_ep,
        },
    }
    if case.experts:
        moe = {"num_experts": case.experts, "top_k": case.topk, "normalization_mode": 1}
        config |= {"moe": moe, "moe_intermediate_size": case.moe_ffn}
    return config


def write_checkpoint(
    directory: Path, config: dict[str, object], ranks: list[dict[str, torch.Tensor]]
) -> None:
    """config.json and one file a rank, in a directory that may exist."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for rank, tensors in enumerate(ranks):
        save_file(tensors, str(directory / f"rank{rank}.safetensors"))
