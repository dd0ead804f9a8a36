"""Quantised checkpoints: what is stored, what shares a scale, and what the model still says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuseport_testing.cases import BY_NAME, megatron_args, some_tokens
from fuseport_testing.megatron_models import Run
from fuseport_testing.trtllm_runtime import runtime_logits
from safetensors.torch import load_file, save_file

from fuseport.converter import (
    ModelSpec,
    Recipe,
    convert_checkpoint,
    convert_state_dict,
    verify_checkpoint,
)
from fuseport.converter.checkpoint import file_digest
from fuseport.converter.errors import RecipeError, VerificationError
from fuseport.converter.limits import Limits
from fuseport.kernels.codecs import (
    dequantise_blocks,
    dequantise_mx,
    dequantise_nvfp4,
    dequantise_rows,
    dequantise_tensor,
)

Runs = Callable[..., Run]
State = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
# quant → the scales' name, and what the codes stand for.
HF: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "fp8": ("weight_scale", dequantise_tensor),
    "fp8-row": ("weight_scale", lambda codes, scale: dequantise_rows(codes, scale.view(-1))),
    "fp8-block": ("weight_scale_inv", dequantise_blocks),
    "mxfp8": ("weight_scale", dequantise_mx),
    "nvfp4": ("weight_scale", dequantise_nvfp4),
}
# Relative error of the logits of tiny random models: a bound that each scheme keeps.
BOUND = {"fp8": 0.15, "fp8-row": 0.15, "fp8-block": 0.15, "mxfp8": 0.15, "nvfp4": 0.5}


# The models' second matrices have rows that no 32 divides; Mixtral's, that no 16 does.
NARROW = {
    ("llama", "mxfp8"): "*.down_proj", ("mixtral", "mxfp8"): "*.w2", ("mixtral", "nvfp4"): "*.w2"
}  # fmt: skip


def hf_recipe(name: str, quant: str) -> Recipe:
    narrow = NARROW.get((name, quant))
    return Recipe(target="hf", quant=quant, exclude=("lm_head", *([narrow] if narrow else ())))


def load(directory: Path) -> State:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def dequantised(tensors: State, suffix: str, decode: Callable[..., torch.Tensor]) -> State:
    """The tensors in fp32, without scales."""
    result = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        places = [f"{module}.{one}" for one in (suffix, "weight_scale_2")]
        scales = [tensors[place] for place in places if place in tensors]
        if name not in places:
            result[name] = decode(tensor, *scales) if scales else tensor.float()
    return result


def hf_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.train(False)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize("quant", HF)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_hf_checkpoints_say_what_the_model_said(
    name: str, quant: str, megatron_run: Runs, tmp_path: Path
) -> None:
    run, out = megatron_run(name), tmp_path / "out"
    recipe = hf_recipe(name, quant)
    convert_checkpoint(run.checkpoint("per_layer"), out, recipe)
    verify_checkpoint(out, run.checkpoint("per_layer"))
    tensors = load(out)
    assert any(tensor.dtype is E4M3 for tensor in tensors.values())
    plain = tmp_path / "plain"
    shutil.copytree(out, plain, ignore=shutil.ignore_patterns("*.safetensors*", "hf_quant*"))
    config = json.loads((plain / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    save_file(dequantised(tensors, *HF[quant]), plain / "model.safetensors", {"format": "pt"})
    logits = hf_logits(plain, some_tokens(run.case))
    error = float((logits - run.logits).norm() / run.logits.norm())
    assert 1e-4 < error < BOUND[quant]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_unified_checkpoints_with_scales_for_rows(
    name: str, tp: int, pp: int, megatron_run: Runs, tmp_path: Path
) -> None:
    run, out = megatron_run(name), tmp_path / "out"
    recipe = Recipe(tp_size=tp, pp_size=pp, quant="fp8-row")
    convert_checkpoint(run.checkpoint("per_layer"), out, recipe)
    verify_checkpoint(out, run.checkpoint("per_layer"))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"

    def rows(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return codes.float() * scale.unsqueeze(-1)

    for file in out.glob("*.safetensors"):
        save_file(dequantised(load_file(file), "per_channel_scale", rows), file)
    logits = runtime_logits(out, some_tokens(run.case))
    error = float((logits - run.logits).norm() / run.logits.norm())
    assert 1e-4 < error < BOUND["fp8-row"]


def spec(name: str) -> ModelSpec:
    return ModelSpec.from_facts(vars(megatron_args(BY_NAME[name], 1, 1)))


def state(run: Run) -> State:
    return {k: v for k, v in run.state().items() if isinstance(v, torch.Tensor)}


def test_fused_weights_share_one_scale(megatron_run: Runs) -> None:
    (found,) = convert_state_dict(
        state(megatron_run("llama")), spec("llama"), Recipe(target="hf", quant="fp8")
    )
    layer = "model.layers.1."
    for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                  ("mlp.gate_proj", "mlp.up_proj")):  # fmt: skip
        scales = {float(found[f"{layer}{part}.weight_scale"]) for part in fused}
        codes = [found[f"{layer}{part}.weight"].float().abs().max() for part in fused]
        assert len(scales) == 1
        # The largest weight of the group has the largest code.
        assert max(codes) == 448.0
    assert found["lm_head.weight"].dtype is torch.bfloat16


@pytest.mark.parametrize("quant", HF)
def test_codes_do_not_depend_on_the_batches(
    quant: str, megatron_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = megatron_run("mixtral").checkpoint("per_layer"), hf_recipe("mixtral", quant)
    convert_checkpoint(source, tmp_path / "one", recipe)
    monkeypatch.setattr(Limits, "window", lambda self, device: 48 << 10)
    convert_checkpoint(source, tmp_path / "many", recipe)
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert one.keys() == many.keys()
    for name in one:
        bits = [tensors[name].reshape(-1).view(torch.uint8) for tensors in (one, many)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_nvfp4_is_stored_as_its_loaders_read_it(
    name: str, megatron_run: Runs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = hf_recipe(name, "nvfp4")
    convert_checkpoint(megatron_run(name).checkpoint("per_layer"), out, recipe)
    tensors = load(out)
    layer, (first, second) = "model.layers.1.", {
        "llama": ("mlp.gate_proj", "mlp.up_proj"),
        "mixtral": ("block_sparse_moe.experts.2.w1", "block_sparse_moe.experts.2.w3"),
    }[name]  # fmt: skip
    rows = BY_NAME[name].ffn if name == "llama" else BY_NAME[name].moe_ffn
    gate = layer + first
    kinds = [(tensors[f"{gate}.{part}"].dtype, tuple(tensors[f"{gate}.{part}"].shape))
             for part in ("weight", "weight_scale", "weight_scale_2")]  # fmt: skip
    assert kinds == [
        (torch.uint8, (rows, 16)), (E4M3, (rows, 2)), (torch.float32, ())
    ]  # fmt: skip
    attention = [f"{layer}self_attn.{part}_proj" for part in "qkv"]
    for fused in (attention, [gate, layer + second]):
        assert len({float(tensors[f"{one}.weight_scale_2"]) for one in fused}) == 1
        # The block with the largest weight of the group has the largest e4m3 scale.
        assert max(float(tensors[f"{one}.weight_scale"].float().max()) for one in fused) == 448.0
    stated = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (stated["quant_algo"], stated["group_size"]) == ("W4A16_NVFP4", 16)


@pytest.mark.parametrize("quant", HF)
def test_structure_names_a_scale_that_is_missing(
    quant: str, megatron_run: Runs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert_checkpoint(
        megatron_run("llama").checkpoint("per_layer"), out, hf_recipe("llama", quant)
    )
    lost = f"model.layers.1.self_attn.o_proj.{HF[quant][0]}"
    index = out / "model.safetensors.index.json"
    settings = json.loads(index.read_text())
    del settings["weight_map"][lost]
    index.write_text(json.dumps(settings))
    sizes = json.loads((out / "fuseport-manifest.json").read_text())
    sizes["files"][index.name] = {"bytes": index.stat().st_size, "xxh3_128": file_digest(index)}
    (out / "fuseport-manifest.json").write_text(json.dumps(sizes))
    with pytest.raises(VerificationError, match=f"no file holds {lost}"):
        verify_checkpoint(out)


def test_scales_of_rows_do_not_depend_on_tp(megatron_run: Runs) -> None:
    weights = state(megatron_run("llama"))
    (whole,) = convert_state_dict(weights, spec("llama"), Recipe(quant="fp8-row"))
    ranks = convert_state_dict(weights, spec("llama"), Recipe(quant="fp8-row", tp_size=2))
    name = "transformer.layers.0.mlp.fc"
    for part in ("weight", "per_channel_scale"):
        joined = torch.cat([rank[f"{name}.{part}"].view(torch.uint8) for rank in ranks])
        assert torch.equal(joined, whole[f"{name}.{part}"].view(torch.uint8))


def test_excluded_modules_stay_as_they_are(megatron_run: Runs, tmp_path: Path) -> None:
    exclude = ("lm_head", "model.layers.0.*", "*.k_proj")
    recipe = Recipe(target="hf", quant="fp8-block", exclude=exclude)
    out = tmp_path / "out"
    convert_checkpoint(megatron_run("llama").checkpoint("per_layer"), out, recipe)
    tensors = load(out)
    quantised = {name.rpartition(".")[0] for name, t in tensors.items() if t.dtype is E4M3}
    # With k, q and v stay too: engines fuse them.
    parts = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layers = BY_NAME["llama"].layers
    assert quantised == {f"model.layers.{n}.{part}" for n in range(1, layers) for part in parts}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.self_attn.q_proj" in config["modules_to_not_convert"]
    assert not quantised & set(config["modules_to_not_convert"])


def test_rows_that_do_not_fit_are_named(megatron_run: Runs) -> None:
    recipe = Recipe(target="hf", quant="mxfp8")
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.down_proj\.weight: .*multiple of 32"):
        convert_state_dict(state(megatron_run("llama")), spec("llama"), recipe)


def test_a_pattern_that_matches_nothing_is_named(megatron_run: Runs) -> None:
    recipe = Recipe(target="hf", quant="fp8", exclude=("*.q_prj",))
    with pytest.raises(RecipeError, match=r"'\*\.q_prj' matches none of the \d+ linears"):
        convert_state_dict(state(megatron_run("llama")), spec("llama"), recipe)


def test_a_wrong_code_or_scale_is_found(megatron_run: Runs, tmp_path: Path) -> None:
    source, out = megatron_run("llama").checkpoint("per_layer"), tmp_path / "out"
    convert_checkpoint(source, out, Recipe(target="hf", quant="fp8-row"))
    (file,) = out.glob("*.safetensors")
    original = file.read_bytes()
    for place in (-1, -len(original) // 2):
        damaged = bytearray(original)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(VerificationError):
            verify_checkpoint(out)


def test_what_a_target_cannot_hold_is_refused() -> None:
    with pytest.raises(RecipeError, match="fp8-row"):
        convert_state_dict({"embedding.word_embeddings.weight": torch.zeros(1)}, spec("llama"),
                           Recipe(quant="mxfp8"))  # fmt: skip
    with pytest.raises(RecipeError, match="none of none, fp8"):
        Recipe(quant="int4")
    with pytest.raises(RecipeError, match="list of patterns"):
        Recipe(exclude="lm_head")  # type: ignore[arg-type]
