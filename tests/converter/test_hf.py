"""Checkpoints that transformers saved: laid out again, and run to transformers' logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fuseport_testing.hf_models import BY_NAME, CASES, load, logits, make, tokens
from fuseport_testing.trtllm_runtime import runtime_logits
from safetensors.torch import load_file, save_file

from fuseport.converter import Recipe, convert_checkpoint, plan_checkpoint, verify_checkpoint
from fuseport.converter.errors import FuseportError, UnsupportedOptionError, VerificationError
from fuseport.converter.hf_family import packaged

Saved = Callable[[str], tuple[Path, Any]]
NAMES = [case.name for case in CASES]
UNIFIED = [case.name for case in CASES if case.unified]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(name)` → a case's directory and model, made once a session."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            model, path = make(BY_NAME[name]), tmp_path_factory.mktemp(name)
            model.save_pretrained(path, max_shard_size="40KB")
            made[name] = path, model
        return made[name]

    return get


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("name", NAMES)
def test_hf_to_hf_loads_and_gives_the_same_logits(name: str, saved: Saved, tmp_path: Path) -> None:
    source, model = saved(name)
    out = tmp_path / "out"
    recipe = Recipe(target="hf", dtype="float32", shard_size=30_000)
    convert_checkpoint(source, out, recipe)
    verify_checkpoint(out, source)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(load(out)), logits(model))
    before, after = all_tensors(source), all_tensors(out)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_holds_every_value(name: str, saved: Saved, tmp_path: Path) -> None:
    source, model = saved(name)
    convert_checkpoint(source, tmp_path / "out", Recipe(target="hf"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", UNIFIED)
def test_hf_to_unified_gives_the_same_logits(
    name: str, tp: int, saved: Saved, tmp_path: Path
) -> None:
    source, model = saved(name)
    convert_checkpoint(source, tmp_path / "out", Recipe(tp_size=tp, dtype="float32"))
    verify_checkpoint(tmp_path / "out", source)
    found, reference = runtime_logits(tmp_path / "out", tokens()), logits(model)
    assert float((found - reference).norm() / reference.norm()) < 1e-5


REFUSED = {
    "mistral_window": "sliding_window",
    "qwen3_moe_plain": "norm_topk_prob",
    "gemma2": "attn_logit_softcapping",
    "gemma3": "sliding_window",
    "deepseek": "multi_latent_attention",
    "gpt_oss": "softmax_type",
    "granite": "embedding_multiplier",
    "stablelm": "a family that the format does not know",
}


@pytest.mark.parametrize("name", REFUSED)
def test_unified_refuses_what_it_cannot_say(name: str, saved: Saved) -> None:
    with pytest.raises(UnsupportedOptionError, match=REFUSED[name]):
        plan_checkpoint(saved(name)[0], Recipe())


def test_llama3_scaling_is_kept(saved: Saved, tmp_path: Path) -> None:
    convert_checkpoint(saved("llama3")[0], tmp_path / "out", Recipe())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rotary_base"] == 500000.0
    assert config["rotary_scaling"]["factor"] == 8.0
    assert config["share_embedding_table"] is True


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek"])
def test_experts_in_two_tensors_are_read(name: str, saved: Saved, tmp_path: Path) -> None:
    """The names under which newer transformers keeps a layer's experts in memory."""
    source, model = saved(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert any("mlp.experts.gate_up_proj" in key for key in state)
    other = tmp_path / "other"
    other.mkdir()
    save_file(state, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text((source / "config.json").read_text())
    convert_checkpoint(other, tmp_path / "out", Recipe(target="hf", dtype="float32"))
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def with_further_layer(source: Path, other: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint with a layer behind the last one; its tensors."""
    other.mkdir()
    state = all_tensors(source)
    extra = {
        key.replace("layers.2.", "layers.3."): value + 1
        for key, value in state.items()
        if "layers.2." in key
    }
    own = {
        "embed_tokens": (61, 32), "enorm": (32,), "hnorm": (32,), "eh_proj": (32, 64),
        "shared_head.norm": (32,), "shared_head.head": (61, 32),
    }  # fmt: skip
    for number, (name, shape) in enumerate(own.items()):
        size = torch.Size(shape)
        extra[f"model.layers.3.{name}.weight"] = torch.arange(size.numel()).view(size) + number / 8
    save_file(state | extra, other / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return extra


def test_layers_that_predict_further_tokens_are_kept(saved: Saved, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    extra = with_further_layer(saved("deepseek")[0], other)
    recipe = Recipe(target="hf", dtype="float32", mtp="keep")
    convert_checkpoint(other, out, recipe)
    verify_checkpoint(out, other)
    before, after = all_tensors(other), all_tensors(out)
    assert set(extra) < set(after) == set(before)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.raises(UnsupportedOptionError, match="layers that predict further tokens"):
        plan_checkpoint(other, Recipe(mtp="keep"))
    with pytest.raises(FuseportError, match=r"embedding of its own with 61 rows"):
        plan_checkpoint(other, recipe, {"vocab_size": 60})
    # The number alone is no layer.
    path, _ = saved("deepseek")
    assert not plan_checkpoint(path, recipe).spec.further_layers


def test_layers_that_predict_further_tokens_are_dropped(saved: Saved, tmp_path: Path) -> None:
    source, model = saved("deepseek")
    other, out = tmp_path / "other", tmp_path / "out"
    extra = with_further_layer(source, other)
    plan = plan_checkpoint(other, Recipe(target="hf", dtype="float32"))
    assert set(plan.source.ignored) == set(extra)
    convert_checkpoint(plan, out)
    verify_checkpoint(out, other)
    assert torch.equal(logits(load(out)), logits(model))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_changed_row_is_found(saved: Saved, tmp_path: Path) -> None:
    source, _ = saved("llama")
    convert_checkpoint(source, tmp_path / "out", Recipe(target="hf"))
    other = tmp_path / "other"
    other.mkdir()
    state = all_tensors(source)
    state["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1
    save_file(state, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(VerificationError, match=r"layers\.1\.self_attn\.k_proj\.weight\[3, 5\]"):
        verify_checkpoint(tmp_path / "out", other)


@pytest.mark.parametrize("option", ["tp_size", "pp_size", "moe_ep_size", "use_parallel_embedding"])
def test_options_without_meaning(option: str, saved: Saved) -> None:
    value: Any = True if option == "use_parallel_embedding" else 2
    with pytest.raises(FuseportError, match=f"{option} = {value} has no meaning for target hf"):
        plan_checkpoint(saved("llama")[0], Recipe(target="hf", **{option: value}))


def test_every_family_is_tried() -> None:
    assert {case.model_type for case in CASES} == set(packaged())


def test_a_case_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(CASES)
