"""Layers that predict further tokens, from Megatron to DeepSeek's layout: kept, or dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuseport_testing.cases import megatron_args, some_tokens
from fuseport_testing.megatron_models import BY_NAME, Run
from safetensors.torch import load_file

from fuseport.converter import (
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    plan_checkpoint,
    verify_checkpoint,
)
from fuseport.converter.errors import MissingTensorError, UnknownTensorError, UnsupportedOptionError
from fuseport.converter.refit import Refit

Runs = Callable[..., Run]
State = dict[str, torch.Tensor]
NAME = "deepseek_further"
CASE = BY_NAME[NAME]
KEEP = Recipe(target="hf", dtype="float32", mtp="keep")
# A layer's part in Hugging Face's layout → Megatron's, behind `mtp.layers.N.`.
SAME = {
    "enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "final_layernorm",
    **{
        f"self_attn.{ours}": f"transformer_layer.self_attention.{theirs}"
        for ours, theirs in {
            "q_a_proj": "linear_q_down_proj", "q_a_layernorm": "q_layernorm",
            "q_b_proj": "linear_q_up_proj", "kv_a_proj_with_mqa": "linear_kv_down_proj",
            "kv_a_layernorm": "kv_layernorm", "kv_b_proj": "linear_kv_up_proj",
            "o_proj": "linear_proj",
        }.items()
    },
    "input_layernorm": "transformer_layer.input_layernorm",
    "post_attention_layernorm": "transformer_layer.pre_mlp_layernorm",
    "mlp.gate": "transformer_layer.mlp.router",
    "mlp.shared_experts.down_proj": "transformer_layer.mlp.shared_experts.linear_fc2",
}  # fmt: skip


def weights(run: Run) -> State:
    """By the names of Megatron-Core up to 0.16, and of all checkpoints in torch_dist."""
    return {
        name.replace("mtp_model_layer", "transformer_layer"): one
        for name, one in run.state().items()
        if isinstance(one, torch.Tensor)
    }


def coded(state: State) -> State:
    """Each element holds its own place: a number for the tensor, and its coordinates."""
    return {
        name: torch.arange(one.numel()).view(one.shape).float() + 2**15 * number
        for number, (name, one) in enumerate(state.items())
    }


def spec() -> ModelSpec:
    return ModelSpec.from_facts(vars(megatron_args(CASE, 1, 1)))


def check(found: State, state: State) -> None:
    """Two layers behind the last one, every tensor of them."""
    for number in range(2):
        ours, theirs = f"model.layers.{CASE.layers + number}.", f"mtp.layers.{number}."
        names = {name.removeprefix(ours) for name in found if name.startswith(ours)}
        for one, other in SAME.items():
            assert torch.equal(found[f"{ours}{one}.weight"], state[f"{theirs}{other}.weight"]), one
        mlp = f"{theirs}transformer_layer.mlp."
        bias = found[f"{ours}mlp.gate.e_score_correction_bias"]
        assert torch.equal(bias, state[f"{mlp}router.expert_bias"])
        wholes = {"embed_tokens": "embedding.word_embeddings", "shared_head.head": "output_layer"}
        for one, other in wholes.items():
            assert torch.equal(found[f"{ours}{one}.weight"], state[f"{other}.weight"][: CASE.vocab])
        experts = ["shared_experts", *(f"experts.{e}" for e in range(8))]
        for expert in experts:
            inner = expert.replace("experts.", "experts.local_experts.")
            gate, up = state[f"{mlp}{inner}.linear_fc1.weight"].chunk(2)
            assert torch.equal(found[f"{ours}mlp.{expert}.gate_proj.weight"], gate)
            assert torch.equal(found[f"{ours}mlp.{expert}.up_proj.weight"], up)
            down = state[f"{mlp}{inner}.linear_fc2.weight"]
            assert torch.equal(found[f"{ours}mlp.{expert}.down_proj.weight"], down)
        # Norms, latent attention, router and its bias, copies; experts have three matrices each.
        assert len(names) == len(SAME) + 1 + 2 + 3 * len(experts) - 1


@pytest.mark.parametrize("inner", ["transformer_layer", "mtp_model_layer"])
def test_every_element_goes_where_it_belongs(inner: str, megatron_run: Runs) -> None:
    state = coded(weights(megatron_run(NAME)))
    named = {name.replace("transformer_layer", inner): one for name, one in state.items()}
    (found,) = convert_state_dict(named, spec(), KEEP)
    check(found, state)


@pytest.mark.parametrize("layout", CASE.layouts)
def test_checkpoints_keep_them(layout: str, megatron_run: Runs, tmp_path: Path) -> None:
    run, out = megatron_run(NAME), tmp_path / "out"
    source = run.checkpoint(layout)
    convert_checkpoint(source, out, KEEP)
    verify_checkpoint(out, source)
    (file,) = out.glob("*.safetensors")
    check(load_file(file), weights(run))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 2


def test_a_refit_has_them_too(megatron_run: Runs) -> None:
    state = coded(weights(megatron_run(NAME)))
    (found,) = Refit(state, spec(), KEEP).run()
    check(found, state)
    (dropped,) = Refit(state, spec(), Recipe(target="hf", dtype="float32")).run()
    extra = ("model.layers.3.", "model.layers.4.")
    assert dropped.keys() == {name for name in found if not name.startswith(extra)}


@pytest.mark.parametrize("layout", ["per_layer", "legacy"])
def test_checkpoints_drop_them_by_name(layout: str, megatron_run: Runs, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from fuseport_testing.hf_models import load

    run, out = megatron_run(NAME), tmp_path / "out"
    plan = plan_checkpoint(run.checkpoint(layout), Recipe(target="hf", dtype="float32"))
    assert any(name.startswith("mtp.layers.1.") for name in plan.source.ignored)
    convert_checkpoint(plan, out)
    verify_checkpoint(out, run.checkpoint(layout))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    with torch.no_grad():
        logits = load(out)(some_tokens(CASE)).logits
    assert float((logits - run.logits).norm() / run.logits.norm()) < 1e-5


def test_in_memory_facts_and_tensors_must_agree(megatron_run: Runs) -> None:
    state = weights(megatron_run(NAME))
    dropped = Recipe(target="hf", dtype="float32")
    (found,) = convert_state_dict(state, spec(), dropped)
    without = {name: one for name, one in state.items() if not name.startswith("mtp.")}
    (expected,) = convert_state_dict(without, spec().replace(further_layers=0), dropped)
    assert found.keys() == expected.keys()
    with pytest.raises(UnknownTensorError, match=r"mtp\.layers\.0"):
        convert_state_dict(state, spec().replace(further_layers=0), KEEP)
    with pytest.raises(MissingTensorError, match=r"mtp\.layers\.0\.enorm"):
        convert_state_dict(without, spec(), KEEP)


def test_no_other_layout_has_a_place_for_them(megatron_run: Runs) -> None:
    source = megatron_run(NAME).checkpoint("per_layer")
    with pytest.raises(UnsupportedOptionError, match="layers that predict further tokens"):
        plan_checkpoint(source, Recipe(mtp="keep"))
