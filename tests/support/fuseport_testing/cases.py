"""The model configurations that the tests run through, small enough to build in milliseconds.

Sizes are chosen so that confusions show: hidden, heads × kv_channels, ffn and vocabulary all
differ where the architecture allows it, and the vocabulary is padded.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Case:
    """A small model: its architecture as TensorRT-LLM names it, and its sizes and options.

    `vocab` is the tokenizer's size, `padded_vocab` the rows that Megatron stores. `moe_layers` has
    one flag a layer (None: all layers are alike). `activation` is `silu`, `gelu`,
    `fast_gelu` (tanh) or `squared_relu`; `gated` doubles the first MLP matrix.
    """

    name: str
    architecture: str
    hidden: int = 32
    heads: int = 4
    query_groups: int = 4
    kv_channels: int = 8
    ffn: int = 48
    layers: int = 3
    vocab: int = 61
    padded_vocab: int = 64
    positions: int = 24
    gated: bool = True
    activation: str = "silu"
    normalization: str = "RMSNorm"
    zero_centered: bool = False
    eps: float = 1e-5
    linear_bias: bool = False
    qkv_bias: bool = False
    qk_layernorm: bool = False
    rope: bool = True
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    tied: bool = False
    parallel_attention: bool = False
    experts: int | None = None
    topk: int = 2
    moe_ffn: int = 24
    shared_ffn: int | None = None
    shared_gate: bool = False
    moe_layers: tuple[int, ...] | None = None
    # Further fields of Megatron's configuration, by name, as its arguments have them.
    latent: tuple[tuple[str, object], ...] = ()
    router: tuple[tuple[str, object], ...] = ()
    # Layers behind the last one, which predict further tokens.
    further: int = 0

    def is_moe(self, layer: int) -> bool:
        """Whether a layer (counted over the whole model) has experts."""
        if self.experts is None:
            return False
        return self.moe_layers is None or self.moe_layers[layer] == 1

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts whose keys differ: a list of layer kinds makes Megatron store per layer."""
        every = ("stacked", "per_layer", "singleton", "legacy")
        return every if self.moe_layers is None else every[1:]


CASES: tuple[Case, ...] = (
    Case(
        "gpt",
        "GPTForCausalLM",
        gated=False,
        activation="gelu",
        normalization="LayerNorm",
        linear_bias=True,
        qkv_bias=True,
        rope=False,
        tied=True,
    ),
    Case("llama", "LlamaForCausalLM", query_groups=2, rotary_base=500000),
    Case("qwen2", "QWenForCausalLM", query_groups=2, qkv_bias=True, tied=True),
    Case("qwen3", "QWenForCausalLM", query_groups=2, kv_channels=12, qk_layernorm=True, eps=1e-6),
    Case("mixtral", "MixtralForCausalLM", query_groups=2, layers=2, experts=4),
    Case(
        "qwen2_moe",
        "QWenForCausalLM",
        query_groups=2,
        qkv_bias=True,
        experts=4,
        shared_ffn=40,
        shared_gate=True,
        moe_layers=(0, 1, 1),
    ),
    Case(
        "gemma",
        "GemmaForCausalLM",
        query_groups=2,
        kv_channels=16,
        activation="fast_gelu",
        zero_centered=True,
        qk_layernorm=True,
        tied=True,
    ),
    Case(
        "gemma_plain",
        "GemmaForCausalLM",
        query_groups=2,
        kv_channels=16,
        activation="fast_gelu",
        zero_centered=True,
        eps=1e-6,
        tied=True,
    ),
    Case(
        "starcoder2",
        "GPTForCausalLM",
        query_groups=2,
        gated=False,
        activation="gelu",
        normalization="LayerNorm",
        linear_bias=True,
        qkv_bias=True,
    ),
    Case(
        "falcon",
        "FalconForCausalLM",
        query_groups=1,
        gated=False,
        activation="gelu",
        normalization="LayerNorm",
        tied=True,
        parallel_attention=True,
    ),
    Case(
        "nemotron",
        "NemotronForCausalLM",
        query_groups=2,
        gated=False,
        activation="squared_relu",
        normalization="LayerNorm",
        zero_centered=True,
        rotary_percent=0.5,
    ),
)

