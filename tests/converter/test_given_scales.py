"""Given scales in a checkpoint: from a file, and from Transformer Engine's states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from fuseport_testing import te_states as te
from fuseport_testing.cases import BY_NAME, megatron_args, some_tokens
from fuseport_testing.megatron_models import Run
from fuseport_testing.trtllm_runtime import runtime_logits
from safetensors.torch import load_file, save_file

from fuseport.converter import (
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    demo,
    verify_checkpoint,
)
from fuseport.converter.errors import FuseportWarning, ScaleError
from fuseport.converter.option_files import read_scale_option

Runs = Callable[..., Run]
State = dict[str, torch.Tensor]
Scales = dict[str, dict[str, float]]
E4M3 = torch.float8_e4m3fn
INPUTS: Scales = {"*": {"input": 0.25}}
LAYER = "transformer.layers.1."


def spec(name: str) -> ModelSpec:
    return ModelSpec.from_facts(vars(megatron_args(BY_NAME[name], 1, 1)))


def state(run: Run) -> State:
    return {k: v for k, v in run.state().items() if isinstance(v, torch.Tensor)}


def encoded(values: torch.Tensor, scale: float) -> torch.Tensor:
    """uint8: e4m3 of values times the reciprocal, both in fp32, saturating."""
    quant = np.float32(1) / np.float32(scale)
    wide = np.clip(values.float().numpy() * quant, np.float32(-448), np.float32(448))
    return torch.from_numpy(wide.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def bits(codes: torch.Tensor) -> torch.Tensor:
    assert codes.dtype is E4M3
    return codes.view(torch.uint8)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_unified_fp8_says_what_the_model_said(
    name: str, tp: int, pp: int, megatron_run: Runs, tmp_path: Path
) -> None:
    run, out = megatron_run(name), tmp_path / "out"
    recipe = Recipe(tp_size=tp, pp_size=pp, quant="fp8", scales=INPUTS)
    convert_checkpoint(run.checkpoint("per_layer"), out, recipe)
    verify_checkpoint(out, run.checkpoint("per_layer"))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "FP8"
    experts = BY_NAME[name].experts
    for file in sorted(out.glob("*.safetensors")):
        tensors, plain = load_file(file), {}
        for key, tensor in tensors.items():
            module, _, kind = key.rpartition(".")
            if kind == "activation_scaling_factor":
                assert tensor.tolist() == [0.25]
            elif kind != "weights_scaling_factor":
                scale = tensors.get(f"{module}.weights_scaling_factor", torch.ones(1))
                per_expert = experts is not None and ".mlp." in module and tensor.ndim == 3
                assert scale.shape == ((experts, 1) if per_expert else (1,))
                wide = scale.view(-1, 1, 1) if per_expert else scale
                plain[key] = tensor.float() * wide
                assert (tensor.dtype is E4M3) == (f"{module}.weights_scaling_factor" in tensors)
        save_file(plain, file)
    logits = runtime_logits(out, some_tokens(run.case))
    error = float((logits - run.logits).norm() / run.logits.norm())
    assert 1e-4 < error < 0.15


def test_gate_and_up_share_a_scale_on_all_ranks(megatron_run: Runs) -> None:
    recipe = Recipe(tp_size=2, quant="fp8", scales=INPUTS)
    ranks = convert_state_dict(state(megatron_run("llama")), spec("llama"), recipe)
    scales = {
        float(rank[f"{LAYER}mlp.{part}.weights_scaling_factor"])
        for rank in ranks
        for part in ("fc", "gate")
    }
    assert len(scales) == 1


@pytest.mark.parametrize(
    ("target", "module", "scale", "static"),
    [
        ("trtllm", f"{LAYER}mlp.proj", "weights_scaling_factor", "activation_scaling_factor"),
        ("hf", "model.layers.1.mlp.down_proj", "weight_scale", "input_scale"),
    ],
)
def test_given_scales_are_used_as_they_are(
    target: str, module: str, scale: str, static: str, megatron_run: Runs
) -> None:
    given: Scales = {"*": {"input": 0.25}, module: {"weight": 0.001, "input": 0.5}}
    weights = state(megatron_run("llama"))
    recipe = Recipe(target=target, quant="fp8", scales=given)
    (found,) = convert_state_dict(weights, spec("llama"), recipe)
    expected = encoded(weights["decoder.layers.1.mlp.linear_fc2.weight"], 0.001)
    assert torch.equal(bits(found[f"{module}.weight"]), expected)
    # Most weights exceed 448 · 0.001.
    assert (expected.view(E4M3).float().abs() == 448).any()
    assert float(found[f"{module}.{scale}"]) == float(np.float32(0.001))
    assert float(found[f"{module}.{static}"]) == 0.5


def test_fused_modules_take_the_largest(megatron_run: Runs) -> None:
    parts = ("q_proj", "k_proj", "v_proj")
    given: Scales = {
        f"model.layers.0.self_attn.{part}": {"weight": 0.01 * (n + 1), "input": 1.0 + n}
        for n, part in enumerate(parts)
    }
    recipe = Recipe(target="hf", quant="fp8", scales={"*": {"input": 0.125}, **given})
    (found,) = convert_state_dict(state(megatron_run("llama")), spec("llama"), recipe)
    for part in parts:
        module = f"model.layers.0.self_attn.{part}"
        assert float(found[f"{module}.weight_scale"]) == float(np.float32(0.03))
        assert float(found[f"{module}.input_scale"]) == 3.0


def test_nvfp4_takes_static_scales_and_misses_them(megatron_run: Runs) -> None:
    weights = state(megatron_run("llama"))
    recipe = Recipe(target="hf", quant="nvfp4", scales=INPUTS)
    (found,) = convert_state_dict(weights, spec("llama"), recipe)
    assert float(found["model.layers.2.mlp.up_proj.input_scale"]) == 0.25
    with pytest.warns(FuseportWarning, match="no static scales of activations"):
        convert_state_dict(weights, spec("llama"), Recipe(target="hf", quant="nvfp4"))


O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("target", "quant", "given", "message"),
    [
        ("trtllm", "fp8", None, r"15 of 15 modules .* no input scale, .* transformer\.layers\.0"),
        ("hf", "fp8", {O_PROJ: {"input": 1.0}}, r"20 of 21 modules .* no input scale"),
        ("hf", "fp8", {"*.q_proj": {"weight": 1.0}}, r"2 of 3 modules .* no weight scale"),
        ("hf", "fp8", {"*.q_prj": {"weight": 1.0}}, r"no module is quantised with weight of \*"),
        ("hf", "fp8-row", {O_PROJ: {"weight": 1.0}}, "no module is quantised with weight of"),
        ("hf", "none", {O_PROJ: {"weight": 1.0}}, "no module is quantised with weight of"),
        ("hf", "fp8", {O_PROJ: {"weight": 0.0}}, f"{O_PROJ}: weight is 0.0, expected a finite"),
        ("hf", "fp8", {O_PROJ: {"weight": float("nan")}}, "weight is nan, expected a finite"),
        ("hf", "fp8", {O_PROJ: {"weight": float("inf")}}, "weight is inf, expected a finite"),
        ("hf", "fp8", {O_PROJ: {"weight": 1e-40}}, "weight is 1e-40, expected a finite, normal"),
        ("hf", "fp8", {O_PROJ: {"weight": 3e38}}, "reciprocal is no normal fp32 number"),
        ("hf", "fp8", {O_PROJ: {"scale": 1.0}}, "has scale, which is none of"),
    ],
)
def test_scales_that_do_not_fit_are_named(
    target: str, quant: str, given: Scales | None, message: str, megatron_run: Runs
) -> None:
    weights = state(megatron_run("llama"))
    with pytest.raises(ScaleError, match=message):
        convert_state_dict(weights, spec("llama"), Recipe(target=target, quant=quant, scales=given))


def test_a_file_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    path.write_text(json.dumps({"*.o_proj": {"weight": 0.5, "input": 2}}))
    assert read_scale_option(str(path)) == {"*.o_proj": {"weight": 0.5, "input": 2.0}}
    assert read_scale_option("source") == "source"
    assert read_scale_option(None) is None


def te_state(layer: int) -> dict[str, object]:
    """Scales that differ by layer: a layer's input has 1 / (layer + 2), a weight a tenth of it."""
    scales = te.scales()["scale_fwd"] * torch.tensor([(layer + 2.0) / 2, (layer + 2.0) / 2, 1.0])
    return te.state_2(scale_fwd=scales)


LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj",
           "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip


@pytest.mark.parametrize("target", ["trtllm", "hf"])
def test_scales_of_a_megatron_checkpoint(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = demo._weights()
    states = {
        f"decoder.layers.{name}._extra_state/shard_{layer}_4": te.saved(te_state(layer))
        for name in LINEARS
        for layer in range(4)
    }
    monkeypatch.setattr(demo, "_weights", lambda: weights | states)
    source, out = tmp_path / "megatron", tmp_path / "out"
    demo.write_demo_checkpoint(source)
    convert_checkpoint(source, out, Recipe(target=target, quant="fp8", scales="source"))
    verify_checkpoint(out, source)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    module, scale, static = {
        "trtllm": (f"{LAYER}attention.dense", "weights_scaling_factor",
                   "activation_scaling_factor"),
        "hf": (O_PROJ, "weight_scale", "input_scale"),
    }[target]  # fmt: skip
    weight_scale = float(np.float32(1) / np.float32(30))
    assert float(tensors[f"{module}.{scale}"]) == weight_scale
    assert float(tensors[f"{module}.{static}"]) == float(np.float32(1) / np.float32(3))
    source_weight = weights["decoder.layers.self_attention.linear_proj.weight"][1]
    assert torch.equal(bits(tensors[f"{module}.weight"]), encoded(source_weight, weight_scale))


def test_scales_of_a_state_dict(megatron_run: Runs) -> None:
    run = megatron_run("llama")
    states = {
        f"decoder.layers.{layer}.{name}._extra_state": te.byte_tensor(te_state(layer))
        for name in LINEARS
        for layer in range(3)
    }
    recipe = Recipe(quant="fp8", scales="source")
    (found,) = convert_state_dict({**state(run), **states}, spec("llama"), recipe)
    assert float(found[f"{LAYER}mlp.gate.activation_scaling_factor"]) == float(
        np.float32(1) / np.float32(3)
    )
    with pytest.raises(ScaleError, match="holds no scales of Transformer Engine"):
        convert_state_dict(state(run), spec("llama"), recipe)


def test_the_unified_config_names_what_stays(megatron_run: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exclude = ("lm_head", f"{LAYER}mlp.gate")
    recipe = Recipe(quant="fp8", scales=INPUTS, exclude=exclude)
    convert_checkpoint(megatron_run("llama").checkpoint("per_layer"), out, recipe)
    verify_checkpoint(out)
    kept = json.loads((out / "config.json").read_text())["quantization"]["exclude_modules"]
    # With gate, fc stays too.
    assert {f"{LAYER}mlp.gate", f"{LAYER}mlp.fc", "lm_head"} < set(kept)
    assert f"{LAYER}mlp.proj" not in kept
