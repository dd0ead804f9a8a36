"""Loads a quantised Hugging Face checkpoint as an engine would: by what its settings say.

Plain torch, and nothing of the package: codes are widened by torch's own cast, scales are spread
over the elements that they are for. A weight without scales, or a scale that no weight has used,
is an error.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
Decode = Callable[..., torch.Tensor]

# What codes are stored as, and what NVFP4's second scale is called.
CODES, SECOND = (torch.float8_e4m3fn, torch.uint8), ".weight_scale_2"


def stored_tensors(directory: Path) -> State:
    """Every tensor of a directory's files, as it lies there."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def dequantised(directory: Path) -> State:
    """The weights in fp32."""
    tensors = stored_tensors(directory)
    suffix, decode = how(directory)
    scales = {name for name in tensors if name.endswith((suffix, SECOND))}
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype in CODES and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            own = [f"{module}{end}" for end in (suffix, SECOND) if f"{module}{end}" in tensors]
            scales.difference_update(own)
            codes = tensor if tensor.dtype is torch.uint8 else tensor.float()
            result[name] = decode(codes, *(tensors[one] for one in own))
        elif not name.endswith((suffix, SECOND)):
            result[name] = tensor.float()
    assert not scales, f"never used: {sorted(scales)}"
    return result


def how(directory: Path) -> tuple[str, Decode]:
    """The ending of a scale's name, and what codes and scales mean."""
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    if said["quant_method"] == "modelopt":
        check_same(said, json.loads((directory / "hf_quant_config.json").read_text()))
        return ".weight_scale", MODELOPT[said["quant_algo"]]
    if said["quant_method"] == "fp8":
        assert said["activation_scheme"] == "dynamic"
        if "weight_block_size" not in said:
            return ".weight_scale", _scalar
        assert said["weight_block_size"] == [128, 128]
        return ".weight_scale_inv", _blocks
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "float-quantized")
    (group,) = said["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["type"]) == (8, "float")
    return ".weight_scale", STRATEGIES[group["weights"]["strategy"]]


def check_same(newer: dict[str, Any], older: dict[str, Any]) -> None:
    """ModelOpt's two forms say the same: engines differ in which they read."""
    inner = older["quantization"]
    assert newer["producer"] == older["producer"] == {"name": "modelopt"}
    assert newer["ignore"] == inner["exclude_modules"]
    assert ("kv_cache_scheme" in newer) is (inner["kv_cache_quant_algo"] == "FP8")
    for name in ("quant_algo", "group_size"):
        assert newer.get(name) == inner.get(name), name


def _scalar(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    assert scale.shape == (), scale.shape
    return codes * scale


def _one(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    assert scale.shape == (1,), scale.shape
    return codes * scale


def _tokens(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    assert scale.shape == (len(codes),), scale.shape
    return codes * scale[:, None]


def _channels(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    assert scale.shape == (len(codes), 1), scale.shape
    return codes * scale


def _blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    assert scale.shape == tuple(math.ceil(size / 128) for size in codes.shape), scale.shape
    rows, columns = (torch.arange(size) // 128 for size in codes.shape)
    return codes * scale[rows][:, columns]


def _mx(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    assert scale.shape == (rows, columns // 32)
    factors = torch.exp2(scale.double() - 127).float()
    return (codes.view(rows, -1, 32) * factors[..., None]).view(rows, columns)


def _nv(packed: torch.Tensor, scale: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    rows, columns = packed.shape
    assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (rows, columns // 8))
    assert (second.dtype, second.shape) == (torch.float32, ())
    codes = torch.stack((packed & 15, packed >> 4), -1).view(rows, -1, 16)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[(codes & 7).long()]
    values = torch.where(codes < 8, magnitudes, -magnitudes)
    return (values * (scale.float() * second)[..., None]).view(rows, 2 * columns)


MODELOPT: dict[str, Decode] = {
    "FP8": _scalar,
    "FP8_PER_CHANNEL_PER_TOKEN": _tokens,
    "MXFP8": _mx,
    "NVFP4": _nv,
    "W4A16_NVFP4": _nv,
}
STRATEGIES: dict[str, Decode] = {"tensor": _one, "channel": _channels, "block": _blocks}


def write_plain(directory: Path, out: Path) -> Path:
    """The same model in fp32, as a checkpoint that says nothing of quantisation."""
    out.mkdir()
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    if (directory / "generation_config.json").is_file():
        shutil.copy(directory / "generation_config.json", out)
    save_file(dequantised(directory), out / "model.safetensors", {"format": "pt"})
    return out
