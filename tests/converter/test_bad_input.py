"""Input that cannot be converted ends in a named error, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuseport_testing.tiny import FACTS, ITERATION, SPEC, tiny_weights, write_tiny

from fuseport.converter import FuseportError, ModelSpec, Recipe, convert_checkpoint
from fuseport.converter import plan_checkpoint as plan
from fuseport.converter.errors import (
    CorruptSourceError,
    MissingTensorError,
    ModelError,
    RecipeError,
    ShapeError,
    SourceError,
    UnknownTensorError,
    UnsafeSourceError,
    UnsupportedOptionError,
)
from fuseport.converter.fact_names import MODEL_TYPES, REFUSED
from fuseport.converter.model import GIVEN, KINDS
from fuseport.converter.targets.table import TARGETS
from fuseport.converter.targets.trtllm_config import FAMILIES, config

FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"
NAMES = list(tiny_weights())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "tiny")


def refused(
    kind: type[FuseportError], match: str, source: Path, out: Path, *args: Any, **kwargs: Any
) -> None:
    """The conversion raises exactly `kind`, and `out`'s directory is as it was."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind, match=match) as caught:
        convert_checkpoint(source, out, *args, device="cpu", **kwargs)
    assert type(caught.value) is kind
    # One paragraph: no line breaks, not a word of Python's own.
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


# Tensors.


