"""Quantised checkpoints in the Hugging Face layout: what they say, and which scales are whose.

Sources: transformers' fp8 format (`quant_method: fp8`), compressed-tensors' `float-quantized`, and
ModelOpt's `hf_quant_config.json`, which goes before `config.json` where both are there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import MissingTensorError, ShapeError, SourceError, UnsupportedOptionError
from .dequantised import PACKINGS, Dequantised, Packing, dequantised
from .safetensors_file import read_object
from .stored import Stored

MODELOPT = "hf_quant_config.json"
BLOCK = [128, 128]
# ModelOpt's and compressed-tensors' words → the scheme.
ALGORITHMS = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8-row",
    "FP8_BLOCK_SCALES": "fp8-block",
    "FP8_PB_WO": "fp8-block",
    "MXFP8": "mxfp8",
}
STRATEGIES = {"tensor": "fp8", "channel": "fp8-row", "block": "fp8-block"}
SUFFIXES = ("weight_scale_inv", "weight_scale")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
# Scales of values that are no weights: how activations and KV caches are quantised is the target's
# matter.
_OTHERS = re.compile(r"\.(input_scale|output_scale|[kvq]_scale|kv_cache_scale)$")
NOT_HANDED_ON = "a scale of activations or of the KV cache, which is not handed on"


def packing_of(path: Path, config: Mapping[str, object]) -> Packing | None:
    """How a checkpoint's weights are quantised; None if they are not.

    Raises:
        UnsupportedOptionError: in a way that is not read.
        SourceError: what it says of it makes no sense.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    try:
        if (path / MODELOPT).is_file():
            file: Mapping[str, object] = read_object(path / MODELOPT)
            quant, said = _modelopt(file), file
        elif given:
            said = given  # type: ignore[assignment]
            quant = METHODS.get(str(said.get("quant_method")), lambda _: None)(said)
        else:
            return None
    except (TypeError, AttributeError, ValueError) as error:
        raise SourceError(f"{path}: its quantisation config makes no sense: {error!r}") from error
    if quant is None:
        raise UnsupportedOptionError(
            f"{path} is quantised ({_short(said)}) in a way that is not read: quantization_config "
            f"must say e4m3 weights with a scale for a tensor, a row, 128 × 128 or (MXFP8) 1 × 32; "
            f"give a checkpoint of those, or one in bf16, fp16 or fp32"
        )
    return PACKINGS[quant]


def _short(said: Mapping[str, object]) -> str:
    names = ("quant_method", "quant_algo", "format", "weight_block_size", "quantization")
    return ", ".join(f"{name}: {said[name]!r}" for name in names if said.get(name) is not None)


def _modelopt(said: Mapping[str, object]) -> str | None:
    inner: Mapping[str, object] = said.get("quantization") or said  # type: ignore[assignment]
    return ALGORITHMS.get(str(inner.get("quant_algo")))


def _fp8(said: Mapping[str, object]) -> str | None:
    block = said.get("weight_block_size")
    if said.get("fmt") not in (None, "e4m3"):
        return None
    return "fp8" if block is None else "fp8-block" if block == BLOCK else None


def _compressed_tensors(said: Mapping[str, object]) -> str | None:
    groups: Mapping[str, Mapping[str, Mapping[str, object]]] = said.get("config_groups") or {}  # type: ignore[assignment]
    found = {_strategy(group["weights"]) for group in groups.values()}
    return found.pop() if len(found) == 1 else None


def _strategy(weights: Mapping[str, object]) -> str | None:
    fits = weights.get("num_bits") == 8 and weights.get("type") == "float"
    block = weights.get("block_structure") in (None, BLOCK)
    return STRATEGIES.get(str(weights.get("strategy"))) if fits and block else None


METHODS = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt}


def paired(tensors: Mapping[str, Stored], packing: Packing) -> dict[str, Stored]:
    """The tensors, each weight of codes with its scales in it.

    Raises:
        MissingTensorError, ShapeError, UnsupportedOptionError: the scales of one are not there, or
            do not fit.
    """
    result = dict(tensors)
    for name, codes in tensors.items():
        if codes.dtype is torch.float8_e4m3fn:
            module = name.removesuffix(".weight")
            scale = next((one for one in _scale_names(module) if one in result), None)
            if scale is None:
                raise MissingTensorError(
                    f"{name} is e4m3, and there are no scales for it ({module}.{SUFFIXES[0]} or "
                    f"{module}.{SUFFIXES[1]}); copy the checkpoint completely"
                )
            result[name] = _dequantised(codes, result.pop(scale), packing)
    return result


def other_scales(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Scales that are not a weight's, with the reason why they are left out."""
    return {name: NOT_HANDED_ON for name in tensors if _OTHERS.search(name)}


def _scale_names(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{suffix}" for suffix in SUFFIXES)


def _dequantised(codes: Stored, scales: Stored, packing: Packing) -> Dequantised:
    if len(codes.shape) != 2:
        raise UnsupportedOptionError(
            f"{codes.name}: e4m3 of shape {list(codes.shape)}; quantised weights are read as "
            f"matrices [out, in] only"
        )
    rows, columns = codes.shape
    down, across = packing.grid(rows, columns)
    if scales.numel != down * across or scales.dtype not in SCALE_DTYPES:
        raise ShapeError(
            f"{scales.name} is {scales.dtype} {list(scales.shape)}, expected {down} × {across} "
            f"scales for {codes.name} {list(codes.shape)} quantised as {packing.quant}"
        )
    return dequantised(codes.name, codes, scales, packing)
