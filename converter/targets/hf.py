"""The Hugging Face layout: whole tensors, by the names of a family's table.

It is what transformers, vLLM, SGLang and TensorRT-LLM from 1.3 on load; they split tensors over
ranks themselves. Names: `families/*.yaml`, each written beside the family's class in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..errors import RecipeError, ShapeError, UnsupportedOptionError
from ..hf_family import Family
from ..layout import Alternate, Stack, flat_columns, flat_rows
from ..logical import (
    Attention,
    Further,
    LatentAttention,
    Layer,
    LowRank,
    Mlp,
    Model,
    Moe,
    Projection,
)
from ..model import ModelSpec
from ..recipe import Recipe
from .hf_names import Names, Piece, numbered
from .parts import TargetTensor


class HfRules:
    """Lays a model out as a single rank's whole tensors.

    Args:
        model: the whole model's logical views.
        spec: its facts.
        recipe: the choice of dtype.
        family: the table of names.

    Raises:
        UnsupportedOptionError: the model has a part that the family has no name for.
    """

    def __init__(self, model: Model, spec: ModelSpec, recipe: Recipe, family: Family) -> None:
        self.model, self.spec, self.recipe, self.family = model, spec, recipe, family

    def tensors(self) -> Iterator[TargetTensor]:
        """Every tensor: the embedding, the layers, the output."""
        for layer, placed in self._placed():
            for one in placed:
                yield numbered(one, layer)

    def _placed(self) -> Iterator[tuple[int, Iterable[TargetTensor]]]:
        """What is outside of the layers (-1), and each layer's tensors."""
        model, names = self.model, Names(self.family, self.recipe, -1)
        if model.positions is not None:
            raise UnsupportedOptionError(
                f"the model has learned positions, for which the family "
                f"{self.family.model_type} has no tensor"
            )
        if model.embedding is not None:
            yield -1, [names.place(Piece("embedding", self._vocabulary(model.embedding)))]
        # By identity: layers that are alike are one object.
        known: dict[int, list[TargetTensor]] = {}
        for index, layer in enumerate(model.layers):
            if id(layer) not in known:
                own = Names(self.family, self.recipe, index)
                known[id(layer)] = list(map(own.place, _layer(own, layer)))
            yield index, known[id(layer)]
        for number, further in enumerate(model.further, len(model.layers)):
            own = Names(self.family, self.recipe, number)
            yield number, map(own.place, self._further(own, further))
        if model.final_norm is not None:
            yield -1, map(names.place, names.norm("final_norm", model.final_norm))
        if model.output is not None:
            yield -1, [names.place(Piece("output", self._vocabulary(model.output)))]

    def _further(self, names: Names, further: Further) -> Iterator[Piece]:
        yield from _layer(names, further.layer)
        yield from names.norm("further.token_norm", further.token_norm)
        yield from names.norm("further.hidden_norm", further.hidden_norm)
        yield Piece("further.join", further.join)
        yield from names.norm("further.norm", further.norm)
        for part in ("embedding", "output"):
            table = getattr(further, part)
            if table is None:
                continue
            # What is the model's own has the model's padding.
            own = table is not getattr(self.model, part)
            if own and self._vocabulary(table).shape != table.shape:
                raise ShapeError(
                    f"vocab_size = {self.spec.vocab_size}, but layer {names.layer} has an {part} "
                    f"of its own with {table.shape[0]} rows; leave out "
                    f"vocab_size (--vocab-size) or mtp 'keep' (--mtp keep)"
                )
            yield Piece(f"further.{part}", self._vocabulary(table))

    def _vocabulary(self, table: torch.Tensor) -> torch.Tensor:
        size = self.spec.vocab_size or table.shape[0]
        if size > table.shape[0]:
            raise ShapeError(
                f"vocab_size = {size}, but the embedding has {table.shape[0]} rows; correct "
                f"the fact vocab_size (--vocab-size)"
            )
        return table[:size]


def _layer(names: Names, layer: Layer) -> Iterator[Piece]:
    yield from names.norm("input_norm", layer.input_norm)
    if isinstance(layer.attention, Attention):
        yield from attention(names, layer.attention)
    elif isinstance(layer.attention, LatentAttention):
        yield from latent_attention(names, layer.attention)
    yield from names.norm("attention_out_norm", layer.attention_out_norm)
    yield from names.norm("mlp_norm", layer.mlp_norm)
    if isinstance(layer.mlp, Mlp):
        yield from mlp(names, "", layer.mlp)
    elif isinstance(layer.mlp, Moe):
        yield from moe(names, layer.mlp)
    yield from names.norm("mlp_out_norm", layer.mlp_out_norm)


