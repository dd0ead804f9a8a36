"""Against Megatron-Core's own two converters: bit for bit where they are right, and where not.

The reference's faults have a test each, `test_mended_…`, which shows the fault and then fuseport's
answer, worked out by hand. The property tests keep away from those faults.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fuseport.converter import ModelSpec, Recipe, convert_shard, convert_state_dict
from fuseport.converter.errors import RecipeError, UnknownTensorError
from fuseport.converter.model import Block
from fuseport.kernels.move import GivenScale
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

from fuseport_testing.megatron_reference import (
    NEMOTRON_NAS_NAMES,
    TransformerConfig,
    reference_distributed,
    reference_single,
    run_single,
)

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
WORDS = "embedding.word_embeddings.weight"
LAYER0, TARGET0 = "decoder.layers.0.", "transformer.layers.0."
DTYPES = ["float32", "bfloat16", "float16"]
# Quant scales; with weights of at most 4 they stay in e4m3's range, where a cast needs no limit.
SCALES = [0.1, 0.37, 1.0, 13.7, 100.0]


@dataclass(frozen=True)
class Small:
    """A small model. `norm` is "rms", "layer" or "zero" (a zero-centred LayerNorm).

    `positions` is 0 without learned positions; `padding` counts the rows that training adds to the
    vocabulary; `moe` has a flag for each layer.
    """

    hidden: int = 10
    heads: int = 4
    groups: int = 4
    head_size: int = 4
    ffn: int = 12
    layers: int = 1
    vocab: int = 12
    padding: int = 0
    positions: int = 0
    norm: str = "rms"
    gated: bool = True
    bias: bool = False
    qkv_bias: bool = False
    tied: bool = False
    experts: int = 0
    moe: tuple[bool, ...] = ()
    te_norms: bool = False
    model_type: str = "llama"

    @property
    def activation(self) -> str:
        """TensorRT-LLM's name, as users give it to the reference."""
        return "swiglu" if self.gated else "gelu"

    def spec(self, **changes: object) -> ModelSpec:
        spec = ModelSpec(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            ffn_hidden_size=self.ffn,
            num_query_groups=self.groups,
            kv_channels=self.head_size,
            vocab_size=self.vocab,
            model_type=self.model_type,
            normalization="RMSNorm" if self.norm == "rms" else "LayerNorm",
            layernorm_zero_centered_gamma=self.norm == "zero",
            gated_linear_unit=self.gated,
            activation_func="silu" if self.gated else "gelu",
            add_bias_linear=self.bias,
            add_qkv_bias=self.qkv_bias,
            position_embedding_type="learned_absolute" if self.positions else "rope",
            share_embeddings_and_output_weights=self.tied,
            num_moe_experts=self.experts,
            moe_ffn_hidden_size=self.ffn if self.experts else 0,
            moe_layers=self.moe,
        )
        return spec.replace(**changes)

    def config(self, **changes: object) -> Any:
        """Megatron-Core's own configuration, which the reference reads."""
        spec = self.spec(**changes)
        names = (
            "num_layers hidden_size num_attention_heads ffn_hidden_size num_query_groups "
            "kv_channels normalization layernorm_zero_centered_gamma gated_linear_unit "
            "add_bias_linear add_qkv_bias"
        )
        return TransformerConfig(**{name: getattr(spec, name) for name in names.split()})

    def state(self) -> State:
        """Random fp32 weights, at most 4 in size, that no smaller format holds."""
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(shape, generator=generator).clamp(-4, 4)
            for name, shape in self._shapes().items()
        }

    def _shapes(self) -> Shapes:
        shapes = {WORDS: (self.vocab + self.padding, self.hidden)}
        if self.positions:
            shapes["embedding.position_embeddings.weight"] = (self.positions, self.hidden)
        for layer in range(self.layers):
            for name, shape in self._layer(layer).items():
                shapes[f"decoder.layers.{layer}.{name}"] = shape
        shapes |= self._norm("decoder.final_layernorm.")
        if not self.tied:
            shapes["output_layer.weight"] = shapes[WORDS]
        return shapes

    def _norm(self, prefix: str) -> Shapes:
        kinds = ("weight",) if self.norm == "rms" else ("weight", "bias")
        return {prefix + kind: (self.hidden,) for kind in kinds}

    def _layer(self, layer: int) -> Shapes:
        """Every part of one layer; Transformer Engine keeps norms in the linears after them."""
        moe = bool(self.experts) and (not self.moe or self.moe[layer])
        before = "self_attention.linear_qkv.layer_norm_" if self.te_norms else "input_layernorm."
        inside = self.te_norms and not moe
        between = "mlp.linear_fc1.layer_norm_" if inside else "pre_mlp_layernorm."
        mlp = self._experts() if moe else self._mlp()
        return self._norm(before) | self._attention() | self._norm(between) | mlp

    def _attention(self) -> Shapes:
        rows = (self.heads + 2 * self.groups) * self.head_size
        shapes: Shapes = {
            "self_attention.linear_qkv.weight": (rows, self.hidden),
            "self_attention.linear_proj.weight": (self.hidden, self.heads * self.head_size),
        }
        if self.bias or self.qkv_bias:
            shapes["self_attention.linear_qkv.bias"] = (rows,)
        if self.bias:
            shapes["self_attention.linear_proj.bias"] = (self.hidden,)
        return shapes

    def _mlp(self) -> Shapes:
        rows = self.ffn * (2 if self.gated else 1)
        shapes: Shapes = {
            "mlp.linear_fc1.weight": (rows, self.hidden),
            "mlp.linear_fc2.weight": (self.hidden, self.ffn),
        }
        if self.bias:
            shapes |= {"mlp.linear_fc1.bias": (rows,), "mlp.linear_fc2.bias": (self.hidden,)}
        return shapes

    def _experts(self) -> Shapes:
        """All experts in one tensor: the only way in which the reference knows them."""
        rows = self.ffn * (2 if self.gated else 1)
        return {
            "mlp.router.weight": (self.experts, self.hidden),
            "mlp.experts.experts.linear_fc1.weight": (self.experts, rows, self.hidden),
            "mlp.experts.experts.linear_fc2.weight": (self.experts, self.hidden, self.ffn),
        }


