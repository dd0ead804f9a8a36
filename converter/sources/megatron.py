"""Megatron-Core's tensors as logical views.

A part is found under exactly one of the spellings in `megatron_names`; a key that no part claims is
an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..blocks import Block
from ..claims import Claims
from ..logical import (
    Attention,
    Further,
    Half,
    LatentAttention,
    Layer,
    Linear,
    LowRank,
    Mlp,
    Model,
    Moe,
    Norm,
    Projection,
)
from ..model import ModelSpec
from .megatron_names import FURTHER, FURTHER_LAYER, IGNORED, SPELLINGS, mlp_spellings
from .megatron_parts import assemble, experts_first, gate_and_up, split_qkv


def read_model(
    tensors: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    claims_type: type[Claims] = Claims,
    alike: Mapping[int, int] = MappingProxyType({}),
) -> Model:
    """The logical views of a whole model (or of one shard, with the shard's own spec).

    Args:
        tensors: by Megatron-Core's in-memory names with layer numbers; real or meta tensors.
        spec: the facts that these tensors follow.
        claims_type: what happens when a tensor is missing; an error by default.
        alike: layers that are not read, since they are like an earlier one: they become that.

    Raises:
        MissingTensorError, UnknownTensorError, ShapeError: the tensors do not fit the facts.
    """
    claims = claims_type(tensors, IGNORED)
    reader = _Reader(claims, spec, alike)
    model = reader.model()
    claims.finish()
    return model


class _Reader:
    def __init__(self, claims: Claims, spec: ModelSpec, alike: Mapping[int, int]) -> None:
        self.claims = claims
        self.spec = spec
        self.alike = alike

    def _layers(self) -> tuple[Layer, ...]:
        layers: list[Layer] = []
        for index in range(self.spec.num_layers):
            first = self.alike.get(index)
            layers.append(
                self._layer(index, f"decoder.layers.{index}.") if first is None else layers[first]
            )
        return tuple(layers)

    def model(self) -> Model:
        hidden = self.spec.hidden_size
        model = Model(
            embedding=self._whole("embedding", (None, hidden)),
            positions=self._whole("positions", (None, hidden)),
            layers=self._layers(),
            final_norm=self._final_norm(),
            output=self._output(),
        )
        further = tuple(self._further(model, index) for index in range(self.spec.further_layers))
        return dataclasses.replace(model, further=further)

    def _further(self, model: Model, index: int) -> Further:
        """Embedding and output are the model's own: Megatron-Core shares them."""
        prefix, hidden = f"{FURTHER}layers.{index}.", self.spec.hidden_size
        scope = _Scope(self.claims, prefix, self.spec)
        token, state, last = (
            scope.norm(f"further.{part}", hidden) for part in ("token_norm", "hidden_norm", "norm")
        )
        inner = next((one for one in FURTHER_LAYER if self.claims.has(prefix + one)), "")
        return Further(
            layer=self._layer(self.spec.num_layers + index, prefix + (inner or FURTHER_LAYER[0])),
            token_norm=token,
            hidden_norm=state,
            join=scope.need("further.join", (hidden, 2 * hidden)),
            norm=last,
            embedding=model.embedding,
            output=model.output,
        )

    def _whole(self, part: str, shape: tuple[int | None, ...]) -> torch.Tensor | None:
        return self.claims.take(SPELLINGS[part], shape)

    def _final_norm(self) -> Norm | None:
        weight = self._whole("final_norm.weight", (self.spec.hidden_size,))
        if weight is None:
            return None
        expected = self.spec.normalization == "LayerNorm"
        bias = self.claims.want(SPELLINGS["final_norm.bias"], (self.spec.hidden_size,), expected)
        return Norm(weight, bias, self.spec.norm_shift)

    def _output(self) -> torch.Tensor | None:
        """A tied model's last pipeline stage keeps a copy of the embedding: it is not output."""
        output = self._whole("output", (None, self.spec.hidden_size))
        return None if self.spec.share_embeddings_and_output_weights else output

    def _layer(self, index: int, prefix: str) -> Layer:
        block, hidden = self.spec.block(index), self.spec.hidden_size
        scope = _Scope(self.claims, prefix, self.spec)
        return Layer(
            input_norm=scope.maybe_norm("input_norm", hidden, _if_full(block.attention)),
            attention=self._attention(scope, block),
            mlp_norm=scope.maybe_norm("mlp_norm", hidden, _if_full(block.mlp)),
            mlp=self._mlp(scope, block, index),
        )

    def _attention(
        self, scope: _Scope, block: Block
    ) -> Attention | LatentAttention | Linear | None:
        if block.attention != "full":
            return scope.linear("attention_linear", block) if block.attention == "linear" else None
        if self.spec.kv_lora_rank:
            return scope.latent()
        q, k, v = scope.qkv(block.num_query_groups)
        head = self.spec.kv_channels
        heads = self.spec.num_attention_heads
        out = scope.need("out.weight", (self.spec.hidden_size, heads * head))
        groups = block.num_query_groups
        return Attention(
            q, k, v,
            out=out.unflatten(1, (groups, heads // groups, head)),
            out_bias=scope.take("out.bias", (self.spec.hidden_size,), self.spec.add_bias_linear),
            q_norm=scope.maybe_norm("q_norm", head, self.spec.qk_layernorm),
            k_norm=scope.maybe_norm("k_norm", head, self.spec.qk_layernorm),
        )  # fmt: skip

    def _mlp(self, scope: _Scope, block: Block, index: int) -> Mlp | Moe | Linear | None:
        if block.mlp != "full":
            return scope.linear("mlp_linear", block) if block.mlp == "linear" else None
        if not self.spec.is_moe(index):
            return scope.mlp("dense", block.ffn_hidden_size)
        experts, hidden = self.spec.num_moe_experts, self.spec.hidden_size
        width = self.spec.moe_shared_expert_intermediate_size
        return Moe(
            router=scope.need("router", (experts, hidden)),
            router_bias=scope.take("router_bias", (experts,), None),
            experts=scope.experts(),
            shared=scope.mlp("shared", width) if width else None,
            shared_gate=scope.take("shared_gate", (1, hidden), None),
        )


class _Scope:
    """The parts of one layer."""

    def __init__(self, claims: Claims, prefix: str, spec: ModelSpec) -> None:
        self.claims = claims
        self.prefix = prefix
        self.spec = spec

    def take(self, part: str, shape: tuple[int, ...], expected: bool | None) -> torch.Tensor | None:
        return self._find(SPELLINGS[part], shape, expected)

    def need(self, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.claims.need(self._keys(SPELLINGS[part]), shape)

    def _keys(self, spellings: tuple[str, ...]) -> tuple[str, ...]:
        return tuple([self.prefix + spelling for spelling in spellings])

    def _find(
        self, spellings: tuple[str, ...], shape: tuple[int, ...], expected: bool | None
    ) -> torch.Tensor | None:
        """`expected` is what the facts say of the tensor; None where they say nothing."""
        keys = self._keys(spellings)
        if expected is None:
            return self.claims.take(keys, shape)
        return self.claims.want(keys, shape, expected)

    def norm(self, part: str, size: int) -> Norm:
        return self._norm(part, self.need(f"{part}.weight", (size,)), size)

    def maybe_norm(self, part: str, size: int, expected: bool | None) -> Norm | None:
        weight = self.take(f"{part}.weight", (size,), expected)
        return None if weight is None else self._norm(part, weight, size)

    def _norm(self, part: str, weight: torch.Tensor, size: int) -> Norm:
        bias = self.take(f"{part}.bias", (size,), self.spec.normalization == "LayerNorm")
        return Norm(weight, bias, self.spec.norm_shift)

    def linear(self, part: str, block: Block) -> Linear:
        hidden = self.spec.hidden_size
        return Linear(self.need(part, (block.linear_rows or hidden, hidden)))

    def qkv(self, groups: int) -> tuple[Projection, Projection, Projection]:
        """linear_qkv's rows are, for each query group: its query heads, then its key and value."""
        heads, head = self.spec.num_attention_heads, self.spec.kv_channels
        rows = (heads + 2 * groups) * head
        weight = self.need("qkv.weight", (rows, self.spec.hidden_size))
        parts = split_qkv(weight, groups, head)
        vector = self.take("qkv.bias", (rows,), self.spec.has_qkv_bias)
        biases = (None,) * 3 if vector is None else split_qkv(vector, groups, head)
        q, k, v = (Projection(w, b) for w, b in zip(parts, biases, strict=True))
        return q, k, v

    def latent(self) -> LatentAttention:
        """Rows in Hugging Face's order; both sides rotate neighbouring elements."""
        spec, heads = self.spec, self.spec.num_attention_heads
        rotated, rank = spec.qk_pos_emb_head_dim, spec.kv_lora_rank
        q_rows = heads * (spec.qk_head_dim + rotated)
        return LatentAttention(
            q=self.low_rank("q", spec.q_lora_rank, spec.q_lora_rank, q_rows)
            if spec.q_lora_rank
            else self.need("q.weight", (q_rows, spec.hidden_size)),
            kv=self.low_rank(
                "kv", rank + rotated, rank, heads * (spec.qk_head_dim + spec.v_head_dim)
            ),
            out=self.need("out.weight", (spec.hidden_size, heads * spec.v_head_dim)),
        )

    def low_rank(self, part: str, down: int, rank: int, rows: int) -> LowRank:
        norm = self.norm(f"{part}_down_norm", rank)
        return LowRank(
            down=self.need(f"{part}_down.weight", (down, self.spec.hidden_size)),
            norm=norm,
            up=self.need(f"{part}_up.weight", (rows, rank)),
        )

    def mlp(self, kind: str, width: int, expert: int = 0) -> Mlp:
        hidden, bias = self.spec.hidden_size, self.spec.add_bias_linear

        def take(part: str, shape: tuple[int, ...], expected: bool | None) -> torch.Tensor | None:
            return self._find(mlp_spellings(kind, part, expert), shape, expected)

        def need(part: str, shape: tuple[int, ...]) -> torch.Tensor:
            return self.claims.need(self._keys(mlp_spellings(kind, part, expert)), shape)

        down = need("fc2", (hidden, width))
        down_bias = take("fc2.bias", (hidden,), bias)
        if not self.spec.gated_linear_unit:
            up = Half(need("fc1", (width, hidden)), take("fc1.bias", (width,), bias))
            return Mlp(None, up, down, down_bias)
        gate, up = gate_and_up(take, need, width, hidden, bias)
        return Mlp(gate, up, down, down_bias)

    def experts(self) -> tuple[Mlp, ...]:
        """Experts as separate linears, stacked in one tensor, or in the legacy grouped form."""
        count, width = self.spec.local_experts, self.spec.moe_ffn_hidden_size
        hidden = self.spec.hidden_size
        halves = 2 if self.spec.gated_linear_unit else 1
        stacked = self.take("experts.fc2", (count, hidden, width), None)
        if stacked is not None:
            first = self.take("experts.fc1", (count, halves * width, hidden), None)
            firsts = self._singleton_halves() if first is None else experts_first(first, halves)
            return assemble(firsts, stacked)
        grouped = self.take("experts.weight2", (count * width, hidden), None)
        if grouped is not None:
            # Its memory is [E, F, H] and [E, H, 2F], whatever the parameter's shape says.
            weight1 = self.need("experts.weight1", (hidden, count * halves * width))
            first = weight1.view(count, hidden, halves * width).transpose(1, 2)
            down = grouped.view(count, width, hidden).transpose(1, 2)
            return assemble(experts_first(first, halves), down)
        return tuple(self.mlp("expert", width, expert) for expert in range(count))

    def _singleton_halves(self) -> list[tuple[torch.Tensor, ...]]:
        count, width = self.spec.local_experts, self.spec.moe_ffn_hidden_size
        shape = (count, width, self.spec.hidden_size)
        gate, up = self.need("experts.fc1_gate", shape), self.need("experts.fc1_up", shape)
        return [(gate[expert], up[expert]) for expert in range(count)]


def _if_full(part: str) -> bool | None:
    """Whether a norm is expected before a part; what was replaced or left out may have kept it."""
    return True if part == "full" else None
