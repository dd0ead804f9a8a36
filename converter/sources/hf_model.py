"""Hugging Face's tensors as logical views, by the names of a family's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..claims import Claims
from ..hf_family import Family
from ..logical import (
    Attention,
    Further,
    Half,
    LatentAttention,
    Layer,
    LowRank,
    Mlp,
    Model,
    Moe,
    Norm,
    Projection,
)
from ..model import ModelSpec

Sizes = tuple[int | None, ...]
Biases = tuple[torch.Tensor | None, torch.Tensor | None]


def read_hf_model(tensors: Mapping[str, torch.Tensor], spec: ModelSpec, family: Family) -> Model:
    """The logical views of a whole model; every tensor is claimed once.

    Raises:
        MissingTensorError, UnknownTensorError, ShapeError: the tensors do not fit the facts.
    """
    claims = Claims(tensors, {})
    model = _Reader(claims, spec, family).model()
    claims.finish()
    return model


class _Reader:
    def __init__(self, claims: Claims, spec: ModelSpec, family: Family) -> None:
        self.claims, self.spec, self.family = claims, spec, family

    def model(self) -> Model:
        spec, hidden = self.spec, self.spec.hidden_size
        tied = spec.share_embeddings_and_output_weights
        names = self.family.names("output")
        # A tied model's file may hold the embedding twice.
        find = self.claims.take if tied else self.claims.need
        output = find(names, (None, hidden))
        return Model(
            embedding=self.claims.need(self.family.names("embedding"), (None, hidden)),
            positions=None,
            layers=tuple(_Layer(self, index).layer() for index in range(spec.num_layers)),
            final_norm=_Layer(self, 0).norm("final_norm", hidden),
            output=None if tied else output,
            further=tuple(self.further(spec.num_layers + n) for n in range(spec.further_layers)),
        )

    def further(self, index: int) -> Further:
        hidden, part = self.spec.hidden_size, _Layer(self, index)
        tables = (
            self.claims.take(self.family.names(f"further.{name}", layer=index), (None, hidden))
            for name in ("embedding", "output")
        )
        embedding, output = tables
        return Further(
            layer=part.layer(),
            token_norm=part.norm("further.token_norm", hidden),
            hidden_norm=part.norm("further.hidden_norm", hidden),
            join=part.need("further.join", (hidden, 2 * hidden)),
            norm=part.norm("further.norm", hidden),
            embedding=embedding,
            output=output,
        )


class _Layer:
    """The parts of one layer."""

    def __init__(self, reader: _Reader, index: int) -> None:
        self.claims, self.spec, self.family = reader.claims, reader.spec, reader.family
        self.index = index

    def need(self, part: str, shape: Sizes, expert: int = 0, kind: str = "weight") -> torch.Tensor:
        return self.claims.need(self.family.names(part, kind, self.index, expert), shape)

    def bias(self, part: str, size: int, expected: bool, expert: int = 0) -> torch.Tensor | None:
        return self.need(part, (size,), expert, "bias") if expected else None

    def norm(self, part: str, size: int) -> Norm:
        bias = self.bias(part, size, self.spec.normalization == "LayerNorm")
        return Norm(self.need(part, (size,)), bias, self.spec.norm_shift)

    def maybe_norm(self, part: str, size: int) -> Norm | None:
        return self.norm(part, size) if self.family.module(part) else None

    def layer(self) -> Layer:
        hidden = self.spec.hidden_size
        return Layer(
            input_norm=self.norm("input_norm", hidden),
            attention=self.latent() if self.spec.kv_lora_rank else self.attention(),
            mlp_norm=self.norm("mlp_norm", hidden),
            mlp=self.moe() if self.spec.is_moe(self.index) else self.dense(),
            attention_out_norm=self.maybe_norm("attention_out_norm", hidden),
            mlp_out_norm=self.maybe_norm("mlp_out_norm", hidden),
        )

    def attention(self) -> Attention:
        """Rows are heads in order: no permutation, for both sides rotate halves of a head.

        (Only the first Llama files, before they were converted for transformers, paired
        neighbouring elements.)
        """
        spec, head = self.spec, self.spec.kv_channels
        groups, each = spec.num_query_groups, spec.queries_per_group
        out = self.need("out", (spec.hidden_size, spec.num_attention_heads * head))
        sinks = None
        if "sinks" in self.family.tensors:
            sinks = self.need("sinks", (spec.num_attention_heads,)).unflatten(0, (groups, each))
        return Attention(
            self.projection("q", (groups, each, head)),
            self.projection("k", (groups, head)),
            self.projection("v", (groups, head)),
            out=out.unflatten(1, (groups, each, head)),
            out_bias=self.bias("out", spec.hidden_size, spec.has_out_bias),
            q_norm=self.norm("q_norm", head) if spec.qk_layernorm else None,
            k_norm=self.norm("k_norm", head) if spec.qk_layernorm else None,
            sinks=sinks,
        )

    def projection(self, part: str, axes: tuple[int, ...]) -> Projection:
        rows = torch.Size(axes).numel()
        weight = self.need(part, (rows, self.spec.hidden_size))
        bias = self.bias(part, rows, self.spec.has_qkv_bias)
        return Projection(
            weight.unflatten(0, axes), None if bias is None else bias.unflatten(0, axes)
        )

    def latent(self) -> LatentAttention:
        spec, hidden = self.spec, self.spec.hidden_size
        heads, rotated = spec.num_attention_heads, spec.qk_pos_emb_head_dim
        q_rows = heads * (spec.qk_head_dim + rotated)
        kv_rows = heads * (spec.qk_head_dim + spec.v_head_dim)
        rank = spec.kv_lora_rank
        return LatentAttention(
            q=self.low_rank("q", spec.q_lora_rank, spec.q_lora_rank, q_rows)
            if spec.q_lora_rank
            else self.need("q", (q_rows, hidden)),
            kv=self.low_rank("kv", rank + rotated, rank, kv_rows),
            out=self.need("out", (hidden, heads * spec.v_head_dim)),
        )

    def low_rank(self, part: str, down: int, rank: int, rows: int) -> LowRank:
        return LowRank(
            down=self.need(f"{part}_down", (down, self.spec.hidden_size)),
            norm=self.norm(f"{part}_down_norm", rank),
            up=self.need(f"{part}_up", (rows, rank)),
        )

    def dense(self) -> Mlp:
        return self.mlp("", self.spec.ffn_hidden_size, self.spec.has_mlp_bias)

    def mlp(self, prefix: str, width: int, bias: bool, expert: int = 0) -> Mlp:
        hidden = self.spec.hidden_size

        def half(part: str) -> Half:
            weight = self.need(prefix + part, (width, hidden), expert)
            return Half(weight, self.bias(prefix + part, width, bias, expert))

        return Mlp(
            half("gate") if self.spec.gated_linear_unit else None,
            half("up"),
            self.need(f"{prefix}down", (hidden, width), expert),
            self.bias(f"{prefix}down", hidden, bias, expert),
        )

    def moe(self) -> Moe:
        spec, count = self.spec, self.spec.num_moe_experts
        width = spec.moe_shared_expert_intermediate_size
        balanced = "router_bias" in self.family.tensors
        gated = bool(self.family.module("shared_gate"))
        return Moe(
            router=self.need("router", (count, spec.hidden_size)),
            router_bias=self.need("router_bias", (count,)) if balanced else None,
            experts=self.experts(),
            shared=self.mlp("shared.", width, False) if width else None,
            shared_gate=self.need("shared_gate", (1, spec.hidden_size)) if gated else None,
            router_linear_bias=self.bias("router", count, spec.moe_router_linear_bias),
        )

    def experts(self) -> tuple[Mlp, ...]:
        """One by one, or all of a layer in two tensors."""
        count, hidden, width = (
            self.spec.num_moe_experts, self.spec.hidden_size, self.spec.moe_ffn_hidden_size,
        )  # fmt: skip
        turned = self.family.alternating_experts
        both = (count, hidden, 2 * width) if turned else (count, 2 * width, hidden)
        first = self.claims.take(self.tensor("experts.gate_up"), both)
        if first is None:
            return tuple(self.mlp("expert.", width, False, expert) for expert in range(count))
        down = self.need(
            "experts.down", (count, width, hidden) if turned else (count, hidden, width)
        )
        if turned:
            first, down = first.mT, down.mT
        halves = [self.halves(one) for one in first.unbind(0)]
        biases, down_biases = self.expert_biases(count, width, hidden)
        return tuple(
            Mlp(Half(gate, gate_bias), Half(up, up_bias), second, second_bias)
            for (gate, up), (gate_bias, up_bias), second, second_bias in zip(
                halves, biases, down.unbind(0), down_biases, strict=True
            )
        )

    def tensor(self, part: str) -> tuple[str, ...]:
        return self.family.names(part, "", self.index)

    def halves(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[2F, …] → gate and up [F, …] each: one after the other, or row by row in turn."""
        if self.family.alternating_experts:
            return rows[0::2], rows[1::2]
        gate, up = rows.chunk(2)
        return gate, up

    def expert_biases(
        self, count: int, width: int, hidden: int
    ) -> tuple[Sequence[Biases], Sequence[torch.Tensor | None]]:
        """Of gate and up, and of down, for each expert."""
        if not self.spec.has_mlp_bias:
            return [(None, None)] * count, [None] * count
        first = self.need("experts.gate_up_bias", (count, 2 * width))
        second = self.need("experts.down_bias", (count, hidden))
        return [self.halves(one) for one in first.unbind(0)], second.unbind(0)