def stacked(state: State, layers: int) -> State:
    """One tensor for all layers, along a leading axis."""
    result = {name: value for name, value in state.items() if ".layers." not in name}
    for name in state:
        if name.startswith(LAYER0):
            rest = name.removeprefix(LAYER0)
            every = [state[f"decoder.layers.{layer}.{rest}"] for layer in range(layers)]
            result[f"decoder.layers.{rest}"] = torch.stack(every)
    return result


def stage_of(state: State, small: Small, pp: int, pp_rank: int) -> State:
    """What one pipeline stage holds: its layers counted from 0, and the ends that it has."""
    layers = torch.tensor_split(torch.arange(small.layers), pp)[pp_rank].tolist()
    held: State = {}
    for name, value in state.items():
        if name.startswith("decoder.layers."):
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            if int(number) in layers:
                held[f"decoder.layers.{int(number) - layers[0]}.{rest}"] = value
        elif pp_rank == (0 if name.startswith("embedding.") else pp - 1):
            held[name] = value
    if small.tied and 0 < pp_rank == pp - 1:
        # Megatron-Core copies a tied embedding to the stage that needs it as the output.
        held["output_layer.weight"] = state[WORDS]
    return held


def shard_of(state: State, small: Small, tp: int, rank: int) -> State:
    """A tensor-parallel rank's share, as Megatron-Core keeps it; a gated fc1 is cut in halves."""
    halves = 2 if small.gated else 1
    return {
        name: torch.cat([half.chunk(tp, axis)[rank] for half in value.chunk(parts, axis)], axis)
        if axis >= 0
        else value
        for name, value in state.items()
        for axis, parts in [_cut(name, halves)]
    }


def _cut(name: str, halves: int) -> tuple[int, int]:
    """(axis that is split or -1, number of parts that are each split)."""
    if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
        return 0, halves
    rows = ("word_embeddings.weight", "output_layer.weight", "qkv.weight", "qkv.bias")
    if name.endswith(rows):
        return 0, 1
    return (1, 1) if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else (-1, 1)


def given_scales(scales: Mapping[str, float]) -> dict[str, GivenScale]:
    return {module: GivenScale(value) for module, value in scales.items()}