@pytest.mark.parametrize("name", NAMES)
def test_missing_tensor(name: str, tmp_path: Path) -> None:
    weights = tiny_weights()
    del weights[name]
    write_tiny(tmp_path / "s", weights)
    part = name.rpartition("layers.")[2]
    refused(MissingTensorError, re.escape(part), tmp_path / "s", tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shape(name: str, tmp_path: Path) -> None:
    weights = tiny_weights()
    weights[name] = torch.cat([weights[name], weights[name]], -1)
    write_tiny(tmp_path / "s", weights)
    refused(ShapeError, "has shape .* call for", tmp_path / "s", tmp_path / "out")


@pytest.mark.parametrize("name", [FC1, EMBEDDING])
@pytest.mark.parametrize("shape", [(), (0, 48, 16)])
def test_no_dimensions_and_no_elements(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    write_tiny(tmp_path / "s", tiny_weights() | {name: torch.ones(shape)})
    kind = MissingTensorError if name == FC1 and shape else ShapeError
    refused(kind, name.rpartition(".layers.")[2], tmp_path / "s", tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["more.weight", "decoder.layers.7.mlp.linear_fc2.weight", "mtp.layers.0.enorm.weight", ".."],
)
def test_tensor_that_nothing_wants(name: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "s", tiny_weights() | {name: torch.ones(2)})
    refused(UnknownTensorError, re.escape(name), tmp_path / "s", tmp_path / "out")


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("name", [FC2, EMBEDDING])
def test_dtype_that_is_not_converted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = tiny_weights()
    weights[name] = weights[name].to(dtype)
    write_tiny(tmp_path / "s", weights)
    with pytest.raises((UnsupportedOptionError, SourceError), match=str(dtype)):
        convert_checkpoint(tmp_path / "s", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layer_norm_needs_its_final_bias(tmp_path: Path) -> None:
    weights = tiny_weights()
    for name in NAMES:
        if name.endswith("layer_norm_weight"):
            weights[name.replace("weight", "bias")] = torch.ones(2, 16)
    write_tiny(tmp_path / "s", weights, FACTS | {"normalization": "LayerNorm"})
    match = r"decoder\.final_layernorm\.bias"
    refused(MissingTensorError, match, tmp_path / "s", tmp_path / "out")


def test_overflow_and_nan_are_counted(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights[FC2][0, 0, :4] = torch.tensor([math.nan, math.inf, 1e6, -1e6])
    write_tiny(tmp_path / "s", weights)
    name = "rank0/transformer.layers.0.mlp.proj.weight"
    report = convert_checkpoint(tmp_path / "s", tmp_path / "half", Recipe(dtype="float16"))
    assert (report.saturated, report.nonfinite) == ({name: 2}, {name: 2})
    report = convert_checkpoint(tmp_path / "s", tmp_path / "bf16", Recipe())
    assert (report.saturated, report.nonfinite) == ({}, {name: 2})


# Facts.

NONSENSE = ["x", "", -1, math.nan, math.inf, [1, 2], {"a": 1}, 1.5, 10**30, b"x"]
# What is not nonsense after all for a field.
SENSE: dict[str, list[object]] = {
    "layernorm_epsilon": [1.5, 10**30],
    "rotary_base": [1.5, 10**30],
    "rotary_percent": [1.5, 10**30],
    "rope_scaling_factor": [1.5, 10**30],
    "seq_len_interpolation_factor": [1.5, 10**30],
    "moe_router_topk_scaling_factor": [1.5, 10**30],
    "blocks": [""],
    "moe_layers": [""],
    "heterogeneous_layers_config_encoded_json": [""],
}


@pytest.mark.parametrize("name", [name for name in GIVEN if name not in REFUSED])
def test_facts_that_make_no_sense(name: str) -> None:
    facts = FACTS | {"num_experts": 4}
    for value in NONSENSE:
        if value not in SENSE.get(name, []):
            with pytest.raises(ModelError, match=name.partition("_")[0]):
                ModelSpec.from_facts(facts, **{name: value})


@pytest.mark.parametrize("name", FACTS)
def test_arguments_that_make_no_sense(name: str) -> None:
    for value in (object(), [1, 2], {"a": 1}, "x", math.nan):
        with pytest.raises(ModelError):
            ModelSpec.from_facts(FACTS | {name: value})


@pytest.mark.parametrize(
    "name", ["num_layers", "num_attention_heads", "hidden_size", "kv_channels", "num_query_groups"]
)
def test_zero_is_not_a_default(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} must be a whole number from 1 .* found 0"):
        ModelSpec.from_facts(FACTS, **{name: 0})


@pytest.mark.parametrize("name", ["num_layers", "num_attention_heads", "hidden_size"])
def test_facts_that_are_needed(name: str) -> None:
    facts = {key: value for key, value in FACTS.items() if key != name}
    with pytest.raises(
        ModelError, match=f"{name} must be .* found nothing; give it as the fact {name} "
    ):
        ModelSpec.from_facts(facts)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("layernorm_eps", "did you mean layernorm_epsilon"),
        ("swiglu", r"did you mean gated_linear_unit\?"),
        ("norm_epsilon", r"did you mean layernorm_epsilon\?"),
        ("zzz", "known: num_layers"),
        ("facts", "known"),
        ("cls", "known"),
        ("num_local_experts", "did you mean"),
    ],
)
def test_unknown_names_are_not_passed_over(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}' is not the name of a model fact.*{hint}"):
        ModelSpec.from_facts(FACTS, **{name: 1})
    ModelSpec.from_facts({**FACTS, "zzz": 1, "facts": 2})


def test_what_the_user_says_wins(source: Path) -> None:
    changes = {
        "share_embeddings_and_output_weights": True,
        "num_query_groups": 4,
        "layernorm_epsilon": 1e-6,
        "gated_linear_unit": False,
        "activation_func": "relu",
    }
    spec = ModelSpec.from_facts(FACTS | {"group_query_attention": False}, **changes)
    assert {name: getattr(spec, name) for name in changes} == changes
    # YAML takes a number without a point for text.
    assert ModelSpec.from_facts(FACTS, layernorm_epsilon="1e-6").layernorm_epsilon == 1e-6


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_are_refused_by_name(option: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "s", facts=FACTS | {option: 2})
    refused(UnsupportedOptionError, f"sets {option}=2", tmp_path / "s", tmp_path / "out")
    write_tiny(tmp_path / "no", facts=FACTS | {option: None})
    convert_checkpoint(tmp_path / "no", tmp_path / "out")


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"num_query_groups": 3}, "num_query_groups = 3 does not divide"),
        ({"num_layers": 3}, r"decoder\.layers\.2\."),
        ({"num_layers": 1}, r"decoder\.layers\.1\."),
        ({"kv_channels": 8}, r"linear_qkv.weight has shape \[32, 16\]"),
        ({"vocab_size": 33}, "vocab_size = 33, but the embedding has 32 rows"),
        ({"num_moe_experts": 4}, "no tensor .*router.weight"),
        ({"num_moe_experts": 4, "moe_router_topk": 5}, "moe_router_topk = 5 exceeds"),
        ({"num_moe_experts": 4, "moe_layer_freq": 0}, "moe_layer_freq must be .* found 0"),
        ({"num_moe_experts": 4, "moe_layer_freq": "[1]*10**9"}, "is not a list of 0 and 1"),
        ({"num_moe_experts": 4, "moe_layer_freq": "(" * 5000}, "is not a list of 0 and 1"),
        ({"num_moe_experts": 4, "moe_layer_freq": [1]}, "1 entries for 2 layers"),
        ({"num_moe_experts": 4, "moe_layers": [True] * 3}, "3 entries for num_layers = 2"),
        ({"num_moe_experts": 4, "add_bias_linear": True}, "experts' biases are not converted"),
        ({"model_type": "bert"}, "model_type must be one of gpt"),
        ({"position_embedding_type": "yarn"}, "must be one of rope, learned_absolute"),
        ({"activation_func": "tanh"}, "activation_func 'tanh' is not known"),
        ({"add_bias_linear": True}, "no tensor .*bias"),
        ({"blocks": [{"attention": "half"}]}, "blocks"),
    ],
)
def test_facts_that_do_not_fit(
    facts: dict[str, object], match: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=match):
        convert_checkpoint(source, tmp_path / "out", Recipe(), facts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["x", "{}", "[]", '{"block_configs": 3}', '{"block_configs": [3]}',
     '{"block_configs": [{"attention": {}, "ffn": {"ffn_mult": "x"}}]}'],
)  # fmt: skip
def test_block_configs_that_make_no_sense(text: str) -> None:
    with pytest.raises(ModelError, match="blocks"):
        ModelSpec.from_facts(FACTS, heterogeneous_layers_config_encoded_json=text)


