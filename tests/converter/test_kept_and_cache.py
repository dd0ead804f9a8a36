"""Layers that stay as they are, and the scales of an FP8 KV cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fuseport_testing.cases import BY_NAME, megatron_args
from fuseport_testing.hf_models import BY_NAME as HF_CASES
from fuseport_testing.hf_models import make, wide
from fuseport_testing.megatron_models import Run
from safetensors.torch import load_file
from typer.testing import CliRunner

from fuseport.converter import (
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    plan_checkpoint,
    verify_checkpoint,
)
from fuseport.converter.cli import app
from fuseport.converter.errors import FuseportWarning, RecipeError, ScaleError

Runs = Callable[..., Run]
State = dict[str, torch.Tensor]
NARROW = torch.float8_e4m3fn, torch.uint8


def spec(name: str = "llama") -> ModelSpec:
    return ModelSpec.from_facts(vars(megatron_args(BY_NAME[name], 1, 1)))


def state(run: Run) -> State:
    return {k: v for k, v in run.state().items() if isinstance(v, torch.Tensor)}


def load(directory: Path) -> State:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("target", "prefix", "files"),
    [
        ("hf", "model.layers.", ("config.json", "quantization_config", "modules_to_not_convert")),
        ("trtllm", "transformer.layers.", ("config.json", "quantization", "exclude_modules")),
    ],
)
def test_first_and_last_layers_stay(
    target: str, prefix: str, files: tuple[str, str, str], megatron_run: Runs, tmp_path: Path
) -> None:
    source, out = megatron_run("llama").checkpoint("per_layer"), tmp_path / "out"
    quant = {"hf": "fp8", "trtllm": "fp8-row"}[target]
    recipe = Recipe(target=target, quant=quant, keep_first=1, keep_last=1)
    convert_checkpoint(source, out, recipe)
    verify_checkpoint(out, source)
    tensors = load(out)
    quantised = {name for name, tensor in tensors.items() if tensor.dtype in NARROW}
    assert quantised
    assert all(f"{prefix}1." in name for name in quantised)
    assert tensors[min(quantised).replace("layers.1.", "layers.2.")].dtype is torch.bfloat16
    name, section, key = files
    kept = json.loads((out / name).read_text())[section][key]
    modules = {one.rpartition(".")[0] for one in quantised}
    assert {one.replace("layers.1.", f"layers.{n}.") for one in modules for n in (0, 2)} < set(kept)
    assert not modules & set(kept)


def test_linears_that_are_never_quantised_are_listed(tmp_path: Path) -> None:
    """Engines take for quantised what is not: a tied output too, of which there is no tensor."""
    tied = {**HF_CASES["qwen2_moe"].options, "tie_word_embeddings": True}
    make(wide(replace(HF_CASES["qwen2_moe"], options=tied))).save_pretrained(tmp_path / "in")
    plan = plan_checkpoint(tmp_path / "in", Recipe(target="hf", quant="mxfp8"))
    kept = plan.settings()["config.json"]["quantization_config"]["ignore"]  # type: ignore[index]
    gates = ("gate", "shared_expert_gate")
    layers = [f"model.layers.{n}.mlp.{gate}" for n in range(3) for gate in gates]
    assert kept == ["lm_head", *layers]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_first": 2, "keep_last": 1}, "leave none of 3 layers"),
        ({"keep_first": -1}, "keep_first must be a whole number of layers, found -1"),
        ({"keep_last": True}, "keep_last must be a whole number of layers"),
        ({"keep_first": 1, "quant": "none"}, "keep_first = 1, but nothing is quantised"),
        ({"keep_last": 1, "target": "trtllm", "pp_size": 2}, "number their layers from 0"),
        ({"kv_cache": "int8"}, "kv_cache 'int8' is none of none, fp8"),
    ],
)
def test_what_cannot_be_kept_is_named(
    options: dict[str, object], message: str, megatron_run: Runs
) -> None:
    weights = state(megatron_run("llama"))
    with pytest.raises(RecipeError, match=message):
        convert_state_dict(
            weights,
            spec(),
            Recipe(**{"target": "hf", "quant": "fp8-row", **options}),  # type: ignore[arg-type]
        )


def test_scales_of_a_unified_cache(megatron_run: Runs) -> None:
    given = {
        "*.0.attention.qkv": {"kv_cache": 0.5},
        "*.1.attention.qkv": {"k": 2.0, "v": 3.0},
        "*.2.attention.qkv": {"k": 0.125, "kv_cache": 0.25},
    }
    recipe = Recipe(tp_size=2, kv_cache="fp8", scales=given)
    for rank in convert_state_dict(state(megatron_run("llama")), spec(), recipe):
        found = [
            rank[f"transformer.layers.{n}.attention.kv_cache_scaling_factor"] for n in (0, 1, 2)
        ]
        assert [(one.dtype, one.tolist()) for one in found] == [
            (torch.float32, [value]) for value in (0.5, 3.0, 0.25)
        ]


@pytest.mark.parametrize(
    ("quant", "place"),
    [
        ("none", ("config.json", "quantization_config", "kv_cache_scheme")),
        ("fp8", ("config.json", "quantization_config", "kv_cache_scheme")),
        ("fp8-row", ("config.json", "quantization_config", "kv_cache_scheme")),
        ("fp8-block", ("config.json", "quantization_config", "kv_cache_scheme")),
    ],
)
def test_scales_of_a_cache_in_the_hugging_face_layout(
    quant: str, place: tuple[str, str, str], megatron_run: Runs, tmp_path: Path
) -> None:
    source, out = megatron_run("llama").checkpoint("per_layer"), tmp_path / "out"
    given = {"*.k_proj": {"k": 0.5}, "*.v_proj": {"kv_cache": 0.75}}
    recipe = Recipe(target="hf", quant=quant, kv_cache="fp8", scales=given)
    convert_checkpoint(source, out, recipe)
    verify_checkpoint(out, source)
    tensors = load(out)
    for layer in range(BY_NAME["llama"].layers):
        prefix = f"model.layers.{layer}.self_attn."
        for name, value in (("k_proj.k_scale", 0.5), ("v_proj.v_scale", 0.75)):
            assert tensors[prefix + name].shape == ()
            assert float(tensors[prefix + name]) == value
    name, section, key = place
    stated = json.loads((out / name).read_text())[section][key]
    assert stated == "FP8" or (stated["num_bits"], stated["dynamic"]) == (8, False)


def test_a_cache_without_scales_is_said(megatron_run: Runs, tmp_path: Path) -> None:
    source, out = megatron_run("llama").checkpoint("per_layer"), tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", str(source), str(out), "--kv-cache", "fp8"])
    assert result.exit_code == 0
    assert "no scales of the KV cache were given" in " ".join(result.output.split())
    assert load(out)["transformer.layers.0.attention.kv_cache_scaling_factor"].tolist() == [1.0]
    config = json.loads((out / "config.json").read_text())["quantization"]
    assert config == {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    manifest = json.loads((out / "fuseport-manifest.json").read_text())
    assert len(manifest["notes"]) == 1
    with pytest.warns(FuseportWarning, match="1.0 is written"):
        convert_state_dict(state(megatron_run("llama")), spec(), Recipe(kv_cache="fp8"))


def test_a_missing_scale_of_a_cache_is_named(megatron_run: Runs) -> None:
    recipe = Recipe(kv_cache="fp8", scales={"*.0.attention.qkv": {"kv_cache": 0.5}})
    with pytest.raises(ScaleError, match=r"4 of 6 .* k of transformer\.layers\.1\.attention\.qkv"):
        convert_state_dict(state(megatron_run("llama")), spec(), recipe)


def test_latent_attention_has_no_such_cache(tmp_path: Path) -> None:
    make(HF_CASES["deepseek"]).save_pretrained(tmp_path / "in")
    with pytest.raises(RecipeError, match="no keys and values as such"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", Recipe(target="hf", kv_cache="fp8"))
