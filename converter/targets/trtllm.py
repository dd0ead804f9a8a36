"""TensorRT-LLM's unified checkpoint (up to 1.2): which slice of which weight goes to which rank.

Sources: TensorRT-LLM 1.2's `docs/source/architecture/checkpoint.md` for names and files, and its
model classes for the row orders:

- linear weights are [out / tp, in]; column-parallel ones split rows, row-parallel ones columns;
- a rank's `attention.qkv` is all its q rows, then k, then v;
- `mlp.fc` is the activated half, `mlp.gate` the other; with experts it is [up; gate] in one;
- KV heads are repeated when there are more ranks than heads;
- the vocabulary is padded with zero rows to a multiple of tp;
- layer numbers count from the pipeline stage's first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch

from fuseport.kernels.move import GivenScale

from ..errors import RecipeError, ShapeError, UnsupportedOptionError
from ..layout import Layout, Stack, cat, flat_columns, flat_rows
from ..logical import Attention, Half, LatentAttention, Layer, Linear, Mlp, Model, Moe, Norm
from ..model import ModelSpec
from ..recipe import Recipe
from .parts import CacheScale, Part, Shard, TargetTensor, Unit
from .trtllm_config import FAMILIES, padded_vocab_size, pp_layers


def layer_prefix(number: int) -> str:
    """What goes before the names of a layer's parts."""
    return f"transformer.layers.{number}."


class TrtllmRules:
    """Lays a model out for every rank of a recipe.

    Args:
        model: the whole model's logical views.
        spec: its facts.
        recipe: the choice of parallel sizes and dtype.
        zero_row: [1, H], zeros, of the embedding's dtype: what the padded vocabulary repeats.
        scales: module's target name → scale; its weight becomes e4m3. Layers are numbered as in
            the whole model.
    """

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        recipe: Recipe,
        zero_row: torch.Tensor,
        scales: Mapping[str, GivenScale] | None = None,
    ) -> None:
        self.model, self.spec, self.recipe, self.zero_row = model, spec, recipe, zero_row
        self.scales = scales or {}
        self.names = FAMILIES[spec.model_type].names
        # By the layer's identity: layers that are alike are one object.
        self._parts: dict[int, Callable[[Shard], Sequence[Part]]] = {}

    def tensors(self) -> Iterator[TargetTensor]:
        """Every tensor of every rank; the ranks' shares of one weight stand next to each other."""
        tp = self.recipe.tp_size
        for stage in range(self.recipe.pp_size):
            for unit in self._units(stage):
                shares = [list(unit.parts(Shard(rank, tp))) for rank in range(tp)]
                for index in range(len(shares[0])):
                    for rank in range(tp):
                        yield self._place(shares[rank][index], unit, stage * tp + rank)

    def _place(self, part: Part, unit: Unit, rank: int) -> TargetTensor:
        module, _, kind = part.name.rpartition(".")
        quant = self.scales.get(unit.whole_prefix + module) if kind == "weight" else None
        dtype = part.dtype or self.recipe.torch_dtype
        if quant is not None:
            dtype = torch.float8_e4m3fn
        name = unit.prefix + part.name
        group, linear = "", ""
        if part.group:
            group, linear = unit.whole_prefix + part.group, unit.whole_prefix + module
        cache = part.cache and part.cache.within(unit.prefix)
        return TargetTensor(
            rank, name, part.layout, dtype, part.shift, quant, part.replicated, group, linear,
            part.first_expert, unit.layer, cache,
        )  # fmt: skip

    def _units(self, stage: int) -> Iterator[Unit]:
        """What a stage holds: its input, its layers, its output."""
        layers = pp_layers(self.spec.num_layers, self.recipe.pp_size, stage)
        if stage == 0:
            yield Unit(self._input)
        for local, index in enumerate(layers):
            parts = self._parts_of(self.model.layers[index])
            yield Unit(parts, layer_prefix(local), layer_prefix(index), index)
        if stage == self.recipe.pp_size - 1:
            yield Unit(self._output)

    def _parts_of(self, layer: Layer) -> Callable[[Shard], Sequence[Part]]:
        """A layer's parts for a shard, which are made once."""
        if id(layer) not in self._parts:
            self._parts[id(layer)] = cache(lambda shard: tuple(self._layer(layer, shard)))
        return self._parts[id(layer)]

    def _input(self, shard: Shard) -> Iterator[Part]:
        model, share = self.model, self.recipe.use_parallel_embedding
        place = shard if share else Shard(0, 1)
        if model.embedding is not None:
            yield Part(
                "transformer.vocab_embedding.weight", self._vocabulary(model.embedding, place)
            )
        if model.positions is not None:
            if model.positions.shape[0] % place.size:
                raise RecipeError(
                    f"{model.positions.shape[0]} positions cannot be split by tp_size = "
                    f"{place.size}; leave out use_parallel_embedding (--parallel-embedding)"
                )
            yield Part("transformer.position_embedding.weight", place.rows(model.positions))

    def _output(self, shard: Shard) -> Iterator[Part]:
        if self.model.final_norm is not None:
            yield from norm("transformer.ln_f", self.model.final_norm)
        head = self.model.output
        if head is None and self.recipe.pp_size > 1:
            # A tied head is left out where its stage has the embedding, and only there.
            head = self.model.embedding
        if head is not None:
            yield Part("lm_head.weight", self._vocabulary(head, shard), group="lm_head")

    def _vocabulary(self, table: torch.Tensor, shard: Shard) -> Layout:
        """A shard's rows of an embedding: training's padding stripped, the target's added."""
        size = self.spec.vocab_size or table.shape[0]
        if size > table.shape[0]:
            raise ShapeError(
                f"vocab_size = {size}, but the embedding has {table.shape[0]} rows; "
                f"correct the fact vocab_size (--vocab-size)"
            )
        rows = padded_vocab_size(size, shard.size) // shard.size
        start = min(shard.rank * rows, size)
        real = table[start : min(start + rows, size)]
        return cat(real, self.zero_row.expand(rows - real.shape[0], -1))

    def _layer(self, layer: Layer, shard: Shard) -> Iterator[Part]:
        refuse_parts(layer)
        names = self.names
        if layer.input_norm is not None:
            yield from norm(names.input_norm, layer.input_norm)
        if isinstance(layer.attention, Attention):
            yield from attention(names.attention, layer.attention, shard)
        elif isinstance(layer.attention, Linear):
            weight = shard.rows(layer.attention.weight)
            yield Part(names.attention + ".weight", weight, group=names.attention)
        if layer.mlp_norm is not None:
            yield from norm(names.mlp_norm, layer.mlp_norm)
        if isinstance(layer.mlp, Mlp):
            yield from mlp(names.mlp, layer.mlp, shard)
        elif isinstance(layer.mlp, Moe):
            yield from moe(names.mlp, layer.mlp, shard, self.recipe)
        elif isinstance(layer.mlp, Linear):
            weight = shard.rows(layer.mlp.weight)
            yield Part(names.mlp + ".weight", weight, group=names.mlp)


