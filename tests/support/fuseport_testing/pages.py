"""The documentation's pages: their blocks of code, and what those need to run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fuseport.converter import Recipe, convert_checkpoint

from . import te_states, tiny

ROOT = Path(__file__).resolve().parents[3]
PAGES = tuple(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
)
_FENCE = re.compile(
    r"(?:^`(?P<file>[\w.]+)`:\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)

# Eight heads, so that tp 8 divides them, and rows of whole MXFP8 pieces.
_FACTS = tiny.FACTS | {"hidden_size": 32, "num_attention_heads": 8, "ffn_hidden_size": 64}
_SHAPES = {
    "embedding.word_embeddings.weight": (32, 32),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 32),
    "decoder.layers.self_attention.linear_qkv.weight": (2, 48, 32),
    "decoder.layers.self_attention.linear_proj.weight": (2, 32, 32),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 32),
    "decoder.layers.mlp.linear_fc1.weight": (2, 128, 32),
    "decoder.layers.mlp.linear_fc2.weight": (2, 32, 64),
    "decoder.final_layernorm.weight": (32,),
    "output_layer.weight": (32, 32),
}
_LINEARS = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the file that the line before it names."""

    language: str
    text: str
    file: str | None


def blocks(page: Path) -> list[Block]:
    """A page's fenced blocks, in order."""
    return [
        Block(found["language"], found["text"], found["file"])
        for found in _FENCE.finditer(page.read_text())
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def write_sources(directory: Path) -> None:
    """The checkpoints that the pages name, of a few kilobytes."""
    weights = {name: torch.randn(shape) for name, shape in _SHAPES.items()}
    tiny.write_tiny(directory / "CHECKPOINT", weights, _FACTS)
    states = {
        f"decoder.layers.{name}._extra_state/shard_{layer}_2": te_states.saved(te_states.state_2())
        for name in _LINEARS
        for layer in range(2)
    }
    tiny.write_tiny(directory / "FP8_CHECKPOINT", weights | states, _FACTS)  # type: ignore[arg-type]
    other = directory / "HF_CHECKPOINT"
    convert_checkpoint(directory / "CHECKPOINT", other, Recipe(target="hf"))
    (other / "tokenizer.json").write_text("{}")
