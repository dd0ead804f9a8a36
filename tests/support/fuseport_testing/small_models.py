"""Small random models for property tests, and Hypothesis' strategies that draw them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from .cases import Case

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
WORDS, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
LAYER, TARGET = "decoder.layers.0.", "transformer.layers.0."
STACKED_EXPERTS = ".experts.experts."
# Quant scales; with weights of at most 4 they stay in e4m3's range, where no cast saturates.
SCALES = [0.1, 0.37, 1.0, 13.7, 100.0]
NORMS: dict[str, dict[str, Any]] = {
    "rms": {},
    "layer": {"normalization": "LayerNorm"},
    "zero-centred layer": {"normalization": "LayerNorm", "zero_centered": True},
}


def small(**changes: Any) -> Case:
    """A case of one layer whose sizes are as unlike each other as they may be."""
    sizes = {"hidden": 10, "heads": 4, "kv_channels": 4, "ffn": 12, "layers": 1, "vocab": 12}
    options: dict[str, Any] = {"query_groups": 4, **sizes, **changes}
    options.setdefault("padded_vocab", options["vocab"])
    options.setdefault("moe_ffn", options["ffn"])
    options.setdefault("activation", "silu" if options.get("gated", True) else "gelu")
    return Case("small", "LlamaForCausalLM", **options)


def random_state(case: Case, seed: int = 0) -> State:
    """Random fp32 weights, at most 4 in size, that no smaller format holds; experts stacked."""
    shapes: Shapes = {WORDS: (case.padded_vocab, case.hidden)}
    if not case.rope:
        shapes[POSITIONS] = (case.positions, case.hidden)
    for layer in range(case.layers):
        mlp = _experts(case) if case.is_moe(layer) else mlp_shapes(case)
        for name, shape in (_attention(case) | mlp).items():
            shapes[f"decoder.layers.{layer}.{name}"] = shape
    shapes |= _norm(case, "decoder.final_layernorm")
    if not case.tied:
        shapes[OUTPUT] = shapes[WORDS]
    return random_tensors(shapes, seed)


def random_tensors(shapes: Shapes, seed: int = 0) -> State:
    """Random fp32 tensors of these shapes, at most 4 in size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).clamp(-4, 4) for name, shape in shapes.items()
    }


def _norm(case: Case, name: str) -> Shapes:
    kinds = ("weight",) if case.normalization == "RMSNorm" else ("weight", "bias")
    return {f"{name}.{kind}": (case.hidden,) for kind in kinds}


def _attention(case: Case) -> Shapes:
    rows = (case.heads + 2 * case.query_groups) * case.kv_channels
    shapes = _norm(case, "input_layernorm") | _norm(case, "pre_mlp_layernorm")
    shapes["self_attention.linear_qkv.weight"] = (rows, case.hidden)
    width = case.heads * case.kv_channels
    shapes["self_attention.linear_proj.weight"] = (case.hidden, width)
    if case.qkv_bias or case.linear_bias:
        shapes["self_attention.linear_qkv.bias"] = (rows,)
    if case.linear_bias:
        shapes["self_attention.linear_proj.bias"] = (case.hidden,)
    return shapes


def mlp_shapes(case: Case) -> Shapes:
    """A dense MLP's tensors, by their names in the layer."""
    rows = case.ffn * (2 if case.gated else 1)
    shapes: Shapes = {
        "mlp.linear_fc1.weight": (rows, case.hidden),
        "mlp.linear_fc2.weight": (case.hidden, case.ffn),
    }
    if case.linear_bias:
        shapes |= {"mlp.linear_fc1.bias": (rows,), "mlp.linear_fc2.bias": (case.hidden,)}
    return shapes


def _experts(case: Case) -> Shapes:
    count, rows = case.experts or 0, case.moe_ffn * (2 if case.gated else 1)
    return {
        "mlp.router.weight": (count, case.hidden),
        "mlp.experts.experts.linear_fc1.weight": (count, rows, case.hidden),
        "mlp.experts.experts.linear_fc2.weight": (count, case.hidden, case.moe_ffn),
    }