def refuse_special(spec: ModelSpec) -> None:
    """Raise UnsupportedOptionError if the model has an option that `config.json` cannot say."""
    further = ("layers that predict further tokens",) if spec.further_layers else ()
    options = (*spec.special, *further)
    if options or spec.model_type not in FAMILIES:
        what = ", ".join(options) or "a family that the format does not know"
        raise UnsupportedOptionError(
            f"the model has {what}, which TensorRT-LLM's unified checkpoint is not written with; "
            f"choose target 'hf' (--target hf)"
        )


def refuse_parts(layer: Layer) -> None:
    """Raise UnsupportedOptionError if a layer has a part that no rule here lays out."""
    parts = {
        "a norm behind attention or MLP": layer.attention_out_norm or layer.mlp_out_norm,
        "multi-latent attention": isinstance(layer.attention, LatentAttention),
        "attention sinks": isinstance(layer.attention, Attention)
        and layer.attention.sinks is not None,
        "a router with a bias": isinstance(layer.mlp, Moe)
        and layer.mlp.router_linear_bias is not None,
        "experts with biases": isinstance(layer.mlp, Moe)
        and any(one.down_bias is not None for one in layer.mlp.experts),
    }
    for what, there in parts.items():
        if there:
            raise UnsupportedOptionError(
                f"the model has {what}, for which TensorRT-LLM's unified checkpoint has no place "
                f"here; choose target 'hf' (--target hf)"
            )


