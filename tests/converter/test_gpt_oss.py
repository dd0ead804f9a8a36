"""GPT-OSS: experts that are read from MXFP4, and experts that stay while the rest is quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fuseport_testing.hf_models import BY_NAME, load, logits, make, wide
from fuseport_testing.quantised_loader import dequantised, stored_tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from fuseport.converter import Recipe, convert_checkpoint, plan_checkpoint, verify_checkpoint
from fuseport.converter.errors import (
    MissingTensorError,
    ScaleError,
    ShapeError,
    UnsupportedOptionError,
)

State = dict[str, torch.Tensor]
QUANTS = ("fp8", "fp8-row", "fp8-block", "mxfp8", "nvfp4")
KEPT = ("lm_head", "*.experts")
FIRST = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model whose rows MXFP8's 32 divides."""
    model = make(wide(BY_NAME["gpt_oss"]))
    path = tmp_path_factory.mktemp("gpt_oss")
    model.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def mxfp4(bf16: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with experts in MXFP4: all codes, and scales around 2^-5."""
    path = tmp_path_factory.mktemp("mxfp4")
    write(path, packed(stored_tensors(bf16[0])), json.loads((bf16[0] / "config.json").read_text()))
    return path


def packed(state: State) -> State:
    generator = torch.Generator().manual_seed(0)
    result: State = {}
    for name, tensor in state.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            result[name] = tensor.bfloat16()
            continue
        experts, columns, rows = tensor.shape
        groups = experts, rows, columns // 32
        sizes: dict[str, tuple[tuple[int, ...], int, int]] = {
            "_blocks": ((*groups, 16), 0, 256), "_scales": (groups, 120, 125),
        }  # fmt: skip
        for end, (shape, low, high) in sizes.items():
            drawn = torch.randint(low, high, shape, generator=generator)
            result[name + end] = drawn.to(torch.uint8)
    return result


def write(path: Path, state: State, config: dict[str, Any]) -> None:
    path.mkdir(exist_ok=True)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def test_experts_in_mxfp4_become_bf16(mxfp4: Path, tmp_path: Path) -> None:
    """The bits, and the logits, of what transformers makes of them."""
    out = tmp_path / "out"
    report = convert_checkpoint(mxfp4, out, Recipe(target="hf"))
    assert report.codes == {"kept": 0, "dequantised": 6}
    verify_checkpoint(out, mxfp4)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    reference: Any = AutoModelForCausalLM.from_pretrained(
        mxfp4, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager",
        dtype=torch.bfloat16,
    )  # fmt: skip
    mine = load(out, torch.bfloat16)
    expected = reference.state_dict()
    assert mine.state_dict().keys() == expected.keys()
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(mine), logits(reference.eval()))


@pytest.mark.parametrize(
    ("quant", "source"), [*((quant, "bf16") for quant in QUANTS), ("fp8-block", "mxfp4")]
)
@pytest.mark.filterwarnings("ignore:no static scales of activations")
def test_the_other_linears_are_quantised(
    quant: str, source: str, bf16: tuple[Path, Any], mxfp4: Path, tmp_path: Path
) -> None:
    path = mxfp4 if source == "mxfp4" else bf16[0]
    out, plain = tmp_path / "out", tmp_path / "plain"
    convert_checkpoint(path, out, Recipe(target="hf", quant=quant, exclude=KEPT))
    convert_checkpoint(path, plain, Recipe(target="hf"))
    verify_checkpoint(out, path)
    before, after = stored_tensors(plain), dequantised(out)
    assert before.keys() == after.keys()
    linears = 0
    for name, tensor in before.items():
        if "self_attn" in name and name.endswith("proj.weight"):
            error = (after[name] - tensor.float()).norm() / tensor.float().norm()
            assert 0.01 < float(error) < (0.15 if quant == "nvfp4" else 0.05)
            linears += 1
        else:
            assert torch.equal(after[name], tensor.float()), name
    assert linears == 12
    said = "".join(file.read_text() for file in out.glob("*config.json"))
    assert all(f'"model.layers.{layer}.mlp.experts"' in said for layer in range(3))


@pytest.mark.parametrize("quant", QUANTS)
def test_experts_that_no_loader_reads_quantised_are_refused(quant: str, mxfp4: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"gate_up_proj: no loader .* '\*\.experts'"):
        plan_checkpoint(mxfp4, Recipe(target="hf", quant=quant))


def changed(state: State, fault: str) -> State:
    if fault == "no scales":
        del state[f"{FIRST}_scales"]
    elif fault == "no blocks":
        del state[f"{FIRST}_blocks"]
    elif fault == "a group too few":
        state[f"{FIRST}_scales"] = state[f"{FIRST}_scales"][..., 1:].contiguous()
    elif fault == "another dtype":
        state[f"{FIRST}_scales"] = state[f"{FIRST}_scales"].float()
    else:
        state[f"{FIRST}_scales"][1, 2, 1] = 0xFF
    return state


FAULTS: dict[str, tuple[type[Exception], str]] = {
    "no scales": (MissingTensorError, "gate_up_proj_scales is not there"),
    "no blocks": (MissingTensorError, "gate_up_proj_blocks is not there"),
    "a group too few": (ShapeError, r"gate_up_proj_blocks is .* expected uint8"),
    "another dtype": (ShapeError, r"gate_up_proj_scales torch\.float32"),
    "a NaN": (ScaleError, r"gate_up_proj_scales: scale number \d+ is NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_experts_are_named(fault: str, mxfp4: Path, tmp_path: Path) -> None:
    kind, match = FAULTS[fault]
    source = tmp_path / "source"
    state = changed(stored_tensors(mxfp4), fault)
    write(source, state, json.loads((mxfp4 / "config.json").read_text()))
    with pytest.raises(kind, match=match):
        convert_checkpoint(source, tmp_path / "out", Recipe(target="hf"))
    assert not (tmp_path / "out").exists()
