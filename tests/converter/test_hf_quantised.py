"""Quantised results of every architecture, and quantised checkpoints as sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fuseport_testing.hf_models import BY_NAME, CASES, HfCase, load, logits, make, tokens, wide
from fuseport_testing.quantised_loader import dequantised, stored_tensors, write_plain
from fuseport_testing.trtllm_runtime import runtime_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from fuseport.converter import Recipe, convert_checkpoint, plan_checkpoint, verify_checkpoint
from fuseport.converter.errors import (
    FuseportError,
    MissingTensorError,
    RecipeError,
    ScaleError,
    ShapeError,
    SourceError,
    UnsupportedOptionError,
)

Saved = Callable[[str], tuple[Path, Any]]
QUANTS = ("fp8", "fp8-row", "fp8-block", "mxfp8", "nvfp4")
NAMES = [case.name for case in CASES if case.model_type != "gpt_oss"]
E4M3 = torch.float8_e4m3fn
# Relative errors that each scheme keeps: of a weight's elements, and of the logits of tiny random
# models. With experts a token that stands between two of them may go to the other.
WEIGHT_BOUND, BOUND, ROUTED_BOUND = 0.05, 0.15, 0.35
# e2m1 has two bits fewer.
COARSER = {"nvfp4": 3.0}
# 300 rows and columns: blocks of 128 end within the matrices.
BLOCKS = HfCase("blocks", "llama", {"hidden_size": 160, "intermediate_size": 300, "head_dim": 36})
# What transformers' fp8 loader takes: blocks that fill the matrices.
FULL = HfCase("full", "qwen3", {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64})
EXTRA = {case.name: case for case in (BLOCKS, FULL)}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(name)` → a case's directory and model, made once a session."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            model = make(EXTRA[name] if name in EXTRA else wide(BY_NAME[name]))
            path = tmp_path_factory.mktemp(f"wide_{name}")
            model.save_pretrained(path)
            made[name] = path, model
        return made[name]

    return get


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def bits(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in state.items()}


def assert_same(one: Path, other: Path) -> None:
    """Names, dtypes, shapes and bits."""
    first, second = stored_tensors(one), stored_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
    second = bits(second)
    assert all(torch.equal(tensor, second[name]) for name, tensor in bits(first).items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no static scales of activations")
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_in_every_scheme(
    name: str, quant: str, saved: Saved, tmp_path: Path
) -> None:
    source, model = saved(name)
    out = tmp_path / "out"
    convert_checkpoint(source, out, Recipe(target="hf", quant=quant))
    verify_checkpoint(out, source)
    found = logits(load(write_plain(out, tmp_path / "plain")))
    experts = any("expert" in key for key in stored_tensors(out))
    coarser = COARSER.get(quant, 1.0)
    assert 1e-4 < error(found, logits(model)) < coarser * (ROUTED_BOUND if experts else BOUND)
    before = stored_tensors(source)
    for key, weight in dequantised(out).items():
        assert error(weight, before[key].float()) < coarser * WEIGHT_BOUND, key
    scales = {key for key in stored_tensors(out) if "weight_scale" in key}
    assert len(scales) >= 3 * model.config.num_hidden_layers


PROFILES = {
    ("vllm", "fp8"): ("fp8", "weight_scale", 0),
    ("trtllm", "fp8"): ("modelopt", "weight_scale", 0),
    ("trtllm", "fp8-row"): ("modelopt", "weight_scale", 1),
    ("sglang", "fp8-row"): ("compressed-tensors", "weight_scale", 2),
    ("compressed-tensors", "fp8"): ("compressed-tensors", "weight_scale", 1),
    ("compressed-tensors", "fp8-row"): ("compressed-tensors", "weight_scale", 2),
    ("compressed-tensors", "fp8-block"): ("compressed-tensors", "weight_scale", 2),
    ("trtllm", "fp8-block"): ("fp8", "weight_scale_inv", 2),
    ("trtllm", "mxfp8"): ("modelopt", "weight_scale", 2),
}


def test_experts_with_one_scale_have_no_words_in_compressed_tensors(saved: Saved) -> None:
    recipe = Recipe(target="hf", quant="fp8", profile="compressed-tensors")
    with pytest.raises(RecipeError, match="choose quant fp8-row"):
        plan_checkpoint(saved("qwen3_moe")[0], recipe)


@pytest.mark.parametrize(("profile", "quant"), PROFILES)
def test_profiles(profile: str, quant: str, saved: Saved, tmp_path: Path) -> None:
    dense = (profile, quant) == ("compressed-tensors", "fp8")
    source, model = saved("llama" if dense else "qwen3_moe")
    out = tmp_path / "out"
    convert_checkpoint(source, out, Recipe(target="hf", quant=quant, profile=profile))
    verify_checkpoint(out, source)
    said, suffix, axes = PROFILES[profile, quant]
    assert (out / "hf_quant_config.json").exists() is (said == "modelopt")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == said
    scale = stored_tensors(out)[f"model.layers.0.self_attn.q_proj.{suffix}"]
    assert scale.ndim == axes
    assert error(logits(load(write_plain(out, tmp_path / "plain"))), logits(model)) < ROUTED_BOUND


def test_profiles_that_are_not_there(saved: Saved) -> None:
    with pytest.raises(RecipeError, match="profile 'zzz' is none of vllm, sglang"):
        Recipe(profile="zzz")
    recipe = Recipe(target="hf", quant="mxfp8", profile="compressed-tensors")
    with pytest.raises(RecipeError, match=r"profile 'compressed-tensors' reads no weights .*mxfp8"):
        plan_checkpoint(saved("llama")[0], recipe)


@pytest.mark.parametrize("name", ["full", "qwen3_moe", "deepseek"])
def test_blocks_load_with_transformers(name: str, saved: Saved, tmp_path: Path) -> None:
    """On a CPU it dequantises; what it then says is what the codes say."""
    pytest.importorskip("accelerate")
    source, model = saved(name)
    out = tmp_path / "out"
    convert_checkpoint(source, out, Recipe(target="hf", quant="fp8-block", dtype="float32"))
    maker: Any = AutoModelForCausalLM
    loaded, info = maker.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, attn_implementation="eager",
        quantization_config=FineGrainedFP8Config(dequantize=True),
    )  # fmt: skip
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = logits(loaded.train(False))
    plain = logits(load(write_plain(out, tmp_path / "plain")))
    assert error(found, plain) < 1e-2
    assert error(found, logits(model)) < ROUTED_BOUND


# -- quantised sources


def quantised_source(saved: Saved, tmp_path: Path, name: str, quant: str, profile: str) -> Path:
    out = tmp_path / "source"
    convert_checkpoint(saved(name)[0], out, Recipe(target="hf", quant=quant, profile=profile))
    return out


SOURCES = [
    ("blocks", "fp8-block", "vllm"),
    ("blocks", "fp8-block", "compressed-tensors"),
    ("blocks", "fp8-row", "vllm"),
    ("blocks", "fp8-row", "trtllm"),
    ("blocks", "fp8", "vllm"),
    ("blocks", "fp8", "compressed-tensors"),
    ("deepseek", "fp8-block", "vllm"),
    ("mixtral", "mxfp8", "vllm"),
]


@pytest.mark.parametrize(("name", "quant", "profile"), SOURCES)
def test_codes_are_kept_where_the_schemes_agree(
    name: str, quant: str, profile: str, saved: Saved, tmp_path: Path
) -> None:
    """Also where computing them again would not give the same: scales of other makers."""
    source, out = quantised_source(saved, tmp_path, name, quant, profile), tmp_path / "out"
    (file,) = source.glob("*.safetensors")
    state = load_file(file)
    for key, tensor in state.items():
        if tensor.dtype is torch.float32 and "scale" in key:
            state[key] = tensor * 1.7
        elif tensor.dtype is torch.uint8:
            state[key] = tensor + 1
    save_file(state, file, {"format": "pt"})
    report = convert_checkpoint(source, out, Recipe(target="hf", quant=quant, profile=profile))
    assert_same(source, out)
    codes = sum(tensor.dtype is E4M3 for tensor in state.values())
    assert report.codes == {"kept": codes, "dequantised": 0}
    verify_checkpoint(out, source)
    for settings in ("config.json", "hf_quant_config.json"):
        assert (source / settings).exists() is (out / settings).exists()
    assert (source / "config.json").read_text() == (out / "config.json").read_text()


@pytest.mark.parametrize("quant", ["none", "fp8", "fp8-row", "fp8-block"])
@pytest.mark.parametrize(("name", "stored", "profile"), SOURCES)
def test_other_schemes_are_made_of_what_the_codes_say(
    name: str, stored: str, profile: str, quant: str, saved: Saved, tmp_path: Path
) -> None:
    """The same bits as from a checkpoint in fp32 with the values of the codes."""
    if quant == stored:
        pytest.skip("kept: see above")
    source = quantised_source(saved, tmp_path, name, stored, profile)
    plain = write_plain(source, tmp_path / "plain")
    recipe = Recipe(target="hf", quant=quant, dtype="float32")
    report = convert_checkpoint(source, tmp_path / "out", recipe)
    convert_checkpoint(plain, tmp_path / "expected", recipe)
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert report.codes["kept"] == 0
    assert report.codes["dequantised"] > 0
    counts = verify_checkpoint(tmp_path / "out", source).accounting
    assert counts is not None
    assert not counts.dropped
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())


@pytest.mark.parametrize(
    ("tp", "name", "quant"),
    [
        (1, "qwen3_moe", "fp8-block"),
        (2, "qwen3_moe", "fp8-block"),
        (2, "llama", "fp8"),
        (1, "llama", "fp8-row"),
        (2, "mixtral", "mxfp8"),
    ],
)
def test_a_quantised_source_in_the_unified_layout(
    tp: int, name: str, quant: str, saved: Saved, tmp_path: Path
) -> None:
    source = quantised_source(saved, tmp_path, name, quant, "vllm")
    convert_checkpoint(source, tmp_path / "out", Recipe(tp_size=tp, dtype="float32"))
    verify_checkpoint(tmp_path / "out", source)
    plain = logits(load(write_plain(source, tmp_path / "plain")))
    assert error(runtime_logits(tmp_path / "out", tokens()), plain) < 1e-5


def test_excluded_weights_are_dequantised(saved: Saved, tmp_path: Path) -> None:
    source = quantised_source(saved, tmp_path, "llama", "fp8-block", "vllm")
    recipe = Recipe(target="hf", quant="fp8-block", exclude=("lm_head", "*.layers.0.*"))
    report = convert_checkpoint(source, tmp_path / "out", recipe)
    assert report.codes == {"kept": 14, "dequantised": 7}
    found = stored_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], dequantised(source)[name].bfloat16())
    assert found["model.layers.1.mlp.up_proj.weight"].dtype is E4M3


def test_scales_of_activations_are_named(saved: Saved, tmp_path: Path) -> None:
    source = quantised_source(saved, tmp_path, "llama", "fp8", "vllm")
    (file,) = source.glob("*.safetensors")
    extra = "model.layers.0.self_attn.q_proj.input_scale"
    save_file({**load_file(file), extra: torch.ones(())}, file, {"format": "pt"})
    (source / "model.safetensors.index.json").unlink()
    file.rename(source / "model.safetensors")
    plan = plan_checkpoint(source, Recipe(target="hf", quant="fp8"))
    assert set(plan.source.ignored) == {extra}


Change = Callable[[dict[str, torch.Tensor]], object]
Q = "model.layers.0.self_attn.q_proj"
S = f"{Q}.weight_scale_inv"
FAULTS: dict[str, tuple[Change, type[FuseportError], str]] = {
    "no scale": (lambda state: state.pop(S), MissingTensorError, f"{Q}.weight is e4m3"),
    "no weight": (lambda state: state.pop(f"{Q}.weight"), FuseportError, S),
    "scale of another shape": (
        lambda state: state.update({S: torch.ones(2, 1)}), ShapeError, "expected 1 × 1 scales",
    ),
    "infinite": (
        lambda state: state.update({S: torch.full((1, 1), torch.inf)}), ScaleError, f"{S}.* is inf",
    ),
    "NaN": (
        lambda state: state.update({S: torch.full((1, 1), torch.nan)}), ScaleError, f"{S}.* is nan",
    ),
    "zero": (lambda state: state.update({S: torch.zeros(1, 1)}), ScaleError, f"{S}.* is 0"),
    "negative": (lambda state: state.update({S: -torch.ones(1, 1)}), ScaleError, f"{S}.* is -1"),
    "e5m2": (
        lambda state: state.update({f"{Q}.weight": torch.zeros(64, 64).to(torch.float8_e5m2)}),
        UnsupportedOptionError, "F8_E5M2",
    ),
    "codes of experts together": (
        lambda state: state.update({f"{Q}.weight": torch.zeros(2, 64, 64).to(E4M3)}),
        UnsupportedOptionError, r"matrices \[out, in\] only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("quant", ["none", "fp8-block"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_sources(fault: str, quant: str, saved: Saved, tmp_path: Path) -> None:
    """Whether the codes are kept or not: an error by name, and nothing written."""
    source = quantised_source(saved, tmp_path, "llama", "fp8-block", "vllm")
    (file,) = source.glob("*.safetensors")
    change, kind, match = FAULTS[fault]
    state = load_file(file)
    change(state)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    file.unlink()
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(kind, match=match):
        convert_checkpoint(source, tmp_path / "out", Recipe(target="hf", quant=quant))
    assert not (tmp_path / "out").exists()


STATED: dict[str, tuple[object, type[FuseportError], str]] = {
    "mxfp4": ({"quant_method": "mxfp4"}, UnsupportedOptionError, "quant_method: 'mxfp4'"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, UnsupportedOptionError, "gptq"),
    "blocks of 64": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]}, UnsupportedOptionError, "64, 64",
    ),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, UnsupportedOptionError, "e4m3 weights"),
    "two ways": (
        {"quant_method": "compressed-tensors", "config_groups": {
            "a": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
            "b": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}},
        UnsupportedOptionError, "compressed-tensors",
    ),
    "int8": (
        {"quant_method": "compressed-tensors", "config_groups": {
            "a": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}},
        UnsupportedOptionError, "compressed-tensors",
    ),
    "no table": ("fp8", SourceError, "makes no sense"),
    "groups that are none": (
        {"quant_method": "compressed-tensors", "config_groups": [3]}, SourceError,
        "makes no sense",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_settings_that_are_not_read(name: str, saved: Saved, tmp_path: Path) -> None:
    source = quantised_source(saved, tmp_path, "llama", "fp8-block", "vllm")
    said, kind, match = STATED[name]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    with pytest.raises(kind, match=match):
        plan_checkpoint(source, Recipe(target="hf"))
