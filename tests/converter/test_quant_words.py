"""What engines are told: no word of theirs promises scales of activations that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuseport_testing.tiny import write_tiny

from fuseport.converter import Recipe, convert_checkpoint, verify_checkpoint
from fuseport.converter.checkpoint import read_json
from fuseport.converter.checkpoint_plan import CheckpointPlan, plan_checkpoint

# Profile and scheme → the words without static scales of activations, and with them.
WORDS = {
    ("vllm", "fp8"): ("fp8", "FP8"),
    ("sglang", "fp8"): ("fp8", "FP8"),
    ("trtllm", "fp8"): ("FP8", "FP8"),
    ("vllm", "nvfp4"): ("W4A16_NVFP4", "NVFP4"),
    ("sglang", "nvfp4"): ("W4A16_NVFP4", "NVFP4"),
    ("trtllm", "nvfp4"): ("NVFP4", "NVFP4"),
}
INPUTS = {"*": {"input": 0.5}}


def tiny_plan(source: Path, **options: Any) -> CheckpointPlan:
    return plan_checkpoint(source, Recipe(target="hf", **options))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("s") / "tiny")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("profile", "quant"), WORDS)
def test_scales_of_activations_are_promised_where_they_are(
    profile: str, quant: str, static: bool, source: Path
) -> None:
    scales = INPUTS if static else None
    exclude = ("*.down_proj",) if quant == "nvfp4" else ()
    options = {"profile": profile, "quant": quant, "scales": scales, "exclude": exclude}
    settings = tiny_plan(source, **options).settings()
    said: Any = settings["config.json"]["quantization_config"]
    expected = WORDS[profile, quant][static]
    if expected == "fp8":
        assert (said["quant_method"], said["activation_scheme"]) == ("fp8", "dynamic")
        assert "hf_quant_config.json" not in settings
    else:
        file: Any = settings["hf_quant_config.json"]["quantization"]
        assert said["quant_method"] == "modelopt"
        assert said["quant_algo"] == file["quant_algo"] == expected


@pytest.mark.parametrize("profile", ["vllm", "sglang", "compressed-tensors"])
def test_a_cache_alone_is_said_without_modelopt(profile: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = Recipe(target="hf", profile=profile, kv_cache="fp8")
    convert_checkpoint(source, out, recipe)
    verify_checkpoint(out, source)
    said = read_json(out / "config.json")["quantization_config"]
    assert (said["quant_method"], said["config_groups"]) == ("compressed-tensors", {})
    assert said["kv_cache_scheme"]["num_bits"] == 8
    assert not (out / "hf_quant_config.json").exists()


def test_rows_that_engines_cannot_fuse_are_said(source: Path) -> None:
    (note,) = tiny_plan(source, quant="fp8-block").notes
    assert note.startswith("model.layers.0.self_attn.q_proj has 16 rows, which is no multiple of")
    without = ("*.k_proj", "*.up_proj")
    assert not tiny_plan(source, quant="fp8-block", exclude=without).notes


@pytest.mark.parametrize("quant", ["fp8", "fp8-block"])
def test_a_cache_beside_transformers_fp8_is_said_twice(quant: str, source: Path) -> None:
    options = {"quant": quant, "kv_cache": "fp8", "exclude": ("*.k_proj", "*.up_proj")}
    said: Any = tiny_plan(source, **options).settings()["config.json"]["quantization_config"]
    assert said["quant_method"] == "fp8"
    assert (said["kv_cache_scheme"]["type"], said["kv_cache_quant_algo"]) == ("float", "FP8")