def test_every_field_has_a_kind_and_every_type_a_family() -> None:
    assert list(KINDS) == list(ModelSpec.__dataclass_fields__)
    assert set(MODEL_TYPES) == {*FAMILIES, "deepseek_v3"}


def test_facts_of_the_user_alone(tmp_path: Path) -> None:
    write_tiny(tmp_path / "s", facts=None)
    refused(ModelError, "num_attention_heads", tmp_path / "s", tmp_path / "out")
    convert_checkpoint(tmp_path / "s", tmp_path / "out", Recipe(tp_size=2), SPEC)


# Recipes.


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"tp_size": 0}, "tp_size must be .* found 0"),
        ({"tp_size": -1}, "tp_size must be .* found -1"),
        ({"tp_size": "2"}, "tp_size must be .* found '2'"),
        ({"tp_size": 2.0}, "tp_size must be .* found 2.0"),
        ({"tp_size": True}, "tp_size must be .* found True"),
        ({"tp_size": None}, "tp_size must be .* found None"),
        ({"tp_size": 3}, "num_attention_heads = 4 cannot be split evenly by tp_size = 3"),
        ({"tp_size": 10**9}, "cannot be split evenly"),
        ({"pp_size": 0}, "pp_size must be"),
        ({"pp_size": 3}, "pp_size = 3 exceeds the 2 layers"),
        ({"moe_ep_size": 0}, "moe_ep_size must be"),
        ({"moe_ep_size": 2}, "no experts"),
        ({"gpus_per_node": 0}, "gpus_per_node must be"),
        ({"dtype": "fp8"}, "dtype 'fp8' is none of bfloat16, float16, float32"),
        ({"dtype": []}, r"dtype \[\] is none of"),
        ({"target": "onnx"}, "target 'onnx' is none of trtllm"),
        ({"use_parallel_embedding": "yes"}, "use_parallel_embedding must be"),
    ],
)
def test_recipes_that_cannot_work(choice: dict[str, Any], match: str, source: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        plan(source, Recipe(**choice))


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ({"backend": "cpp"}, "backend 'cpp' is none of auto, triton, torch"),
        ({"device": "tpu"}, "device 'tpu' is none of auto, cpu, cuda"),
        ({"device": ""}, "device ''"),
    ],
)
def test_places_that_are_not_there(
    where: dict[str, Any], match: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=match):
        convert_checkpoint(source, tmp_path / "out", **where)
    assert not list(tmp_path.iterdir())


# Sources. What a damaged file does to each reader is in `sources/`; here it goes all the way.

Spoil = Callable[[Path], object]
SPOILT: list[tuple[str, Spoil, type[FuseportError], str]] = [
    ("truncated", lambda d: os.truncate(d / "__0_0.distcp", 5000), CorruptSourceError, "truncated"),
    ("no shard", lambda d: (d / "__0_0.distcp").unlink(), CorruptSourceError, "missing"),
    ("no metadata", lambda d: (d / ".metadata").unlink(), SourceError, "no .metadata"),
    ("empty metadata", lambda d: os.truncate(d / ".metadata", 0), CorruptSourceError, "pickle"),
    ("json", lambda d: (d / "metadata.json").write_text("["), CorruptSourceError, "readable"),
    ("common", lambda d: (d / "common.pt").write_bytes(b"x"), CorruptSourceError, "common.pt"),
    ("no common", lambda d: (d / "common.pt").unlink(), ModelError, "found nothing"),
    ("list", lambda d: torch.save([1], d / "common.pt"), ModelError, "found nothing"),
    (
        "code",
        lambda d: torch.save({"args": shutil.rmtree}, d / "common.pt"),
        UnsafeSourceError,
        "shutil.rmtree",
    ),
    (
        "latest",
        lambda d: (d.parent / "latest_checkpointed_iteration.txt").write_text("7"),
        SourceError,
        "iter_0000007, which is not there",
    ),
]


@pytest.mark.parametrize(("spoil", "kind", "match"), [row[1:] for row in SPOILT])
def test_damaged_source(
    spoil: Spoil, kind: type[FuseportError], match: str, tmp_path: Path
) -> None:
    spoil(write_tiny(tmp_path / "s") / ITERATION)
    refused(kind, match, tmp_path / "s", tmp_path / "out")


