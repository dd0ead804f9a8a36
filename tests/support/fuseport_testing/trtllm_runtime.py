"""Computes logits from a unified checkpoint directory, in fp32, by the meaning of the format.

Each rank's file is used as that rank would use it: its own q, k and v heads, its own columns, a
sum over ranks where the engine has an all-reduce. What every rank must hold alike is compared.
Missing and unexpected tensors and wrong shapes are errors. One departure: `gelu` is exact as in
Megatron, where the engine has the tanh approximation, for this checks where weights lie; Gemma's
is that approximation on both sides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm, linear, relu, rms_norm, silu

LAYER_NORM_ARCHITECTURES = {"GPTForCausalLM", "FalconForCausalLM", "NemotronForCausalLM"}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "swiglu": silu,
    "gelu": gelu,
    "geglu": gelu,
    "squared-relu": lambda x: relu(x).square(),
}


def runtime_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Token ids int64 [B, S] → logits fp32 [B, S, vocab_size]."""
    config = json.loads((directory / "config.json").read_text())
    mapping = config["mapping"]
    tp, pp = mapping["tp_size"], mapping["pp_size"]
    assert mapping["world_size"] == tp * pp
    stages = [
        Stage(config, [_Rank(directory, stage * tp + rank) for rank in range(tp)])
        for stage in range(pp)
    ]
    hidden = stages[0].embed(tokens)
    for index, stage in enumerate(stages):
        for layer in range(_stage_length(config["num_hidden_layers"], pp, index)):
            hidden = stage.layer(layer, hidden)
    logits = stages[-1].head(hidden)
    unused = {name for stage in stages for rank in stage.ranks for name in rank.unused}
    assert not unused, f"never read: {sorted(unused)}"
    return logits


def _stage_length(layers: int, pp: int, stage: int) -> int:
    return layers // pp + (1 if stage < layers % pp else 0)