def norm(name: str, weights: Norm) -> Iterator[Part]:
    """Replicated; zero-centred weights get their 1 back."""
    yield Part(f"{name}.weight", weights.weight, weights.shift, replicated=True)
    if weights.bias is not None:
        yield Part(f"{name}.bias", weights.bias, replicated=True)


def attention(name: str, weights: Attention, shard: Shard) -> Iterator[Part]:
    """[q; k; v] rows of the shard's heads, and the output columns that read those heads."""
    q, k, v = weights.q, weights.k, weights.v
    rows = (shard.query_heads(q.weight), shard.kv_heads(k.weight), shard.kv_heads(v.weight))
    weight = cat(*(flat_rows(part, part.ndim - 1) for part in rows))
    # One scale for keys and values.
    cache = CacheScale(f"{name}.kv_cache_scaling_factor", (1,), ("k", "v"))
    yield Part(f"{name}.qkv.weight", weight, group=f"{name}.qkv", cache=cache)
    if q.bias is not None and k.bias is not None and v.bias is not None:
        biases = (shard.query_heads(q.bias), shard.kv_heads(k.bias), shard.kv_heads(v.bias))
        yield Part(f"{name}.qkv.bias", cat(*(flat_rows(part, part.ndim) for part in biases)))
    columns = shard.query_heads(weights.out.movedim(0, 2)).movedim(2, 0)
    yield Part(f"{name}.dense.weight", flat_columns(columns), group=f"{name}.dense")
    if weights.out_bias is not None:
        yield Part(f"{name}.dense.bias", weights.out_bias, replicated=True)
    for head_norm, part in ((weights.q_norm, "q_layernorm"), (weights.k_norm, "k_layernorm")):
        if head_norm is not None:
            yield from norm(f"{name}.{part}", head_norm)


def half(name: str, weights: Half, shard: Shard, group: str) -> Iterator[Part]:
    """One column-parallel half of an MLP's first matrix."""
    yield Part(f"{name}.weight", shard.rows(weights.weight), group=group)
    if weights.bias is not None:
        yield Part(f"{name}.bias", shard.rows(weights.bias))


def mlp(name: str, weights: Mlp, shard: Shard) -> Iterator[Part]:
    """`fc` is the half that is activated (the only one if not gated), `gate` the other."""
    for part, weight in zip(("fc", "gate"), weights.halves, strict=False):
        yield from half(f"{name}.{part}", weight, shard, f"{name}.fc")
    yield Part(f"{name}.proj.weight", shard.columns(weights.down), group=f"{name}.proj")
    if weights.down_bias is not None:
        yield Part(f"{name}.proj.bias", weights.down_bias, replicated=True)


def moe(name: str, weights: Moe, shard: Shard, recipe: Recipe) -> Iterator[Part]:
    """Fc [E, 2F, H] = [up; gate] of each expert, proj [E, H, F]; the router stays fp32."""
    router = partial(Part, dtype=torch.float32, replicated=True)
    yield router(f"{name}.router.weight", weights.router)
    if weights.router_bias is not None:
        yield router(f"{name}.e_score_correction_bias", weights.router_bias)
    # Ranks run moe_tp slowest, moe_ep fastest.
    slice_ = Shard(shard.rank // recipe.moe_ep_size, recipe.moe_tp_size)
    count = len(weights.experts) // recipe.moe_ep_size
    first = shard.rank % recipe.moe_ep_size * count
    local = weights.experts[first : first + count]
    first_matrix = Stack(tuple(_expert_first(one, slice_) for one in local))
    second_matrix = Stack(tuple(slice_.columns(one.down) for one in local))
    yield Part(f"{name}.fc.weight", first_matrix, group=f"{name}.fc", first_expert=first)
    yield Part(f"{name}.proj.weight", second_matrix, group=f"{name}.proj", first_expert=first)
    if weights.shared is not None:
        yield from mlp(f"{name}.shared_expert", weights.shared, shard)
    if weights.shared_gate is not None:
        yield Part(f"{name}.shared_expert_gate.weight", weights.shared_gate, replicated=True)


def _expert_first(expert: Mlp, shard: Shard) -> Layout:
    return cat(*(shard.rows(part.weight) for part in reversed(expert.halves)))
