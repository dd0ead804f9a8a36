"""Models to measure with: facts, Megatron-Core's names and shapes, and shards of them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping

import torch

from fuseport.converter import ModelSpec
from fuseport.kernels.move import GivenScale

Shapes = dict[str, tuple[int, ...]]
MODULES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
LLAMA_8B = ModelSpec(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    ffn_hidden_size=14336,
    vocab_size=128256,
    model_type="llama",
)
LLAMA_70B = ModelSpec(
    num_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=128,
    ffn_hidden_size=28672,
    vocab_size=128256,
)
# One expert parallel rank of eight; of its 94 layers as many as fit beside their results.
QWEN3_235B_EP8 = ModelSpec(
    num_layers=24,
    hidden_size=4096,
    num_attention_heads=64,
    num_query_groups=4,
    kv_channels=128,
    ffn_hidden_size=12288,
    vocab_size=151936 // 8,
    model_type="qwen3_moe",
    qk_layernorm=True,
    num_moe_experts=128 // 8,
    moe_ffn_hidden_size=1536,
    moe_router_topk=8,
)
TOY = ModelSpec(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=8,
    kv_channels=8,
    ffn_hidden_size=256,
    vocab_size=96,
)
TOY_MOE = QWEN3_235B_EP8.replace(
    num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    vocab_size=96, num_moe_experts=2, moe_ffn_hidden_size=64, moe_router_topk=2,
)  # fmt: skip

# Small, and in whole blocks of 128 × 128 on each of eight ranks.
TOY_PEER = ModelSpec(
    num_layers=1,
    hidden_size=128,
    num_attention_heads=8,
    num_query_groups=8,
    kv_channels=128,
    ffn_hidden_size=1024,
    vocab_size=96,
)
TOY_PEER_MOE = TOY_MOE.replace(
    hidden_size=128, num_attention_heads=2, num_query_groups=1, kv_channels=128,
    moe_ffn_hidden_size=128,
)  # fmt: skip


def given_scales(spec: ModelSpec, quant_scale: float) -> dict[str, GivenScale]:
    """One scale for every linear weight, by the unified checkpoint's names.

    Experts' gates are in the same tensor as their other half.
    """
    return {
        f"transformer.layers.{layer}.{module}": GivenScale(quant_scale)
        for layer in range(spec.num_layers)
        for module in MODULES
        if module != "mlp.gate" or not spec.is_moe(layer)
    }


def of_rank(spec: ModelSpec, tp: int) -> ModelSpec:
    """A tensor parallel rank's shard as a model of its own."""
    return spec.replace(
        num_attention_heads=spec.num_attention_heads // tp,
        num_query_groups=spec.num_query_groups // tp,
        ffn_hidden_size=spec.ffn_hidden_size // tp,
        vocab_size=(spec.vocab_size or 0) // tp,
    )


def shapes(spec: ModelSpec, vocab: int | None = None) -> Shapes:
    """A whole model's tensors; `vocab` is its padded vocabulary."""
    rows = vocab or spec.vocab_size or 0
    hidden = spec.hidden_size
    result: Shapes = {"embedding.word_embeddings.weight": (rows, hidden)}
    for layer in range(spec.num_layers):
        result |= {f"decoder.layers.{layer}.{name}": one for name, one in _layer(spec).items()}
    return result | {
        "decoder.final_layernorm.weight": (hidden,), "output_layer.weight": (rows, hidden),
    }  # fmt: skip


def _layer(spec: ModelSpec) -> Shapes:
    hidden, head = spec.hidden_size, spec.kv_channels
    rows = (spec.num_attention_heads + 2 * spec.num_query_groups) * head
    result: Shapes = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (rows, hidden),
        "self_attention.linear_proj.weight": (hidden, spec.num_attention_heads * head),
    }
    if spec.qk_layernorm:
        result |= {f"self_attention.{one}_layernorm.weight": (head,) for one in "qk"}
    if not spec.num_moe_experts:
        ffn = spec.ffn_hidden_size
        return result | {
            "mlp.linear_fc1.layer_norm_weight": (hidden,),
            "mlp.linear_fc1.weight": (2 * ffn, hidden),
            "mlp.linear_fc2.weight": (hidden, ffn),
        }
    ffn = spec.moe_ffn_hidden_size
    result |= {
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.router.weight": (spec.num_moe_experts, hidden),
    }
    for expert in range(spec.num_moe_experts):
        result[f"mlp.experts.linear_fc1.weight{expert}"] = (2 * ffn, hidden)
        result[f"mlp.experts.linear_fc2.weight{expert}"] = (hidden, ffn)
    return result


def random_weights(
    wanted: Mapping[str, tuple[int, ...]],
    device: torch.device,
    keep: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, value: value,
) -> dict[str, torch.Tensor]:
    """Random bf16 tensors, each by its own name's seed; of each `keep` says what stays."""
    result = {}
    for name, shape in wanted.items():
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        value = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        result[name] = keep(name, value)
    return result


_ROWS = re.compile(r"word_embeddings|output_layer|linear_qkv\.weight")
_COLUMNS = re.compile(r"linear_(proj|fc2)\.weight")


def cut(name: str, value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A dense tensor's share on a tensor parallel rank, as Megatron-Core cuts it."""
    if "linear_fc1.weight" in name:
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    if _ROWS.search(name):
        return value.chunk(size)[rank].clone()
    return value.chunk(size, 1)[rank].clone() if _COLUMNS.search(name) else value
