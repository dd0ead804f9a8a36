"""Tables of architectures: the user's own, and what is wrong with one; the command line for hf."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from fuseport_testing.cases import megatron_args
from fuseport_testing.hf_tiny import tiny_tensors, write_file, write_hf_tiny
from fuseport_testing.small_models import random_state, small
from fuseport_testing.tiny import write_tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fuseport.converter import (
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    verify_checkpoint,
)
from fuseport.converter.checkpoint import file_digest
from fuseport.converter.choices import TARGETS as NAMES
from fuseport.converter.cli import app
from fuseport.converter.errors import FuseportError, OutputError, RecipeError, VerificationError
from fuseport.converter.hf_family import GROUPS, Family, make_family, packaged
from fuseport.converter.sources.megatron import read_model
from fuseport.converter.targets.table import TARGETS
from fuseport.converter.targets.target import Task

# Qwen 3's attention with other names, and norms stored minus 1.
OURS = """
like: qwen3
model_type: ours
architecture: OursForCausalLM
unified: null
zero_centred_norms: true
modules:
  q: model.layers.{i}.attn.query
  k: model.layers.{i}.attn.key
  v: model.layers.{i}.attn.value
  out: model.layers.{i}.attn.dense
config:
  layernorm_epsilon: norm_eps
defaults:
  norm_eps: 1.0e-5
