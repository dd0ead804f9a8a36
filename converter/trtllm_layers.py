"""Conversion dictionaries: a caller's names → `TRTLLMLayers` → Megatron-Core's own names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from .errors import RecipeError, UnknownTensorError
from .sources.megatron_names import unwrapped

# TRTLLMLayers' values → Megatron-Core's names, layers after "decoder.layers.N.".
WHOLE = {
    "transformer.vocab_embedding.weight": "embedding.word_embeddings.weight",
    "transformer.position_embedding.weight": "embedding.position_embeddings.weight",
    "transformer.ln_f.weight": "decoder.final_layernorm.weight",
    "transformer.ln_f.bias": "decoder.final_layernorm.bias",
    "lm_head.weight": "output_layer.weight",
}
LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "input_layernorm.bias": "input_layernorm.bias",
    "attention.qkv.weight": "self_attention.linear_qkv.weight",
    "attention.qkv.bias": "self_attention.linear_qkv.bias",
    "attention.dense.weight": "self_attention.linear_proj.weight",
    "attention.dense.bias": "self_attention.linear_proj.bias",
    "attention.weight": "self_attention.weight",
    "post_layernorm.weight": "pre_mlp_layernorm.weight",
    "post_layernorm.bias": "pre_mlp_layernorm.bias",
    "mlp.fc.weight": "mlp.linear_fc1.weight",
    "mlp.fc.bias": "mlp.linear_fc1.bias",
    "mlp.proj.weight": "mlp.linear_fc2.weight",
    "mlp.proj.bias": "mlp.linear_fc2.bias",
    "ffn.fc.weight": "mlp.linear_fc1.weight",
    "ffn.proj.weight": "mlp.linear_fc2.weight",
    "ffn.weight": "mlp.weight",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.fc.weight.expert": "mlp.experts.experts.linear_fc1.weight",
    "mlp.proj.weight.expert": "mlp.experts.experts.linear_fc2.weight",
}
PREFIX = "transformer.layers."
# TRTLLMLayers' values by themselves, for tensors that have their target's name already.
MODULES = {name: name for name in (*WHOLE, *(PREFIX + part for part in LAYER))}

_FFN = re.compile(r"^transformer\.layers\.(\d+\.)?ffn\.")
_NUMBERED = re.compile(r"^(.*?\blayers\.)(\d+)\.(.+)$")


def to_megatron(
    tensors: Mapping[str, torch.Tensor], conversion: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Tensors by Megatron-Core's names. A name that the dictionary lacks, with and without what
    wrappers put before it, is taken for Megatron's own: those are understood without one.

    Raises:
        RecipeError: the dictionary has no value of TRTLLMLayers for a name.
        UnknownTensorError: two tensors come to one name.
    """
    found: dict[str, str] = {}
    for own in tensors:
        name = _one(own, conversion)
        if (other := found.setdefault(name, own)) is not own:
            raise UnknownTensorError(
                f"trtllm_conversion_dict: {other} and {own} both become {name}; keep one of them"
            )
    return {name: tensors[own] for name, own in found.items()}


def _one(name: str, conversion: Mapping[str, Any]) -> str:
    match = _NUMBERED.match(name)
    key = name if match is None else match[1] + match[3]
    target = conversion.get(key, conversion.get(unwrapped(key)))
    if target is None:
        return unwrapped(name)
    value = str(getattr(target, "value", target))
    if value in WHOLE:
        return WHOLE[value]
    number = "" if match is None else f"{match[2]}."
    if value.removeprefix(PREFIX) not in LAYER:
        raise RecipeError(
            f"trtllm_conversion_dict: {name} becomes {value!r}, which is none of TRTLLMLayers' "
            f"values"
        )
    return f"decoder.layers.{number}{LAYER[value.removeprefix(PREFIX)]}"


def is_nemotron_nas(conversion: Mapping[str, Any]) -> bool:
    """True if the dictionary gives MLPs the names of Nemotron-NAS (`ffn`)."""
    values = (str(getattr(target, "value", target)) for target in conversion.values())
    return any(_FFN.match(value) for value in values)
