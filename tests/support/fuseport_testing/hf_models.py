"""Small random models that transformers makes, and their logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class HfCase:
    """A model type and what its config says beside the sizes; `unified` if trtllm takes it."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    unified: bool = False


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "kv_lora_rank": 14, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}  # fmt: skip

CASES = (
    HfCase("llama", "llama", unified=True),
    HfCase("llama_biases", "llama", {"attention_bias": True, "mlp_bias": True}, unified=True),
    HfCase("llama3", "llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    HfCase("square", "llama", {"intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 4}),
    HfCase("mistral", "mistral", {"sliding_window": None}, unified=True),
    HfCase("mistral_window", "mistral", {"sliding_window": 3}),
    HfCase("qwen2", "qwen2", {"head_dim": 8, "tie_word_embeddings": True}, unified=True),
    HfCase("qwen3", "qwen3", unified=True),
    HfCase("mixtral", "mixtral", {"num_local_experts": 4}, unified=True),
    HfCase("qwen3_moe", "qwen3_moe", {**EXPERTS, "norm_topk_prob": True}, unified=True),
    HfCase("qwen3_moe_plain", "qwen3_moe", {**EXPERTS, "mlp_only_layers": [1]}),
    HfCase(
        "qwen2_moe",
        "qwen2_moe",
        {**EXPERTS, "head_dim": 8, "norm_topk_prob": True, "shared_expert_intermediate_size": 40},
        unified=True,
    ),
    HfCase("gemma", "gemma", unified=True),
    HfCase("gemma2", "gemma2", {"sliding_window": 3}),
    HfCase("gemma3", "gemma3_text", {"sliding_window": 3}),
    HfCase("nemotron", "nemotron", {"head_dim": 8}, unified=True),
    HfCase("stablelm", "stablelm", {"head_dim": 8, "use_qkv_bias": True}),
    HfCase(
        "granite",
        "granite",
        {"head_dim": 8, "attention_bias": True, "embedding_multiplier": 3.0,
         "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 4.0},
    ),
    HfCase("deepseek", "deepseek_v3", {**DEEPSEEK, "q_lora_rank": 16}),
    HfCase("deepseek_whole_q", "deepseek_v3", {**DEEPSEEK, "q_lora_rank": None}),
    HfCase(
        "gpt_oss",
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def make(case: HfCase) -> Any:
    """A model in fp32 whose values bf16 holds exactly; no norm and no bias is constant."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **{**SIZES, **case.options})
    config._attn_implementation = "eager"
    maker: Any = AutoModelForCausalLM
    model = maker.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name and tensor.is_floating_point() and tensor.numel() > 1:
                fill(name, tensor)
    return model


def fill(name: str, tensor: torch.Tensor) -> None:
    """Norm weights vary by sixteenths, so that one more or less shows and stays exact."""
    values = torch.randn(tensor.shape)
    if "norm" in name:
        start = tensor.flatten()[0] if name.endswith("weight") else 0.0
        tensor.copy_(start + (values * 4).round().clamp(-8, 8) / 16)
    else:
        spread = 0.2 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
        tensor.copy_((values * spread).bfloat16().float())


@cache
def tokens() -> torch.Tensor:
    """Token ids int64 [2, 7]."""
    return torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    """fp32 [2, 7, vocabulary]."""
    with torch.no_grad():
        found: torch.Tensor = model(tokens()).logits
    return found.float()


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a directory; a tensor too many or too few is an error."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()


def wide(case: HfCase) -> HfCase:
    """A case whose linears have rows that MXFP8's 32 divides."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    wider = {
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "kv_lora_rank": 32,
        "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    }  # fmt: skip
    sizes |= {name: size for name, size in wider.items() if case.options.get(name) is not None}
    return HfCase(case.name, case.model_type, {**case.options, **sizes}, case.unified)
