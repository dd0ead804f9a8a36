"""A Hugging Face checkpoint of a tiny Llama made by hand: neither transformers nor Megatron."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

Entries = dict[str, dict[str, Any]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 11,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def tiny_tensors() -> dict[str, torch.Tensor]:
    """fp32 values that bf16 holds."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (11, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (8,),
            prefix + "post_attention_layernorm.weight": (8,),
            prefix + "self_attn.q_proj.weight": (8, 8),
            prefix + "self_attn.k_proj.weight": (4, 8),
            prefix + "self_attn.v_proj.weight": (4, 8),
            prefix + "self_attn.o_proj.weight": (8, 8),
            prefix + "mlp.gate_proj.weight": (12, 8),
            prefix + "mlp.up_proj.weight": (12, 8),
            prefix + "mlp.down_proj.weight": (8, 12),
        }
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).bfloat16().float()
        for name, shape in shapes.items()
    }


def entries_of(tensors: Mapping[str, torch.Tensor]) -> Entries:
    """A header of these fp32 tensors, one behind the other."""
    entries: Entries = {}
    end = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    return entries


def write_file(
    path: Path, tensors: Mapping[str, torch.Tensor], header: bytes | None = None
) -> None:
    """A safetensors file, with another header if one is given."""
    text = json.dumps(entries_of(tensors)).encode() if header is None else header
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_hf_tiny(path: Path, shards: int = 1, **config: Any) -> Path:
    """A whole checkpoint, in one file or in shards with an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    tensors = tiny_tensors()
    if shards == 1:
        write_file(path / "model.safetensors", tensors)
        return path
    names = list(tensors)
    files = {name: f"part{place % shards}.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        write_file(path / file, {name: tensors[name] for name in names if files[name] == file})
    write_index(path, files)
    return path


def write_index(path: Path, files: Mapping[str, object]) -> None:
    """The index of a checkpoint in shards."""
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def read_index(path: Path) -> dict[str, str]:
    """Tensor → file."""
    text = (path / "model.safetensors.index.json").read_text()
    files: dict[str, str] = json.loads(text)["weight_map"]
    return files
