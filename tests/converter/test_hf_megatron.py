"""Megatron's models in the Hugging Face layout, loaded by transformers: Megatron's own logits."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuseport_testing.cases import BY_NAME, megatron_args, some_tokens
from fuseport_testing.megatron_models import Run
from fuseport_testing.small_models import random_state, small

from fuseport.converter import (
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    plan_checkpoint,
    verify_checkpoint,
)
from fuseport.converter.errors import FuseportError, RecipeError, UnsupportedOptionError
from fuseport.converter.hf_family import packaged
from fuseport.converter.targets.hf_config import hf_config

Runs = Callable[..., Run]
LAID_OUT = (
    "llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "nemotron", "gemma_plain", "deepseek",
    "deepseek_whole_q",
)  # fmt: skip
LAYOUTS = [(name, layout) for name in LAID_OUT for layout in BY_NAME[name].layouts]
LAYOUTS.append(("qwen3_moe", "stacked"))


def error(out: Path, run: Run) -> float:
    pytest.importorskip("transformers")
    from fuseport_testing.hf_models import load

    with torch.no_grad():
        logits = load(out)(some_tokens(run.case)).logits
    return float((logits - run.logits).norm() / run.logits.norm())


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_megatrons_logits(name: str, layout: str, megatron_run: Runs, tmp_path: Path) -> None:
    if name == "deepseek_whole_q" and sys.version_info >= (3, 12):
        pytest.skip("Megatron-Core 0.19 builds it with Transformer Engine's linears only")
    run, out = megatron_run(name), tmp_path / "out"
    source = run.checkpoint(layout)
    convert_checkpoint(source, out, Recipe(target="hf", dtype="float32", shard_size=50_000))
    verify_checkpoint(out, source)
    assert error(out, run) < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == run.case.vocab < run.case.padded_vocab
    assert config["tie_word_embeddings"] is run.case.tied
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) is not run.case.tied


def test_another_family_can_be_named(megatron_run: Runs, tmp_path: Path) -> None:
    run, out = megatron_run("llama"), tmp_path / "out"
    facts = {"model_type": "mistral"}
    convert_checkpoint(run.checkpoint("stacked"), out, Recipe(target="hf", dtype="float32"), facts)
    assert json.loads((out / "config.json").read_text())["model_type"] == "mistral"
    assert error(out, run) < 1e-5


@pytest.mark.parametrize(
    ("name", "facts", "match"),
    [
        ("gpt", {}, "no table for model_type 'gpt'"),
        ("falcon", {"model_type": "falcon"}, "no table for model_type 'falcon'"),
        ("qwen2", {"model_type": "llama"}, "add_qkv_bias|attention_out_bias"),
        ("qwen3", {"model_type": "llama"}, "qk_layernorm|no name"),
        ("nemotron", {"model_type": "llama"}, "normalization"),
        ("gemma", {"model_type": "gemma"}, "part 'q_norm'"),
        ("gemma_plain", {"model_type": "gemma2"}, "capped logits, which Megatron-Core's layers do"),
        ("gemma", {"model_type": "gemma3_text"}, "norms behind attention and MLP, which"),
        ("qwen2_moe", {"model_type": "mixtral"}, "no name"),
    ],
)
def test_what_a_family_cannot_say_is_refused(
    name: str, facts: dict[str, object], match: str, megatron_run: Runs
) -> None:
    source = megatron_run(name).checkpoint("per_layer")
    with pytest.raises(FuseportError, match=match) as raised:
        plan_checkpoint(source, Recipe(target="hf"), facts)
    assert isinstance(raised.value, (RecipeError, UnsupportedOptionError))


def test_engines_are_told_of_deepseeks_router(megatron_run: Runs) -> None:
    """Without, vLLM and SGLang have no bias of the router, and other scores."""
    plan = plan_checkpoint(megatron_run("deepseek").checkpoint("legacy"), Recipe(target="hf"))
    config = plan.settings()["config.json"]
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")


def test_facts_that_a_family_cannot_say_are_named(megatron_run: Runs) -> None:
    source = megatron_run("llama").checkpoint("stacked")
    with pytest.raises(UnsupportedOptionError, match="rotary_percent"):
        plan_checkpoint(source, Recipe(target="hf"), {"rotary_percent": 0.123})


@pytest.mark.parametrize(
    "facts", [{"use_rope_scaling": True}, {"seq_len_interpolation_factor": 4.0}, {}]
)
def test_rope_is_what_transformers_takes_it_for(facts: dict[str, object]) -> None:
    """The frequencies that a model gets from the written config, beside the formulas."""
    transformers = pytest.importorskip("transformers")
    args = vars(megatron_args(BY_NAME["llama"], 1, 1))
    spec = ModelSpec.from_facts({**args, **facts})
    config = hf_config(spec, Recipe(target="hf"), 61, packaged()["llama"])
    model = transformers.LlamaModel(transformers.LlamaConfig(**config))
    rates = 500000.0 ** (-torch.arange(0, 8, 2).float() / 8)
    if facts.get("seq_len_interpolation_factor"):
        rates = rates / 4
    if facts.get("use_rope_scaling"):
        # Llama 3.1: waves longer than 8192 are slowed by 8, shorter than 2048 are left alone.
        waves = 2 * math.pi / rates
        smooth = ((8192 / waves - 1) / 3).clamp(0, 1)
        rates = (1 - smooth) * rates / 8 + smooth * rates
    assert torch.allclose(model.rotary_emb.inv_freq, rates, rtol=1e-6)


def coded(shape: torch.Size, number: int) -> torch.Tensor:
    """Each element holds its own place: a number for the tensor, and its coordinates."""
    return torch.arange(shape.numel(), dtype=torch.float32).view(shape) + number * 2**17


SHAPES: dict[str, dict[str, Any]] = {
    "irregular": {"hidden": 10, "heads": 4, "query_groups": 2, "kv_channels": 3, "ffn": 14},
    "square": {"hidden": 12, "heads": 4, "query_groups": 2, "kv_channels": 3, "ffn": 12},
    "square, a KV head each": {
        "hidden": 12, "heads": 4, "query_groups": 4, "kv_channels": 3, "ffn": 12,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_goes_where_it_belongs(shape: str) -> None:
    """No row, head or half is swapped, also where all matrices are square."""
    case = small(**SHAPES[shape], rope=True, vocab=11, padded_vocab=16)
    state = random_state(case)
    state = {name: coded(one.shape, k) for k, (name, one) in enumerate(state.items())}
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)))
    (found,) = convert_state_dict(state, spec, Recipe(target="hf", dtype="float32"))
    layer, head, groups = "decoder.layers.0.", case.kv_channels, case.query_groups
    each = case.heads // groups
    qkv = state[layer + "self_attention.linear_qkv.weight"]
    for part, per_group, first in (("q", each, 0), ("k", 1, each), ("v", 1, each + 1)):
        weight = found[f"model.layers.0.self_attn.{part}_proj.weight"]
        for row in range(groups * per_group * head):
            group, inner = divmod(row, per_group * head)
            assert torch.equal(weight[row], qkv[group * (each + 2) * head + first * head + inner])
    first_matrix = state[layer + "mlp.linear_fc1.weight"]
    assert torch.equal(found["model.layers.0.mlp.gate_proj.weight"], first_matrix[: case.ffn])
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], first_matrix[case.ffn :])
    same = {
        "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
        "mlp.down_proj.weight": "mlp.linear_fc2.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    }
    for ours, theirs in same.items():
        assert torch.equal(found[f"model.layers.0.{ours}"], state[layer + theirs])
    assert torch.equal(found["lm_head.weight"], state["output_layer.weight"][:11])


def test_every_expert_goes_where_it_belongs() -> None:
    case = small(hidden=12, heads=4, query_groups=4, kv_channels=3, ffn=12, experts=3, moe_ffn=12)
    state = random_state(case)
    state = {name: coded(one.shape, k) for k, (name, one) in enumerate(state.items())}
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)))
    (found,) = convert_state_dict(state, spec, Recipe(target="hf", dtype="float32"))
    first = state["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"]
    second = state["decoder.layers.0.mlp.experts.experts.linear_fc2.weight"]
    for expert in range(3):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}."
        assert torch.equal(found[f"{name}w1.weight"], first[expert, :12])
        assert torch.equal(found[f"{name}w3.weight"], first[expert, 12:])
        assert torch.equal(found[f"{name}w2.weight"], second[expert])


def test_what_deepseek_cannot_say_is_refused(megatron_run: Runs) -> None:
    source = megatron_run("deepseek").checkpoint("per_layer")
    for facts, match in (
        ({"moe_router_topk": 2}, "sum of its two best"),
        ({"moe_router_score_function": "softmax"}, "moe_router_score_function"),
        ({"moe_layers": [True, False, True]}, "which layers have experts|linear_fc|router"),
        ({"moe_shared_expert_intermediate_size": 30}, "linear_fc|shared"),
        ({"model_type": "qwen3_moe"}, "no name"),
    ):
        with pytest.raises(FuseportError, match=match):
            plan_checkpoint(source, Recipe(target="hf"), facts)
    with pytest.raises(UnsupportedOptionError, match=r"the model has .*multi_latent_attention"):
        plan_checkpoint(source, Recipe())


def test_a_router_without_its_bias_is_refused(megatron_run: Runs) -> None:
    run = megatron_run("deepseek")
    state = {name: tensor for name, tensor in run.state().items() if "expert_bias" not in name}
    spec = ModelSpec.from_facts(vars(megatron_args(run.case, 1, 1)))
    with pytest.raises(UnsupportedOptionError, match="layer 1: the router has no expert bias"):
        convert_state_dict(state, spec, Recipe(target="hf"))


def test_every_row_of_latent_attention_goes_where_it_belongs(megatron_run: Runs) -> None:
    """Also between matrices of one shape, and for every expert."""
    run = megatron_run("deepseek")
    state = {
        name: coded(tensor.shape, number)
        for number, (name, tensor) in enumerate(run.state().items())
        if isinstance(tensor, torch.Tensor)
    }
    spec = ModelSpec.from_facts(vars(megatron_args(run.case, 1, 1)))
    (found,) = convert_state_dict(state, spec, Recipe(target="hf", dtype="float32"))
    same = {
        "q_a_proj": "linear_q_down_proj", "q_a_layernorm": "q_layernorm",
        "q_b_proj": "linear_q_up_proj", "kv_a_proj_with_mqa": "linear_kv_down_proj",
        "kv_a_layernorm": "kv_layernorm", "kv_b_proj": "linear_kv_up_proj",
        "o_proj": "linear_proj",
    }  # fmt: skip
    for layer in range(3):
        for ours, theirs in same.items():
            expected = state[f"decoder.layers.{layer}.self_attention.{theirs}.weight"]
            assert torch.equal(found[f"model.layers.{layer}.self_attn.{ours}.weight"], expected)
    mlp, theirs = "model.layers.2.mlp.", "decoder.layers.2.mlp."
    assert torch.equal(found[f"{mlp}gate.weight"], state[f"{theirs}router.weight"])
    bias = found[f"{mlp}gate.e_score_correction_bias"]
    assert torch.equal(bias, state[f"{theirs}router.expert_bias"])
    for expert in range(8):
        first = state[f"{theirs}experts.local_experts.{expert}.linear_fc1.weight"]
        assert torch.equal(found[f"{mlp}experts.{expert}.gate_proj.weight"], first[:20])
        assert torch.equal(found[f"{mlp}experts.{expert}.up_proj.weight"], first[20:])
    first = state[f"{theirs}shared_experts.linear_fc1.weight"]
    assert torch.equal(found[f"{mlp}shared_experts.up_proj.weight"], first[40:])
