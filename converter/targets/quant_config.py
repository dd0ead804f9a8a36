"""How engines are told what is quantised.

Sources: TensorRT-LLM 1.2's `QuantConfig` for the unified checkpoint; transformers' fp8 format
(`quant_method: fp8`), which vLLM, SGLang and TensorRT-LLM read too; compressed-tensors'
`float-quantized` for scales of rows; ModelOpt's words, which its releases since 0.31 write into
config.json and, in an older form, into `hf_quant_config.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..recipe import Recipe
from .profiles import Written, written

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
# Recipe.quant → TensorRT-LLM's name, for the schemes that a unified checkpoint has.
ALGORITHMS = {"fp8": "FP8", "fp8-row": "FP8_PER_CHANNEL_PER_TOKEN"}


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


def hf_quantization(
    recipe: Recipe, unquantised: Sequence[str], static: bool
) -> dict[str, dict[str, Any]]:
    """How engines of the Hugging Face layout are told: "config.json" → its `quantization_config`.

    With ModelOpt's words also `hf_quant_config.json`, in its older form, which TensorRT-LLM reads
    first. Empty if nothing is quantised.

    Args:
        unquantised: linears that stay as they are.
        static: whether there are static scales of activations.
    """
    cache = {"kv_cache_scheme": _STATIC_FP8} if recipe.kv_cache == "fp8" else {}
    if recipe.quant == "none":
        return _only_cache(recipe, cache) if cache else {}
    row = written(recipe, static)
    said = {CONFIG: cache | SAID[row.said](recipe, row, unquantised)}
    if row.algorithm is None:
        return said
    return said | {HF_QUANT_CONFIG: _modelopt_file(recipe, row.algorithm, unquantised)}


def _only_cache(recipe: Recipe, cache: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Where the KV cache alone is quantised: under ModelOpt's words vLLM loads no such weights."""
    if recipe.profile == "trtllm":
        return {HF_QUANT_CONFIG: _modelopt_file(recipe, None, [])}
    return {CONFIG: {**_PACKED, "format": "dense", "ignore": [], "config_groups": {}, **cache}}


# compressed-tensors' description of keys and values in e4m3 with scales that are in the file.
_STATIC_FP8 = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False
}  # fmt: skip


def _fp8(recipe: Recipe, row: Written, unquantised: Sequence[str]) -> dict[str, Any]:
    blocks = {"weight_block_size": [128, 128]} if recipe.quant == "fp8-block" else {}
    # Beside `kv_cache_scheme`: SGLang 0.5 looks for this word here.
    cache = {} if recipe.kv_cache == "none" else {"kv_cache_quant_algo": _cache_algorithm(recipe)}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        **blocks,
        **cache,
        "modules_to_not_convert": list(unquantised),
    }


_PACKED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
# Its words for how weights, and the activations with them, are scaled.
STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp8": ({"strategy": "tensor"}, {"strategy": "token"}),
    "fp8-row": ({"strategy": "channel"}, {"strategy": "token"}),
    "fp8-block": (
        {"strategy": "block", "block_structure": [128, 128]},
        {"strategy": "group", "group_size": 128},
    ),
}


def _compressed_tensors(recipe: Recipe, row: Written, unquantised: Sequence[str]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    weights, activations = STRATEGIES[recipe.quant]
    return {
        **_PACKED,
        "format": "float-quantized",
        "ignore": list(unquantised),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, **weights, "dynamic": False},
                "input_activations": {**common, **activations, "dynamic": True},
            }
        },
    }


# Engines go by the producer's name.
_PRODUCER = {"producer": {"name": "modelopt"}}
_GROUPS = {"nvfp4": {"group_size": 16}}


def _modelopt(recipe: Recipe, row: Written, unquantised: Sequence[str]) -> dict[str, Any]:
    """The newer form. vLLM 0.33 takes MXFP8 in this one alone."""
    return {
        **_PRODUCER,
        "quant_method": "modelopt",
        "quant_algo": row.algorithm,
        **_GROUPS.get(recipe.quant, {}),
        "ignore": list(unquantised),
    }


def _modelopt_file(
    recipe: Recipe, algorithm: str | None, unquantised: Sequence[str]
) -> dict[str, Any]:
    """The older form."""
    quantization = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": _cache_algorithm(recipe),
        "exclude_modules": list(unquantised),
        **_GROUPS.get(recipe.quant, {}),
    }
    return {**_PRODUCER, "quantization": quantization}


SAID = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt}
