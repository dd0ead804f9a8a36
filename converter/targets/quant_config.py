"""How engines are told what is quantised.

Sources: TensorRT-LLM 1.2's `QuantConfig` for the unified checkpoint; transformers' fp8 format
(`quant_method: fp8`), which vLLM, SGLang and TensorRT-LLM read too; compressed-tensors'
`float-quantized` for scales of rows; ModelOpt's `hf_quant_config.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..recipe import Recipe

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
        "kv_cache_quant_algo": None,
    }
    if recipe.quant != "none":
        named = unquantised if recipe.pp_size == 1 else ()
        values["exclude_modules"] = sorted({*recipe.exclude, *UNIFIED_EXCLUDES, *named})
    return values


# Modules that are linear to TensorRT-LLM, and never quantised here.
UNIFIED_EXCLUDES = ("*.router", "transformer.vocab_embedding", "transformer.position_embedding")


def hf_quantization(recipe: Recipe, unquantised: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json; empty if ModelOpt's file says it, or nothing is."""
    if recipe.quant == "fp8-block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": list(unquantised),
        }
    if recipe.quant == "fp8-row":
        return _compressed_tensors(unquantised)
    return {}


def _compressed_tensors(unquantised: Sequence[str]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": list(unquantised),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
    }


def modelopt_file(recipe: Recipe, unquantised: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`hf_quant_config.json`, by its name, for the schemes that ModelOpt defines."""
    if recipe.quant not in ("fp8", "mxfp8", "nvfp4"):
        return {}
    quantization: dict[str, Any] = {
        "quant_algo": ALGORITHMS[recipe.quant],
        "kv_cache_quant_algo": None,
        "exclude_modules": list(unquantised),
    }
    if recipe.quant == "nvfp4":
        quantization["group_size"] = 16
    # Engines go by the producer's name.
    return {HF_QUANT_CONFIG: {"producer": {"name": "modelopt"}, "quantization": quantization}}