class _Rank:
    """One rank's file. Knows what has been read."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._tensors = load_file(str(directory / f"rank{rank}.safetensors"))
        self.unused = set(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        self.unused.discard(name)
        return self._tensors[name].float()

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


class Stage:
    """The ranks of one pipeline stage, which hold the same layers."""

    def __init__(self, config: dict[str, Any], ranks: list[_Rank]) -> None:
        self.config = config
        self.ranks = ranks
        self.tp = len(ranks)
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads", self.heads)
        self.head_size: int = config.get("head_size", config["hidden_size"] // self.heads)
        self.activation = ACTIVATIONS[config["hidden_act"]]
        if config["architecture"] == "GemmaForCausalLM":
            self.activation = partial(gelu, approximate="tanh")

    def same(self, name: str) -> torch.Tensor | None:
        """What all ranks hold alike, or None where none has it."""
        if name not in self.ranks[0]:
            return None
        first = self.ranks[0][name]
        assert all(torch.equal(first, rank[name]) for rank in self.ranks), f"{name} differs"
        return first

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The architecture's norm over the last dimension."""
        weight, bias = self.same(f"{name}.weight"), self.same(f"{name}.bias")
        assert weight is not None, f"{name}.weight is missing"
        eps: float = self.config.get("norm_epsilon", 1e-5)
        if self.config["architecture"] in LAYER_NORM_ARCHITECTURES:
            return layer_norm(x, weight.shape, weight, bias, eps)
        assert bias is None, f"{name}: RMSNorm has no bias"
        return rms_norm(x, weight.shape, weight, eps)

    # -- both ends

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] → hidden states [B, S, H]."""
        words = self._table("transformer.vocab_embedding.weight", self.config["vocab_size"])
        hidden = words[tokens]
        if self.config["architecture"] == "GemmaForCausalLM":
            hidden = hidden * math.sqrt(self.config["hidden_size"])
        if self.config["position_embedding_type"] == "learned_absolute":
            length: int = self.config["max_position_embeddings"]
            positions = self._table("transformer.position_embedding.weight", length)
            hidden = hidden + positions[: tokens.shape[1]]
        return hidden

    def _table(self, name: str, rows: int) -> torch.Tensor:
        if not self.config.get("use_parallel_embedding", False):
            table = self.same(name)
            assert table is not None, f"{name} is missing"
            assert table.shape[0] == rows, (name, table.shape)
            return table
        dim: int = self.config.get("embedding_sharding_dim", 0)
        table = torch.cat([rank[name] for rank in self.ranks], dim)
        padded = math.ceil(rows / self.tp) * self.tp if dim == 0 else rows
        assert table.shape == (padded, self.config["hidden_size"]), (name, table.shape)
        assert not table[rows:].any(), f"{name}: the padding is not zero"
        return table[:rows]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, H] → logits [B, S, vocab_size]."""
        hidden, vocab = self.norm("transformer.ln_f", hidden), self.config["vocab_size"]
        if "lm_head.weight" not in self.ranks[0]:
            assert self.config["share_embedding_table"], "lm_head.weight is missing"
            return linear(hidden, self._table("transformer.vocab_embedding.weight", vocab))
        shards = [rank["lm_head.weight"] for rank in self.ranks]
        assert all(len(shard) == math.ceil(vocab / self.tp) for shard in shards), "lm_head rows"
        logits = torch.cat([linear(hidden, shard) for shard in shards], -1)
        assert not logits[..., vocab:].any(), "lm_head's padding is not zero"
        return logits[..., :vocab]

    # -- one layer

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """One transformer layer; `index` counts within the stage."""
        name = f"transformer.layers.{index}."
        attended = self.attention(name + "attention.", self.norm(name + "input_layernorm", hidden))
        if self.config.get("parallel_attention", False):
            normed = self.norm(name + "mlp_layernorm", hidden)
            return hidden + attended + self.feed_forward(name + "mlp.", normed)
        hidden = hidden + attended
        normed = self.norm(name + "post_layernorm", hidden)
        return hidden + self.feed_forward(name + "mlp.", normed)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Self-attention: the sum of what the ranks' heads give, and the bias once."""
        partial = [self._heads(name, rank, x) for rank in self.ranks]
        return _plus(torch.stack(partial).sum(0), self.same(name + "dense.bias"))

    def _heads(self, name: str, rank: _Rank, x: torch.Tensor) -> torch.Tensor:
        """One rank's heads: [B, S, H] → its share of the sum [B, S, H]."""
        queries, keys = self.heads // self.tp, max(1, self.kv_heads // self.tp)
        qkv = linear(x, rank[name + "qkv.weight"], _optional(rank, name + "qkv.bias"))
        heads = qkv.unflatten(-1, (queries + 2 * keys, self.head_size)).transpose(1, 2)
        q, k, v = heads.split([queries, keys, keys], dim=1)
        if self.config.get("qk_layernorm", False):
            q, k = self.norm(name + "q_layernorm", q), self.norm(name + "k_layernorm", k)
        if self.config["position_embedding_type"] == "rope_gpt_neox":
            q, k = self._rotate(q), self._rotate(k)
        k, v = (part.repeat_interleave(queries // keys, 1) for part in (k, v))
        mixed = _causal_softmax(q @ k.mT / math.sqrt(self.head_size)) @ v
        return linear(mixed.transpose(1, 2).flatten(2), rank[name + "dense.weight"])

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions on [B, heads, S, D]: halves of the rotated part are paired."""
        width = int(self.head_size * self.config.get("rotary_pct", 1.0))
        rates = self.config["rotary_base"] ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.arange(x.shape[2]).float()[:, None] * rates
        cos, sin = angles.cos(), angles.sin()
        first, second, rest = x.split([width // 2, width // 2, self.head_size - width], -1)
        turned = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(turned, -1)

    def feed_forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The MLP or the experts of a layer."""
        if name + "router.weight" not in self.ranks[0]:
            return self.mlp(name, x)
        mixed = self.experts(name, x)
        if name + "shared_expert.fc.weight" not in self.ranks[0]:
            return mixed
        shared = self.mlp(name + "shared_expert.", x)
        gate = self.same(name + "shared_expert_gate.weight")
        return mixed + (shared if gate is None else shared * linear(x, gate).sigmoid())

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """proj(act(fc(x)) * gate(x)), or proj(act(fc(x))) where there is no gate."""
        total = torch.zeros_like(x)
        for rank in self.ranks:
            inner = linear(x, rank[name + "fc.weight"], _optional(rank, name + "fc.bias"))
            inner = self.activation(inner)
            if name + "gate.weight" in rank:
                gate_bias = _optional(rank, name + "gate.bias")
                inner = inner * linear(x, rank[name + "gate.weight"], gate_bias)
            total = total + linear(inner, rank[name + "proj.weight"])
        return _plus(total, self.same(name + "proj.bias"))

    def experts(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Each token's top-k experts, weighted; ranks run expert-parallel fastest."""
        weights = self._routing(name, x)
        moe_ep: int = self.config["mapping"]["moe_ep_size"]
        total = torch.zeros_like(x)
        for position, rank in enumerate(self.ranks):
            fc, proj = rank[name + "fc.weight"], rank[name + "proj.weight"]
            assert len(fc) * moe_ep == weights.shape[-1], (name, fc.shape)
            for local, (up_and_gate, down) in enumerate(zip(fc, proj, strict=True)):
                expert = position % moe_ep * len(fc) + local
                inner = self._expert_inner(linear(x, up_and_gate), down.shape[1])
                total = total + linear(inner, down) * weights[..., expert, None]
        return total

    def _expert_inner(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """Rows of an expert's fc are [up; gate], the gate being the activated part."""
        if x.shape[-1] == width:
            return self.activation(x)
        up, gate = x.chunk(2, -1)
        return up * self.activation(gate)

    def _routing(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Weights [B, S, E], zero for experts that were not chosen."""
        router, moe = self.same(name + "router.weight"), self.config["moe"]
        assert router is not None
        assert self.ranks[0].dtype(name + "router.weight") == torch.float32
        assert len(router) == moe["num_experts"]
        scores = linear(x, router).softmax(-1)
        chosen = scores.topk(moe["top_k"], -1)
        # 1 is RENORMALIZE: the chosen experts' weights add up to one.
        scale = chosen.values.sum(-1, keepdim=True) if moe["normalization_mode"] == 1 else 1.0
        return torch.zeros_like(scores).scatter(-1, chosen.indices, chosen.values / scale)


def _optional(rank: _Rank, name: str) -> torch.Tensor | None:
    return rank[name] if name in rank else None  # noqa: SIM401


def _plus(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias


def _causal_softmax(scores: torch.Tensor) -> torch.Tensor:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1)