_LATENT = (
    ("multi_latent_attention", True), ("kv_lora_rank", 14), ("qk_head_dim", 6),
    ("qk_pos_emb_head_dim", 8), ("v_head_dim", 10),
)  # fmt: skip
_SIGMOID = (("moe_router_score_function", "sigmoid"), ("moe_router_enable_expert_bias", True))
# DeepSeek-like: no unified checkpoint holds these.
LATENT_CASES = (
    Case(
        "deepseek",
        "DeepseekV3ForCausalLM",
        eps=1e-6,
        qk_layernorm=True,
        experts=8,
        topk=4,
        moe_ffn=20,
        shared_ffn=40,
        moe_layers=(0, 1, 1),
        latent=(
            *_LATENT, ("q_lora_rank", 16), ("rope_type", "yarn"), ("rotary_scaling_factor", 4.0),
            ("original_max_position_embeddings", 16), ("mscale", 1.0), ("mscale_all_dim", 0.7),
        ),
        router=(
            *_SIGMOID, ("moe_router_num_groups", 4), ("moe_router_group_topk", 2),
            ("moe_router_topk_scaling_factor", 2.5),
        ),
    ),
    Case(
        "deepseek_whole_q",
        "DeepseekV3ForCausalLM",
        eps=1e-6,
        qk_layernorm=True,
        layers=2,
        experts=4,
        moe_ffn=20,
        shared_ffn=20,
        latent=(*_LATENT, ("q_lora_rank", None), ("rope_type", "rope")),
        router=_SIGMOID,
    ),
)  # fmt: skip
# Beside `CASES`, so that not every test is run for one more family.
QWEN3_MOE = Case(
    "qwen3_moe", "QWenForCausalLM", query_groups=2, kv_channels=12, qk_layernorm=True, eps=1e-6,
    experts=4,
)  # fmt: skip
FURTHER = replace(LATENT_CASES[0], name="deepseek_further", further=2)

# Large enough for several blocks of 128 × 128, some of them cut off at an edge.
WIDE = Case(
    "wide", "LlamaForCausalLM", hidden=320, heads=4, query_groups=2, kv_channels=96, ffn=544,
    layers=4, vocab=500, padded_vocab=512,
)  # fmt: skip

BY_NAME = {case.name: case for case in (*CASES, *LATENT_CASES, QWEN3_MOE, FURTHER, WIDE)}


def some_tokens(case: Case, batch: int = 2, length: int = 7) -> torch.Tensor:
    """Token ids int64 [batch, length], the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, case.vocab, (batch, length), generator=generator)


def megatron_args(case: Case, tp: int, pp: int) -> Namespace:
    """The arguments that Megatron-LM's training script stores in a checkpoint."""
    return Namespace(
        **_architecture_args(case),
        **_expert_args(case),
        **dict(case.latent),
        **dict(case.router),
        padded_vocab_size=case.padded_vocab,
        vocab_size=case.vocab,
        params_dtype=torch.float32,
        bf16=False,
        fp16=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        expert_model_parallel_size=1,
        context_parallel_size=1,
        iteration=ITERATION,
    )


# The iteration that every saved checkpoint claims to be of.
ITERATION = 3


def _architecture_args(case: Case) -> dict[str, object]:
    facts: dict[str, object] = {
        "num_layers": case.layers,
        "hidden_size": case.hidden,
        "ffn_hidden_size": case.ffn,
        "num_attention_heads": case.heads,
        "group_query_attention": case.query_groups != case.heads,
        # Megatron-LM keeps 1 here when grouped attention is off.
        "num_query_groups": case.query_groups if case.query_groups != case.heads else 1,
        "kv_channels": case.kv_channels,
        "normalization": case.normalization,
        "apply_layernorm_1p": case.zero_centered,
        "norm_epsilon": case.eps,
        "swiglu": case.gated and case.activation == "silu",
        "squared_relu": case.activation == "squared_relu",
        "quick_geglu": False,
        "add_bias_linear": case.linear_bias,
        "add_qkv_bias": case.qkv_bias and not case.linear_bias,
        "qk_layernorm": case.qk_layernorm,
        "position_embedding_type": "rope" if case.rope else "learned_absolute",
        "rotary_base": case.rotary_base,
        "rotary_percent": case.rotary_percent,
        "max_position_embeddings": case.positions,
        "mtp_num_layers": case.further or None,
        "untie_embeddings_and_output_weights": not case.tied,
    }
    if case.gated and "gelu" in case.activation:
        # Megatron-LM has no flag for geglu: the two fields of the model's own config say it.
        facts |= {"gated_linear_unit": True, "activation_func": case.activation}
    return facts


def _expert_args(case: Case) -> dict[str, object]:
    return {
        "num_experts": case.experts,
        "moe_ffn_hidden_size": case.moe_ffn if case.experts else None,
        "moe_router_topk": case.topk,
        "moe_layer_freq": list(case.moe_layers) if case.moe_layers else 1,
        "moe_shared_expert_intermediate_size": case.shared_ffn,
        "moe_shared_expert_gate": case.shared_gate,
        "moe_grouped_gemm": False,
    }
