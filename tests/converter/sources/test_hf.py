"""Hugging Face checkpoints: what is read, and what is refused by name. No transformers here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fuseport_testing.hf_tiny import (
    CONFIG,
    entries_of,
    read_index,
    tiny_tensors,
    write_file,
    write_hf_tiny,
    write_index,
)
from safetensors.torch import load_file, save_file

from fuseport.converter import Recipe, convert_checkpoint, plan_checkpoint, verify_checkpoint
from fuseport.converter.errors import (
    CorruptSourceError,
    FuseportError,
    MissingTensorError,
    ModelError,
    RecipeError,
    ShapeError,
    SourceError,
    UnknownTensorError,
    UnsafeSourceError,
    UnsupportedOptionError,
)
from fuseport.converter.sources.source import open_source

HF = Recipe(target="hf", dtype="float32")
Q = "model.layers.0.self_attn.q_proj.weight"


def refused(path: Path, error: type[FuseportError], match: str, recipe: Recipe = HF) -> None:
    """The error, with nothing written."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(error, match=match):
        convert_checkpoint(path, path.parent / "out", recipe)
    assert sorted(path.parent.iterdir()) == before


def result(out: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in out.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_or_shards(shards: int, tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s", shards)
    convert_checkpoint(source, tmp_path / "out", HF)
    verify_checkpoint(tmp_path / "out", source)
    found, expected = result(tmp_path / "out"), tiny_tensors()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """In the Hugging Face layout as they are; in the other like the same values in fp32."""
    source, twin = write_hf_tiny(tmp_path / "s"), write_hf_tiny(tmp_path / "twin")
    values = {name: (tensor * 1.001).to(dtype) for name, tensor in tiny_tensors().items()}
    save_file(values, source / "model.safetensors")
    expected = {name: tensor.float() for name, tensor in values.items()}
    write_file(twin / "model.safetensors", expected)
    convert_checkpoint(source, tmp_path / "hf", HF)
    assert_equal(result(tmp_path / "hf"), expected)
    for one in (source, twin):
        convert_checkpoint(one, tmp_path / "out" / one.name, Recipe(dtype="float32"))
    assert_equal(result(tmp_path / "out" / "s"), result(tmp_path / "out" / "twin"))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """The Hub's cache keeps a snapshot as links to blobs elsewhere."""
    blobs, source = write_hf_tiny(tmp_path / "blobs"), tmp_path / "s"
    source.mkdir()
    for file in blobs.iterdir():
        (source / file.name).symlink_to(file)
    assert len(open_source(source).tensors) == len(tiny_tensors())


def test_only_byte_ranges_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf_tiny(tmp_path / "s")
    plan = plan_checkpoint(source, Recipe(tp_size=2))
    (stored,) = (one for one in plan.stored.values() if one.name == Q)
    sizes: list[int] = []
    real = os.preadv

    def spy(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    part = torch.empty(5)
    stored.read_flat(3, 8, part)
    assert torch.equal(part, tiny_tensors()[Q].flatten()[3:8])
    assert sizes == [20]


INDEX_FAULTS: dict[str, tuple[str, type[FuseportError], str]] = {
    "up": ("../part0.safetensors", UnsafeSourceError, "outside the checkpoint's directory"),
    "absolute": ("/etc/passwd", UnsafeSourceError, "outside the checkpoint's directory"),
    "folder": ("x/part0.safetensors", UnsafeSourceError, "outside the checkpoint's directory"),
    "dots": ("..", UnsafeSourceError, "outside the checkpoint's directory"),
    "nul": ("part0\0.safetensors", UnsafeSourceError, "outside the checkpoint's directory"),
    "missing": ("part9.safetensors", CorruptSourceError, "part9.safetensors is missing"),
    "elsewhere": ("part1.safetensors", CorruptSourceError, "lacks tensor"),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_index_that_points_elsewhere(fault: str, tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s", 2)
    file, error, match = INDEX_FAULTS[fault]
    files = read_index(source)
    first = next(name for name, place in files.items() if place == "part0.safetensors")
    write_index(source, {**files, first: file})
    refused(source, error, match)


def test_index_and_shards_that_differ(tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s", 2)
    files = read_index(source)
    write_index(source, {**files, "model.extra.weight": "part0.safetensors"})
    refused(source, CorruptSourceError, "part0.safetensors lacks tensor 'model.extra.weight'")
    write_index(source, {name: file for name, file in files.items() if name != Q})
    refused(source, CorruptSourceError, f"index.json lacks tensor '{Q}'")
    (source / "model.safetensors.index.json").unlink()
    refused(source, SourceError, "no .metadata file")


NO_INDEX = (
    "", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": "x", "a": "y"}}', "[" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("text", NO_INDEX)
def test_index_that_is_none(text: str, tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s", 2)
    (source / "model.safetensors.index.json").write_text(text)
    refused(source, CorruptSourceError, "index.json")


def spoilt(name: str, **changes: Any) -> bytes:
    entries: Any = entries_of(tiny_tensors())
    entries[name] |= changes
    return json.dumps(entries).encode()


OFFSETS = entries_of(tiny_tensors())[Q]["data_offsets"]
HEADERS: dict[str, tuple[bytes, type[FuseportError], str]] = {
    "no json": (b"{", CorruptSourceError, "no readable JSON"),
    "no object": (b"[]", CorruptSourceError, "expected a JSON object"),
    "nested": (b"[" * 100_000, CorruptSourceError, "no readable JSON"),
    "key twice": (b'{"a": 1, "a": 2}', CorruptSourceError, "the key 'a' is there twice"),
    "entry": (b'{"a": 3}', CorruptSourceError, "'a' has no sensible dtype"),
    "shape": (spoilt(Q, shape=[8, -8]), CorruptSourceError, "no sensible dtype"),
    "other shape": (spoilt(Q, shape=[8, 7]), CorruptSourceError, "takes 256 bytes, expected 224"),
    "huge": (spoilt(Q, shape=[2**40, 2**40]), CorruptSourceError, "takes 256 bytes"),
    "text": (spoilt(Q, shape="88"), CorruptSourceError, "no sensible dtype"),
    "backwards": (spoilt(Q, data_offsets=OFFSETS[::-1]), CorruptSourceError, "no sensible dtype"),
    "overlap": (
        spoilt(Q, data_offsets=[OFFSETS[0] - 4, OFFSETS[1] - 4]), CorruptSourceError, "overlaps",
    ),
    "hole": (
        spoilt(Q, data_offsets=[OFFSETS[0] + 4, OFFSETS[1] + 4]), CorruptSourceError, "hole",
    ),
    "far": (spoilt(Q, data_offsets=[2**50, 2**50 + 256]), CorruptSourceError, "hole"),
    "dtype": (spoilt(Q, dtype="F33"), SourceError, "dtype 'F33', which is not known"),
    "no dtype": (spoilt(Q, dtype=None), SourceError, "dtype None, which is not known"),
    "a list": (spoilt(Q, dtype=["F32"]), SourceError, "not known"),
    "fp8": (spoilt(Q, dtype="F8_E5M2"), UnsupportedOptionError, f"'{Q}' is F8_E5M2"),
    "packed": (spoilt(Q, dtype="F4"), UnsupportedOptionError, f"'{Q}' is F4"),
    "bytes": (spoilt(Q, dtype="U8", shape=[256]), ModelError, Q),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS)
def test_header_that_makes_no_sense(fault: str, tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s")
    header, error, match = HEADERS[fault]
    write_file(source / "model.safetensors", tiny_tensors(), header)
    refused(source, error, match)


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_header_that_claims_to_be_large(length: int, tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s")
    path = source / "model.safetensors"
    with path.open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
        # Sparse: the length alone must not make the reader believe it.
        file.truncate(200_000_000)
    refused(source, CorruptSourceError, f"a header of {length} bytes")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_file(keep: int, tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(source, CorruptSourceError, "truncated")


def test_longer_file(tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s")
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"1234")
    refused(source, CorruptSourceError, "its header describes")


def test_quantised_sources_are_refused(tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s", quantization_config={"quant_method": "mxfp4"})
    refused(source, UnsupportedOptionError, "quant_method: 'mxfp4'.* is not read")
    other = write_hf_tiny(tmp_path / "t")
    tensors = tiny_tensors()
    name = Q.replace("weight", "weight_scale_inv")
    write_file(other / "model.safetensors", {**tensors, name: torch.ones(1, 1)})
    refused(other, UnsupportedOptionError, name)


def test_tensors_that_do_not_fit_the_facts(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    for number, (change, error, match) in enumerate((
        ({Q: None}, MissingTensorError, Q),
        ({Q: torch.zeros(8, 9)}, ShapeError, Q),
        ({"model.layers.7.x.weight": torch.zeros(1)}, UnknownTensorError, "layers.7.x"),
        ({"lm_head.weight": None}, MissingTensorError, "lm_head.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(8)}, UnknownTensorError, "bias"),
    )):  # fmt: skip
        source = write_hf_tiny(tmp_path / str(number) / "s")
        changed = {**tensors, **change}
        kept = {name: one for name, one in changed.items() if one is not None}
        write_file(source / "model.safetensors", kept)
        refused(source, error, match)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"model_type": "zzz"}, RecipeError, "no table for model_type 'zzz'"),
        ({"model_type": None}, RecipeError, "no table"),
        ({"num_hidden_layers": "x"}, ModelError, "num_layers must be"),
        ({"num_hidden_layers": 10**9}, ModelError, "num_layers must be"),
        ({"hidden_size": -1}, ModelError, "hidden_size must be"),
        ({"rope_theta": "x"}, ModelError, "rotary_base must be"),
        ({"rope_scaling": 3}, SourceError, "makes no sense"),
        ({"hidden_act": "zzz"}, UnsupportedOptionError, "'zzz' is not known"),
        ({"attention_bias": True}, MissingTensorError, "bias"),
    ],
)
def test_config_that_makes_no_sense(
    config: dict[str, Any], error: type[FuseportError], match: str, tmp_path: Path
) -> None:
    refused(write_hf_tiny(tmp_path / "s", **config), error, match)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 1}'])
def test_config_that_is_none(text: str, tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s")
    (source / "config.json").write_text(text)
    refused(source, CorruptSourceError, "config.json")


@pytest.mark.parametrize(
    ("config", "option"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"sliding_window": 3}, "sliding_window"),
        ({"embedding_multiplier": 3.0}, "embedding_multiplier"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ],
)
def test_options_are_kept_for_hf_and_refused_for_unified(
    config: dict[str, Any], option: str, tmp_path: Path
) -> None:
    source = write_hf_tiny(tmp_path / "s", **config)
    refused(source, UnsupportedOptionError, option, Recipe())
    convert_checkpoint(source, tmp_path / "out", HF)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(written[key] == value for key, value in config.items())
    assert {**CONFIG, **config, "dtype": "float32", "torch_dtype": "float32"} == written


def test_facts_against_the_sources_config(tmp_path: Path) -> None:
    """The config is taken over, so a fact that it does not say would be lost."""
    source = write_hf_tiny(tmp_path / "s")
    for fact in ({"rotary_base": 3.0}, {"layernorm_epsilon": 1.0}, {"special": ("x",)}):
        with pytest.raises(ModelError, match=next(iter(fact))):
            plan_checkpoint(source, HF, fact)
    plan_checkpoint(source, HF, {"vocab_size": 10, "rotary_base": 10000.0})


def test_a_tied_model_may_hold_its_embedding_twice(tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s", tie_word_embeddings=True)
    convert_checkpoint(source, tmp_path / "out", HF)
    assert "lm_head.weight" not in result(tmp_path / "out")
    counts = verify_checkpoint(tmp_path / "out", source).accounting
    assert counts is not None
    assert counts.dropped["lm_head.weight"] == 11 * 8


WITHOUT = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "megatron"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
from fuseport.converter import Recipe, convert_checkpoint, verify_checkpoint
source, out = Path(sys.argv[1]), Path(sys.argv[2])
for target in ("hf", "trtllm"):
    convert_checkpoint(source, out / target, Recipe(target=target), device="cpu")
    verify_checkpoint(out / target, source)
assert not {"transformers", "megatron"} & set(sys.modules)
"""


def test_neither_transformers_nor_megatron_is_needed(tmp_path: Path) -> None:
    source = write_hf_tiny(tmp_path / "s")
    command = [sys.executable, "-c", WITHOUT, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
