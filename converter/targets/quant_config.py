"""How engines are told what is quantised.

Sources: TensorRT-LLM 1.2's `QuantConfig` for the unified checkpoint; transformers' fp8 format
(`quant_method: fp8`), which vLLM, SGLang and TensorRT-LLM read too; compressed-tensors'
`float-quantized` for scales of rows; ModelOpt's `hf_quant_config.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..recipe import Recipe
from .profiles import written

HF_QUANT_CONFIG = "hf_quant_config.json"
# Recipe.quant → TensorRT-LLM's and ModelOpt's name.
ALGORITHMS = {
    "fp8": "FP8",
    "fp8-row": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8-block": "FP8_BLOCK_SCALES",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
}


def trtllm_quantization(recipe: Recipe, unquantised: Sequence[str] = ()) -> dict[str, object]:
    """`quantization` of the unified checkpoint's config.json.

    `unquantised` are linears that stay as they are, whatever kept them. A pipeline stage numbers
    its layers from 0, so only patterns say it there.
    """
    values: dict[str, object] = {
        "quant_algo": ALGORITHMS.get(recipe.quant),
        "kv_cache_quant_algo": _cache_algorithm(recipe),
    }
    if recipe.quant != "none":
        named = unquantised if recipe.pp_size == 1 else ()
        values["exclude_modules"] = sorted({*recipe.exclude, *UNIFIED_EXCLUDES, *named})
    return values


def _cache_algorithm(recipe: Recipe) -> str | None:
    return None if recipe.kv_cache == "none" else recipe.kv_cache.upper()


# Modules that are linear to TensorRT-LLM, and never quantised here.
UNIFIED_EXCLUDES = ("*.router", "transformer.vocab_embedding", "transformer.position_embedding")


def hf_quantization(recipe: Recipe, unquantised: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json; empty if ModelOpt's file says it, or nothing is."""
    said = None if recipe.quant == "none" else SAID.get(written(recipe).said)
    if said is None:
        return {}
    cache = {"kv_cache_scheme": _STATIC_FP8} if recipe.kv_cache == "fp8" else {}
    return cache | said(recipe, unquantised)


# compressed-tensors' description of keys and values in e4m3 with scales that are in the file.
_STATIC_FP8 = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False
}  # fmt: skip


def _fp8(recipe: Recipe, unquantised: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": list(unquantised),
    }


# compressed-tensors' words for how weights, and the activations with them, are scaled.
STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp8": ({"strategy": "tensor"}, {"strategy": "token"}),
    "fp8-row": ({"strategy": "channel"}, {"strategy": "token"}),
    "fp8-block": (
        {"strategy": "block", "block_structure": [128, 128]},
        {"strategy": "group", "group_size": 128},
    ),
}


def _compressed_tensors(recipe: Recipe, unquantised: Sequence[str]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    weights, activations = STRATEGIES[recipe.quant]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": list(unquantised),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, **weights, "dynamic": False},
                "input_activations": {**common, **activations, "dynamic": True},
            }
        },
    }


SAID = {"fp8": _fp8, "compressed-tensors": _compressed_tensors}


def modelopt_file(recipe: Recipe, unquantised: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`hf_quant_config.json`, by its name, where the profile's engines look into it."""
    only_cache = recipe.quant == "none" and recipe.kv_cache != "none"
    if not only_cache and (recipe.quant == "none" or written(recipe).said != "modelopt"):
        return {}
    quantization: dict[str, Any] = {
        "quant_algo": ALGORITHMS.get(recipe.quant),
        "kv_cache_quant_algo": _cache_algorithm(recipe),
        "exclude_modules": [] if only_cache else list(unquantised),
    }
    if recipe.quant == "nvfp4":
        quantization["group_size"] = 16
    # Engines go by the producer's name.
    return {HF_QUANT_CONFIG: {"producer": {"name": "modelopt"}, "quantization": quantization}}