"""


def test_a_users_family(tmp_path: Path) -> None:
    """From Megatron to an architecture that the package does not know, and back through itself."""
    case = small(hidden=8, heads=4, query_groups=2, kv_channels=2, ffn=12)
    state = random_state(case)
    for part in ("q", "k"):
        state[f"decoder.layers.0.self_attention.{part}_layernorm.weight"] = torch.arange(2.0) + 1
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)), qk_layernorm=True)
    recipe = Recipe(target="hf", dtype="float32", family=yaml.safe_load(OURS))
    (found,) = convert_state_dict(state, spec, recipe)
    out = state["decoder.layers.0.self_attention.linear_proj.weight"]
    assert torch.equal(found["model.layers.0.attn.dense.weight"], out)
    norm = state["decoder.layers.0.input_layernorm.weight"]
    assert torch.equal(found["model.layers.0.input_layernorm.weight"], norm - 1)
    assert torch.equal(found["model.layers.0.self_attn.q_norm.weight"], torch.tensor([0.0, 1.0]))


def test_a_users_family_from_the_command_line(tmp_path: Path) -> None:
    file, source, out = tmp_path / "ours.yaml", tmp_path / "s", tmp_path / "out"
    file.write_text(OURS)
    write_hf_tiny(source, model_type="ours", norm_eps=1e-3)
    tensors = {
        name.replace("self_attn.q_proj", "attn.query")
        .replace("self_attn.k_proj", "attn.key")
        .replace("self_attn.v_proj", "attn.value")
        .replace("self_attn.o_proj", "attn.dense"): tensor
        for name, tensor in tiny_tensors().items()
    }
    for layer in range(2):
        for part in ("q_norm", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{part}.weight"] = torch.arange(2.0)
    write_file(source / "model.safetensors", tensors)
    command = ["convert", str(source), str(out), "--target", "hf", "--dtype", "float32"]
    run = CliRunner().invoke(app, [*command, "--family", str(file)])
    assert run.exit_code == 0, run.exception
    assert CliRunner().invoke(app, ["verify", str(out), "--source", str(source)]).exit_code == 0
    found = load_file(out / "model-00001-of-00001.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    listing = CliRunner().invoke(app, ["inspect", str(source), "--family", str(file)])
    assert listing.exit_code == 0
    assert "0.001" in listing.output
    refused = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "no")])
    assert isinstance(refused.exception, RecipeError)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({}, "lacks model_type"),
        ({"like": "llama", "model_type": "x", "architecture": ""}, "lacks architecture"),
        ({"like": "zzz"}, "is like 'zzz'; known: "),
        ({"like": "llama", "zzz": 1}, "'zzz' is none of"),
        ({"like": "llama", "modules": {"zzz": "x"}}, "modules has 'zzz'"),
        ({"like": "llama", "tensors": {"q": "x"}}, "tensors has 'q'"),
        ({"like": "llama", "modules": 3}, "modules must be a table"),
        ({"like": "llama", "modules": {"q": 3}}, "neither a name nor a list"),
        ({"like": "llama", "special": 3}, "neither a name nor a list"),
        ({"like": [1]}, r"is like \[1\]; known: "),
    ],
)
def test_tables_that_make_no_sense(table: dict[str, object], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        make_family(table, "x")
    with pytest.raises(RecipeError, match=match):
        Recipe(family=table)


def test_targets_have_a_row_each() -> None:
    assert tuple(TARGETS) == NAMES


def test_every_weight_that_is_a_linears_has_a_group() -> None:
    """The weights that engines fuse share one; embeddings, norms and routers have none."""
    for name, family in packaged().items():
        assert family.model_type == name
        for part in family.modules:
            never = ("norm", "embedding", "router", "further")
            is_linear = not any(word in part for word in never)
            assert (part in GROUPS) is (is_linear and part != "shared_gate"), part
    mixtral, llama = packaged()["mixtral"], packaged()["llama"]

    def groups(family: Family, parts: str, layer: int, expert: int = 0) -> set[str]:
        names = (family.module(part, layer, expert)[0] for part in parts.split())
        return {family.group(*pair) for pair in zip(parts.split(), names, strict=True)}

    assert groups(llama, "q k v", 3) == {"model.layers.3.self_attn.qkv_proj"}
    assert groups(llama, "out", 3) == {"model.layers.3.self_attn.o_proj"}
    assert groups(llama, "output", 0) == {"lm_head"}
    assert groups(llama, "input_norm", 0) == {""}
    assert groups(mixtral, "expert.gate expert.up", 1, 2) == {
        "model.layers.1.block_sparse_moe.experts.2.gate_up_proj"
    }


def test_the_rules_hand_groups_on() -> None:
    case = small(hidden=8, heads=4, query_groups=2, kv_channels=2, ffn=12, experts=2, moe_ffn=6)
    spec = ModelSpec.from_facts(vars(megatron_args(case, 1, 1)))
    model = read_model(random_state(case), spec)
    task = Task(model, spec, Recipe(target="hf"), torch.zeros(1, 8))
    groups = {one.name: one.group for one in TARGETS["hf"].rules(task)}
    layer = "model.layers.0."
    qkv = {groups[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"}
    experts = {
        groups[f"{layer}block_sparse_moe.experts.{e}.w{w}.weight"] for e in "01" for w in "13"
    }
    assert qkv == {f"{layer}self_attn.qkv_proj"}
    assert experts == {f"{layer}block_sparse_moe.experts.{e}.gate_up_proj" for e in "01"}
    never = {name for name, group in groups.items() if not group}
    assert never == {
        "model.embed_tokens.weight", "model.norm.weight", f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight", f"{layer}block_sparse_moe.gate.weight",
    }  # fmt: skip


def test_assets(tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s")
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_x.py", "notes.txt"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"top_k": 3}')
    recipe = Recipe(target="hf")
    convert_checkpoint(source, tmp_path / "out", recipe, assets=source)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "chat_template.jinja", "model-00001-of-00001.safetensors", "fuseport-manifest.json",
    }  # fmt: skip
    verified = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--source", str(source)])
    assert verified.exit_code == 0, verified.exception
    (tmp_path / "out" / "tokenizer.json").write_text("tokeniser.json")
    with pytest.raises(FuseportError, match="other bytes"):
        CliRunner().invoke(app, ["verify", str(tmp_path / "out")], catch_exceptions=False)
    for bad in (tmp_path / "nothing", tmp_path):
        with pytest.raises(OutputError, match="no directory with a file to copy"):
            convert_checkpoint(source, tmp_path / "other", recipe, assets=bad)
    (source / "merges.txt").mkdir()
    with pytest.raises(OutputError, match="not a regular file"):
        convert_checkpoint(source, tmp_path / "other", recipe, assets=source)
    assert not (tmp_path / "other").exists()


def test_hf_from_megatron_on_the_command_line(tmp_path: Path) -> None:
    write_tiny(tmp_path / "s")
    command = ["convert", str(tmp_path / "s"), str(tmp_path / "out"), "--target", "hf"]
    dry = CliRunner().invoke(app, [*command, "--dry-run", "--shard-size", "2000"])
    assert dry.exit_code == 0, dry.exception
    assert "model-00001-of-0" in dry.output
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, command).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.exception
    refused = CliRunner().invoke(app, [*command, "--tp", "2", "--overwrite"])
    assert isinstance(refused.exception, RecipeError)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("tensor", r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ("index", r"no file holds model\.layers\.1\.mlp\.up_proj\.weight \[12, 8\]"),
        ("index's file", "the index names"),
        ("config", r"is \[12, 8\], config\.json calls for \[13, 8\]"),
    ],
)
def test_a_result_that_lacks_something(fault: str, match: str, tmp_path: Path) -> None:
    """Also where someone made the digests fit."""
    source, out = write_hf_tiny(tmp_path / "s"), tmp_path / "out"
    convert_checkpoint(source, out, Recipe(target="hf", dtype="float32"))
    file, name = out / "model-00001-of-00001.safetensors", "model.layers.1.mlp.up_proj.weight"
    index, manifest = out / "model.safetensors.index.json", out / "fuseport-manifest.json"
    texts = {path: json.loads(path.read_text()) for path in (index, manifest)}
    if fault == "tensor":
        tensors = load_file(file)
        del tensors[name], texts[manifest]["tensors"][file.name][name]
        save_file(tensors, file, {"format": "pt"})
    elif fault == "index":
        del texts[index]["weight_map"][name]
    elif fault == "index's file":
        texts[index]["weight_map"][name] = "model-00002-of-00002.safetensors"
    else:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "intermediate_size": 13}))
    index.write_text(json.dumps(texts[index]))
    for entry in texts[manifest]["files"]:
        path = out / entry
        texts[manifest]["files"][entry] = {
            "bytes": path.stat().st_size, "xxh3_128": file_digest(path),
        }  # fmt: skip
    manifest.write_text(json.dumps(texts[manifest]))
    with pytest.raises(VerificationError, match=match):
        verify_checkpoint(out)