def test_flipped_bits_never_end_in_another_error(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "s") / ITERATION
    for name in (".metadata", "common.pt", "__0_0.distcp"):
        good = (directory / name).read_bytes()
        for place in range(7, len(good), len(good) // 40):
            bad = bytearray(good)
            bad[place] ^= 1 << place % 8
            (directory / name).write_bytes(bad)
            with contextlib.suppress(FuseportError):
                plan(tmp_path / "s", Recipe())
        (directory / name).write_bytes(good)


def test_directories_of_another_kind(tmp_path: Path) -> None:
    for name, file in (("hf", "model.safetensors"), ("zarr", "layer/.zarray"), ("empty", "")):
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir(exist_ok=True)
        if file:
            (tmp_path / name / file).write_text("{}")
        refused(SourceError, str(tmp_path / name), tmp_path / name, tmp_path / "out")
    for missing in (tmp_path / "hf/model.safetensors", tmp_path / "no", Path("x" * 5000)):
        refused(SourceError, "not a directory|cannot be read", missing, tmp_path / "out")


RUN_CONFIG = """
model:
  _target_: megatron.bridge.models.llama.LlamaModelProvider
  num_layers: 2
  hidden_size: 16
  ffn_hidden_size: 24
  num_attention_heads: 4
  num_query_groups: 2
  kv_channels: 4
  vocab_size: 30
  normalization: RMSNorm
  gated_linear_unit: true
  activation_func: {_target_: torch.nn.functional.silu, _call_: false}
  position_embedding_type: rope
  seq_length: 64
  layernorm_epsilon: 1.0e-05
  share_embeddings_and_output_weights: false
  params_dtype: {_target_: torch.bfloat16, _call_: false}
  init_method: {_target_: functools.partial, _partial_: true, std: 0.02}
  num_moe_experts: null
  attention_backend: !!python/object/apply:megatron.core.AttnBackend [1]
train: {train_iters: 1}
"""


def test_run_config_instead_of_arguments(source: Path, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "s", facts=None) / ITERATION
    (directory / "run_config.yaml").write_text(RUN_CONFIG)
    found = plan(tmp_path / "s", Recipe()).spec
    assert found == plan(source, Recipe()).spec


@pytest.mark.parametrize(
    "text",
    ["{", "\0", "? [a]\n: b", "a: " + "[" * 3000, "model: !!int x", "model: !!timestamp x"],
)
def test_run_config_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "s", facts=None) / ITERATION
    (directory / "run_config.yaml").write_text(text)
    refused(CorruptSourceError, "not readable as YAML", tmp_path / "s", tmp_path / "out")


def test_biases_that_source_and_facts_do_not_share(source: Path, tmp_path: Path) -> None:
    """Converting them all the same would leave config.json without a word of them."""
    with pytest.raises(MissingTensorError, match=r"linear_proj\.bias|linear_qkv\.bias"):
        convert_checkpoint(source, tmp_path / "out", Recipe(), {"add_bias_linear": True})
    name = "decoder.layers.self_attention.linear_qkv.bias"
    other = write_tiny(tmp_path / "other", tiny_weights() | {name: torch.randn(2, 32)})
    with pytest.raises(UnknownTensorError, match=r"layers\.0\.self_attention\.linear_qkv\.bias"):
        convert_checkpoint(other, tmp_path / "out", Recipe())
    convert_checkpoint(other, tmp_path / "out", Recipe(), {"add_qkv_bias": True})


def test_llama_3_rope_scaling_reaches_the_config(source: Path) -> None:
    spec = ModelSpec.from_facts(FACTS | {"use_rope_scaling": True, "rope_scaling_factor": 32.0})
    assert config(spec, Recipe(), 30)["rotary_scaling"] == {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    unused = ModelSpec.from_facts(FACTS | {"use_rope_scaling": False, "rope_scaling_factor": 8.0})
    assert "rotary_scaling" not in config(unused, Recipe(), 30)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("moe_router_score_function", "sigmoid"),
        ("moe_router_num_groups", 2),
        ("moe_router_topk_scaling_factor", 2.5),
        ("multi_latent_attention", True),
    ],
)
def test_options_that_the_unified_checkpoint_cannot_say(option: str, value: object) -> None:
    latent = {"qk_pos_emb_head_dim": 4, "rope_type": "rope"}
    spec = ModelSpec.from_facts(FACTS | latent | {option: value})
    with pytest.raises(UnsupportedOptionError, match=f"the model has {option}"):
        TARGETS["trtllm"].check(spec, Recipe())


def test_an_option_of_which_one_value_is_handled() -> None:
    with pytest.raises(UnsupportedOptionError, match="softmax_type"):
        ModelSpec.from_facts(FACTS | {"softmax_type": "learnable"})