def assert_same_bits(found: State, expected: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in found.items():
        other = expected[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        ours, theirs = (one.flatten().contiguous().view(torch.uint8) for one in (tensor, other))
        assert torch.equal(ours, theirs), name


def without_routers(tensors: State, dtype: torch.dtype | None = None) -> State:
    """The rest, after a check that routers are fp32, or of `dtype`."""
    kept = {}
    for name, value in tensors.items():
        if name.endswith("router.weight"):
            assert value.dtype is (dtype or torch.float32)
        else:
            kept[name] = value
    return kept


# -- whatever the reference gets right


@st.composite
def layer_options(draw: st.DrawFn, tp: int) -> dict[str, Any]:
    """What both property tests draw alike."""
    return {
        "hidden": draw(st.integers(3, 9)),
        "ffn": tp * draw(st.integers(1, 4)),
        "layers": draw(st.integers(1, 3)),
        "norm": draw(st.sampled_from(["rms", "layer", "zero"])),
        "gated": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "te_norms": draw(st.booleans()),
    }


@st.composite
def scales_of(draw: st.DrawFn, small: Small, layers: int) -> dict[str, float]:
    """Quant scales for some of the linear layers."""
    parts = ["attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"]
    if small.gated and not small.experts:
        parts.append("mlp.gate")
    modules = [f"transformer.layers.{layer}.{part}" for layer in range(layers) for part in parts]
    return draw(st.dictionaries(st.sampled_from(modules), st.sampled_from(SCALES), max_size=6))


@st.composite
def whole_models(draw: st.DrawFn) -> tuple[Small, Recipe, bool, dict[str, float]]:
    """(model, recipe, are the reference's layers stacked, scales)."""
    tp = draw(st.integers(1, 4))
    options = draw(layer_options(tp))
    repeats = draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0]))
    groups = draw(st.sampled_from([tp // repeats, tp * draw(st.integers(1, 2))]))
    queries = draw(st.integers(1, 3)) * tp // math.gcd(tp, groups)
    experts = draw(st.sampled_from([0, 0, 2, 3]))
    tied = draw(st.booleans())
    mixed = tuple(draw(st.booleans()) for _ in range(options["layers"]))
    small = Small(
        **options | ({"gated": True} if experts else {}),
        heads=groups * queries,
        groups=groups,
        head_size=draw(st.integers(1, 6)),
        vocab=draw(st.integers(4, 13)) * (1 if tied else tp),
        positions=tp * draw(st.integers(0, 3)),
        bias=not experts and draw(st.booleans()),
        tied=tied,
        experts=experts,
        moe=draw(st.sampled_from([(), mixed])) if experts else (),
        model_type=draw(st.sampled_from(["llama", "falcon"])),
    )
    pp = draw(st.integers(1, small.layers))
    recipe = Recipe(
        tp_size=tp,
        pp_size=pp,
        dtype=draw(st.sampled_from(DTYPES)),
        use_parallel_embedding=draw(st.booleans()),
    )
    # The layers of a stack are alike.
    one_tensor = not small.moe and draw(st.booleans())
    return small, recipe, one_tensor, draw(scales_of(small, small.layers)) if pp == 1 else {}


@settings(max_examples=150, deadline=None)
@given(whole_models())
def test_whole_models(drawn: tuple[Small, Recipe, bool, dict[str, float]]) -> None:
    small, recipe, one_tensor, scales = drawn
    state = small.state()
    found = convert_state_dict(state, small.spec(), recipe, scales=given_scales(scales))
    expected = reference_single(
        stacked(state, small.layers) if one_tensor else state,
        small.config(),
        recipe.tp_size,
        recipe.pp_size,
        recipe.dtype,
        parallel_embedding=recipe.use_parallel_embedding,
        activation=small.activation,
        scales=scales,
        split_by_layer=not one_tensor,
        new_decoder_architecture=small.model_type == "falcon",
    )
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if small.tied and rank >= recipe.tp_size:
            ours.pop("lm_head.weight", None)
        left = without_routers(theirs, recipe.torch_dtype)
        assert_same_bits(without_routers(ours), left)


@st.composite
def sharded_models(draw: st.DrawFn) -> tuple[Small, Recipe, dict[str, float]]:
    """(model, recipe, scales by the names within a stage)."""
    tp = draw(st.integers(1, 4))
    options = draw(layer_options(tp))
    bias = draw(st.booleans())
    pp = draw(st.integers(1, options["layers"]))
    groups = tp * draw(st.integers(1, 2))
    whole_heads = tp if bias or options["qkv_bias"] else 1
    small = Small(
        **options,
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        head_size=whole_heads * draw(st.integers(1, 4)),
        vocab=tp * draw(st.integers(2, 7)),
        padding=draw(st.integers(0, 3)) if tp == 1 else 0,
        positions=draw(st.integers(0, 5)) if tp == 1 else 0,
        bias=bias,
        tied=pp == 1 and draw(st.booleans()),
    )
    recipe = Recipe(tp_size=tp, pp_size=pp, dtype=draw(st.sampled_from(DTYPES)))
    return small, recipe, draw(scales_of(small, -(-small.layers // pp)))


def check_stage(
    small: Small, recipe: Recipe, pp_rank: int, scales: Mapping[str, float] | None = None
) -> None:
    """Every rank of a stage, converted by itself, against the reference."""
    tp, held = recipe.tp_size, stage_of(small.state(), small, recipe.pp_size, pp_rank)
    shards = [shard_of(held, small, tp, rank) for rank in range(tp)]
    expected = reference_distributed(
        shards,
        small.config(),
        recipe.pp_size,
        pp_rank,
        recipe.dtype,
        small.vocab,
        activation=small.activation,
        scales=scales,
    )
    for rank, (shard, theirs) in enumerate(zip(shards, expected, strict=True)):
        found = convert_shard(
            shard,
            small.spec(),
            recipe,
            tp_rank=rank,
            pp_rank=pp_rank,
            scales=given_scales(scales or {}),
        )
        assert_same_bits(found, theirs)


@settings(max_examples=100, deadline=None)
@given(sharded_models())
def test_shards(drawn: tuple[Small, Recipe, dict[str, float]]) -> None:
    small, recipe, scales = drawn
    for pp_rank in range(recipe.pp_size):
        check_stage(small, recipe, pp_rank, scales)
