"""Given scales: a user's file, and Megatron's state dicts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fuseport_testing import te_states as te
from safetensors.torch import save_file

from fuseport.converter.errors import CorruptSourceError, ScaleError, SourceError
from fuseport.converter.hf_family import packaged
from fuseport.converter.scales import MAX_FILE_BYTES, ModuleScales, ScaleTable, read_scales
from fuseport.converter.te_scales import (
    Linear,
    family_modules,
    from_te_states,
    unified_modules,
)

DOWN = "model.layers.3.mlp.down_proj"


def fp32(value: float) -> float:
    return float(np.float32(value))


def json_file(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "scales.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def tensor_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "scales.safetensors"
    save_file(tensors, path)
    return path


def test_both_kinds_of_file_say_the_same(tmp_path: Path) -> None:
    scales = {"weight": 0.1, "input": 0.3, "kv_cache": 1.5, "k": 2, "v": 3.25}
    tensors = {
        f"{DOWN}.{kind}_scale": torch.tensor([value]).float() for kind, value in scales.items()
    }
    expected = ModuleScales(fp32(0.1), fp32(0.3), 1.5, 2.0, 3.25)
    for path in (json_file(tmp_path, {DOWN: scales}), tensor_file(tmp_path, tensors)):
        table = read_scales(str(path))
        assert table.module(DOWN) == expected
        assert table.module("model.layers.4.mlp.down_proj") == ModuleScales()
        table.check_used()


def test_the_most_exact_entry_wins(tmp_path: Path) -> None:
    table = read_scales(
        json_file(
            tmp_path,
            {
                "*": {"input": 1},
                "model.layers.*.mlp.down_proj": {"input": 2, "weight": 2},
                DOWN: {"weight": 3},
            },
        )
    )
    assert table.module(DOWN) == ModuleScales(weight=3, input=2)
    assert table.module("lm_head") == ModuleScales(input=1)
    assert table.unused() == []


def test_a_name_goes_before_a_pattern_of_as_many_characters() -> None:
    scales = {"lm_head*": ModuleScales(weight=1.0), "lm_head": ModuleScales(weight=2.0)}
    assert ScaleTable(scales, "scales").module("lm_head").weight == 2.0


def test_equally_exact_patterns_are_an_error() -> None:
    one = ModuleScales(weight=1.0)
    table = ScaleTable({"a.*.c": one, "a.?.c": one}, "scales")
    with pytest.raises(ScaleError, match=r"weight of a.b.c is given by a.\*.c and as exactly by"):
        table.module("a.b.c")


def test_entries_that_match_nothing_are_named() -> None:
    one = ModuleScales(weight=1.0, input=1.0)
    table = ScaleTable({DOWN: one, "typo.*": one}, "scales")
    table.module(DOWN)
    assert sorted(table.unused()) == ["input of typo.*", "weight of typo.*"]
    with pytest.raises(ScaleError, match=r"scales: no module .* input of typo"):
        table.check_used()


UNUSABLE = ["0", "-1", "1e-40", "NaN", "Infinity", "1e999", "1e39", "true", '"1"', "null", "[1]"]


@pytest.mark.parametrize("value", [*UNUSABLE, "1" + "0" * 400])
def test_unusable_values_are_named(tmp_path: Path, value: str) -> None:
    path = json_file(tmp_path, f'{{"{DOWN}": {{"weight": {value}}}}}')
    with pytest.raises(ScaleError, match=f"{DOWN}: weight is"):
        read_scales(path)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-40, float("nan"), float("inf")])
def test_unusable_tensors_are_named(tmp_path: Path, value: float) -> None:
    path = tensor_file(tmp_path, {f"{DOWN}.weight_scale": torch.tensor(value)})
    with pytest.raises(ScaleError, match=f"weight of {DOWN} is"):
        read_scales(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({DOWN: {"weight": 1, "wieght": 1}}, "wieght, which is none of"),
        ({DOWN: 1}, "must be an object"),
        ({DOWN: {}}, "must be an object"),
        ([1], "expected an object of modules, found list"),
        ('{"a": {"weight": 1}, "a": {"weight": 2}}', "a is there twice"),
        ('{"a": {"weight": 1, "weight": 2}}', "weight is there twice"),
    ],
)
def test_unknown_content_is_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ScaleError, match=message):
        read_scales(json_file(tmp_path, content))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\x00", '{"a": 1' + "0" * 5000 + "}"])
def test_damaged_json_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(CorruptSourceError, match="not readable as JSON"):
        read_scales(json_file(tmp_path, content))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight_scale", torch.ones(1)),
        (f"{DOWN}.weight", torch.ones(1)),
        (f"{DOWN}.other_scale", torch.ones(1)),
        (f"{DOWN}.weight_scale", torch.ones(2)),
        (f"{DOWN}.weight_scale", torch.ones(1).half()),
    ],
)
def test_other_tensors_are_named(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    with pytest.raises(ScaleError, match=name):
        read_scales(tensor_file(tmp_path, {name: tensor}))


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"\*\.json or \*\.safetensors"):
        read_scales(tmp_path / "scales.txt")
    with pytest.raises(SourceError, match="no such file"):
        read_scales(tmp_path / "scales.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(SourceError, match="no such file"):
        read_scales(tmp_path / "pipe.json")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CorruptSourceError, match="not readable as safetensors"):
        read_scales(tmp_path / "bad.safetensors")
    with open(tmp_path / "big.json", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(CorruptSourceError, match="at most"):
        read_scales(tmp_path / "big.json")


NAMES: dict[str, Callable[[Linear], list[str]]] = {
    "trtllm": unified_modules,
    "hf": partial(family_modules, packaged()["llama"]),
}
LAYER = "module.decoder.layers.7."


def test_a_dense_layer() -> None:
    state = te.byte_tensor(te.state_2())
    names = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1")
    states: dict[str, object] = {f"{LAYER}{name}._extra_state": state for name in names}
    states[f"{LAYER}mlp.linear_fc2._extra_state"] = te.saved(te.state_1())
    states[f"{LAYER}self_attention.core_attention._extra_state"] = state
    states[f"{LAYER}mlp.linear_fc1.weight"] = torch.ones(2)
    states["decoder.layers.8.mlp.linear_fc1._extra_state"] = None
    found = from_te_states(states)
    scales = ModuleScales(weight=fp32(1 / 20), input=0.5)
    assert set(found.linears.values()) == {scales}
    assert found.ignored == {
        f"{LAYER}self_attention.core_attention._extra_state": "not a linear whose weight is "
        "quantised",
        "decoder.layers.8.mlp.linear_fc1._extra_state": "no scales",
    }
    parts = {
        "trtllm": ["attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"],
        "hf": [f"self_attn.{one}_proj" for one in "qkvo"]
        + [f"mlp.{one}_proj" for one in ("gate", "up", "down")],
    }
    for target, prefix in (("trtllm", "transformer.layers.7."), ("hf", "model.layers.7.")):
        table = found.table(NAMES[target])
        assert [table.module(prefix + part) for part in parts[target]] == [scales] * len(
            parts[target]
        )
        table.check_used()


def expert_states(form: str) -> dict[str, object]:
    """Three experts, in each way that Megatron-Core keeps them."""
    prefix, whole = f"{LAYER}mlp.experts.", te.state_2(3)
    if form == "grouped":
        return {f"{prefix}linear_fc1._extra_state": te.byte_tensor(whole)}
    if form == "pieces":
        return {
            f"{prefix}linear_fc1._extra_state{index or ''}": te.byte_tensor(piece)
            for index, piece in enumerate(te.split(whole, 3))
        }
    each = te.scales(3)["scale_fwd"].view(3, 3)
    return {
        f"{prefix}local_experts.{index}.linear_fc1._extra_state": te.byte_tensor(
            te.state_2(scale_fwd=scale.clone())
        )
        for index, scale in enumerate(each)
    }


@pytest.mark.parametrize("form", ["grouped", "pieces", "sequential"])
def test_experts(form: str) -> None:
    found = from_te_states(expert_states(form))
    each = [ModuleScales(fp32(1 / (20 + 10 * e)), fp32(1 / (2 + e))) for e in range(3)]
    linears = [Linear(7, "mlp.experts.linear_fc1", expert) for expert in range(3)]
    assert found.linears == dict(zip(linears, each, strict=True))
    table = found.table(partial(family_modules, packaged()["qwen3_moe"]))
    for expert, scales in enumerate(each):
        for part in ("gate_proj", "up_proj"):
            assert table.module(f"model.layers.7.mlp.experts.{expert}.{part}") == scales
    # One module, one scale: the one with which no expert saturates.
    assert found.table(NAMES["trtllm"]).module("transformer.layers.7.mlp.fc") == each[0]


def test_a_missing_piece_is_named() -> None:
    states = expert_states("pieces")
    del states[f"{LAYER}mlp.experts.linear_fc1._extra_state1"]
    with pytest.raises(ScaleError, match=r"only the pieces \[0, 2\]"):
        from_te_states(states)


def test_one_linear_under_two_prefixes_is_named() -> None:
    state = te.byte_tensor(te.state_2())
    names = (f"{LAYER}mlp.linear_fc2._extra_state", "decoder.layers.7.mlp.linear_fc2._extra_state")
    with pytest.raises(ScaleError, match="is there twice"):
        from_te_states(dict.fromkeys(names, state))