def attention(names: Names, weights: Attention) -> Iterator[Piece]:
    """Heads in order. No permutation: Megatron and transformers both rotate halves of a head."""
    for part, one in (("q", weights.q), ("k", weights.k), ("v", weights.v)):
        yield from projection(names, part, one)
    yield from names.linear("out", flat_columns(weights.out), weights.out_bias)
    yield from names.norm("q_norm", weights.q_norm)
    yield from names.norm("k_norm", weights.k_norm)
    if weights.sinks is not None:
        yield Piece("sinks", flat_rows(weights.sinks, 2))


def projection(names: Names, part: str, one: Projection) -> Iterator[Piece]:
    """All heads' rows, and their bias."""
    axes = one.weight.ndim - 1
    bias = None if one.bias is None else flat_rows(one.bias, axes)
    yield from names.linear(part, flat_rows(one.weight, axes), bias)


def latent_attention(names: Names, weights: LatentAttention) -> Iterator[Piece]:
    """The low-rank parts as they are."""
    if isinstance(weights.q, LowRank):
        yield from low_rank(names, "q", weights.q)
    else:
        yield Piece("q", weights.q)
    yield from low_rank(names, "kv", weights.kv)
    yield Piece("out", weights.out)


def low_rank(names: Names, part: str, weights: LowRank) -> Iterator[Piece]:
    """Down, norm, up."""
    yield Piece(f"{part}_down", weights.down)
    yield from names.norm(f"{part}_down_norm", weights.norm)
    yield Piece(f"{part}_up", weights.up)


def mlp(names: Names, prefix: str, weights: Mlp, expert: int = 0) -> Iterator[Piece]:
    """Gate (where there is one), up and down."""
    if weights.gate is not None:
        gate = weights.gate
        yield from names.linear(f"{prefix}gate", gate.weight, gate.bias, expert)
    yield from names.linear(f"{prefix}up", weights.up.weight, weights.up.bias, expert)
    yield from names.linear(f"{prefix}down", weights.down, weights.down_bias, expert)


def moe(names: Names, weights: Moe) -> Iterator[Piece]:
    """The router in the model's dtype, as the family has it; experts one by one, or together."""
    yield from names.linear("router", weights.router, weights.router_linear_bias)
    if weights.router_bias is not None:
        # It is added to scores that differ little: DeepSeek's own checkpoints keep fp32.
        yield Piece("router_bias", weights.router_bias, dtype=torch.float32)
    elif "router_bias" in names.family.tensors:
        raise UnsupportedOptionError(
            f"layer {names.layer}: the router has no expert bias, which every model of the family "
            f"{names.family.model_type} has; choose another family as the fact model_type "
            f"(--fact model_type=NAME)"
        )
    if names.module("expert.up"):
        for number, expert in enumerate(weights.experts):
            yield from mlp(names, "expert.", expert, number)
    else:
        yield from together(names, weights.experts)
    if weights.shared is not None:
        yield from mlp(names, "shared.", weights.shared)
    if weights.shared_gate is not None:
        yield Piece("shared_gate", weights.shared_gate)


def together(names: Names, experts: tuple[Mlp, ...]) -> Iterator[Piece]:
    """GPT-OSS: [E, H, 2F] with gate and up in turn, [E, F, H], and their biases."""
    names.check_left_out("experts.gate_up")
    first = [tuple(half.weight.mT for half in one.halves) for one in experts]
    yield Piece("experts.gate_up", Stack(tuple(map(Alternate, first))))
    biases = [tuple(half.bias for half in one.halves if half.bias is not None) for one in experts]
    if all(biases):
        yield Piece("experts.gate_up_bias", Stack(tuple(map(Alternate, biases))))
    yield Piece("experts.down", Stack(tuple(one.down.mT for one in experts)))
    down_biases = tuple(one.down_bias for one in experts if one.down_bias is not None)
    if down_biases:
        yield Piece("experts.down_bias", Stack(down_biases))


def check_hf(spec: ModelSpec, recipe: Recipe) -> None:
    """Raise RecipeError for an option, or UnsupportedOptionError for a model, that has no place."""
    for option, usual in (
        ("tp_size", 1), ("pp_size", 1), ("moe_ep_size", 1), ("use_parallel_embedding", False),
    ):  # fmt: skip
        if getattr(recipe, option) != usual:
            raise RecipeError(
                f"{option} = {getattr(recipe, option)} has no meaning for target hf, whose tensors "
                f"are whole: the engine splits them; leave it out"
            )
    if spec.num_moe_experts and (recipe.profile, recipe.quant) == ("compressed-tensors", "fp8"):
        raise RecipeError(
            "the loaders of compressed-tensors take no experts with a scale for a tensor and "
            "activations that are scaled as they come; choose quant fp8-row (--quant fp8-row), or "
            "profile vllm (--profile vllm)"
        )
    if spec.blocks:
        raise UnsupportedOptionError(
            "the model's layers differ from each other (blocks), which target hf does not lay out"
        )