def experts_apart(state: Mapping[str, torch.Tensor]) -> State:
    """Each expert's tensors by themselves, as Megatron-Core has them in memory."""
    result: State = {}
    for name, value in state.items():
        if STACKED_EXPERTS not in name:
            result[name] = value
            continue
        for expert, part in enumerate(value):
            result[name.replace(STACKED_EXPERTS, f".experts.local_experts.{expert}.")] = part
    return result


def assert_same_bits(found: State, expected: Mapping[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert set(found) == set(expected)
    for name, tensor in found.items():
        other = expected[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        mine, its = (one.flatten().contiguous().view(torch.uint8) for one in (tensor, other))
        assert torch.equal(mine, its), name


def without_routers(tensors: State, dtype: torch.dtype) -> State:
    """The rest, after a check that the routers are of `dtype`."""
    routers = {name for name in tensors if "router.weight" in name}
    assert all(tensors[name].dtype is dtype for name in routers)
    return {name: value for name, value in tensors.items() if name not in routers}


@st.composite
def layer_options(draw: st.DrawFn, tp: int) -> dict[str, Any]:
    """What whole and sharded models draw alike."""
    return {
        "hidden": draw(st.integers(3, 9)),
        "ffn": tp * draw(st.integers(1, 4)),
        "layers": draw(st.integers(1, 3)),
        "gated": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        **NORMS[draw(st.sampled_from(sorted(NORMS)))],
    }


@st.composite
def scales_of(draw: st.DrawFn, case: Case, layers: int) -> dict[str, float]:
    """Quant scales for some of the linear layers."""
    parts = ["attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"]
    if case.gated and not case.experts:
        parts.append("mlp.gate")
    modules = [f"transformer.layers.{layer}.{part}" for layer in range(layers) for part in parts]
    return draw(st.dictionaries(st.sampled_from(modules), st.sampled_from(SCALES), max_size=6))


@st.composite
def whole_models(draw: st.DrawFn, tp: int) -> Case:
    """A model that `tp` divides: into whole KV heads, or with repeated ones."""
    options = draw(layer_options(tp))
    groups = draw(st.sampled_from([n for n in range(1, 2 * tp + 1) if tp % n == 0 or n % tp == 0]))
    experts = draw(st.sampled_from([None, 2, 3]))
    moe_layers = st.tuples(*[st.integers(0, 1)] * options["layers"])
    if experts:
        options |= {"gated": True, "moe_layers": draw(st.none() | moe_layers)}
    tied, positions = draw(st.booleans()), tp * draw(st.integers(0, 3))
    return small(
        **options,
        heads=groups * draw(st.integers(1, 3)) * tp // math.gcd(tp, groups),
        query_groups=groups,
        kv_channels=draw(st.integers(1, 6)),
        vocab=draw(st.integers(4, 13)) * (1 if tied else tp),
        positions=positions or 8,
        rope=not positions,
        linear_bias=not experts and draw(st.booleans()),
        tied=tied,
        experts=experts,
    )


@st.composite
def sharded_models(draw: st.DrawFn, tp: int) -> Case:
    """A dense model whose KV heads and vocabulary `tp` divides; training padded the vocabulary."""
    options, bias = draw(layer_options(tp)), draw(st.booleans())
    groups = tp * draw(st.integers(1, 2))
    vocab, padding = tp * draw(st.integers(2, 7)), tp * draw(st.integers(0, 3))
    positions = tp * draw(st.integers(0, 3))
    return small(
        **options,
        heads=groups * draw(st.integers(1, 3)),
        query_groups=groups,
        kv_channels=(tp if bias or options["qkv_bias"] else 1) * draw(st.integers(1, 4)),
        vocab=vocab,
        padded_vocab=vocab + padding,
        positions=positions or 8,
        rope=not positions,
        linear_bias=bias,
        tied=draw(st.booleans()),
    )


_LAYERS = re.compile(r"^decoder\.layers\.(\d+\.)?")


def invented(name: str) -> str:
    """A user's own name for one of Megatron-Core's, with or without a layer's number."""
    match = _LAYERS.match(name)
    if match is None:
        return f"model.tower.{name.replace('.', '/')}"
    return f"model.tower.layers.{match[1] or ''}{name[match.end() :].replace('.', '/').upper()}"
